"""Weight updates of SGLang through shared-memory buckets: exact, all or nothing, named when they fail."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from redone.data.tiny import make_tiny_model
from redone.errors import EngineError, SyncError
from redone.types import Sampling
from redone.weights.digest import bucket_digests
from tests.engines.engine_process import EngineProcess
from tests.engines.harness import LiveEngine
from tests.engines.test_life import offspring
from tests.engines.test_update import assert_engine_holds
from tests.sglang.conftest import sglang_config
from tests.sglang.test_generate import LONG, TOLERANCE

pytestmark = pytest.mark.sglang


def test_updates_are_exact_and_drop_the_prefix_cache(live: LiveEngine) -> None:
    for _ in range(3):
        (before,) = live.generate(LONG, [1])  # fills the prefix cache under the old weights
        old, (new, buckets) = live.held, live.next_weights()
        assert len(buckets) > 3
        live.push(buckets, new)
        assert_engine_holds(live, new)
        (after,) = live.generate(LONG, [1])
        assert [(s.version, s.start) for s in after.versions] == [(live.version, 0)]
        drift = np.abs(old.logprobs(LONG, after.token_ids.tolist()) - after.logprobs).max()
        assert drift > 100 * TOLERANCE, "the new weights must differ visibly"
        assert before.versions[0].version == live.version - 1


def test_requests_survive_an_update_with_a_span_per_version(live: LiveEngine) -> None:
    sampling = Sampling(max_tokens=400, ignore_eos=True)
    old, new, completions = live.push_while_generating(LONG, sampling, timeout_s=120)
    for completion in completions:
        first, second = completion.versions
        assert first.start == 0 and first.end == second.start and second.end == 400
        ids = completion.token_ids.tolist()
        diff_old = np.abs(old.logprobs(LONG, ids) - completion.logprobs)[: first.end]
        diff_new = np.abs(new.logprobs(LONG, ids) - completion.logprobs)[second.start :]
        assert diff_old.max() <= TOLERANCE and diff_new.max() <= TOLERANCE


def test_flipped_byte_is_named_poisons_and_heals(live: LiveEngine) -> None:
    new, buckets = live.next_weights()
    victim = live.plan.tensors[live.plan.buckets[2][0]]
    byte = live.writer.view(victim.offset + victim.nbytes // 2, 1)
    byte.bitwise_xor_(1)
    live.process.call("begin_update", live.plan)
    live.process.call("load", buckets[0])
    live.process.call("load", buckets[1])
    with pytest.raises(SyncError, match=f"{victim.name}.*bucket 2, version {live.version}"):
        live.process.call("load", buckets[2])
    with pytest.raises(SyncError, match="no weight update in progress"):
        live.process.call("commit", live.version)
    with pytest.raises(EngineError, match=f"poisoned.*{victim.name}"):
        live.generate([5], [0])
    with pytest.raises(EngineError, match="poisoned"):
        live.process.call("resume")
    byte.bitwise_xor_(1)
    live.push(buckets, new)
    assert_engine_holds(live, new)


def test_missing_bucket_is_named_poisons_and_heals(live: LiveEngine) -> None:
    new, buckets = live.next_weights()
    missing = live.plan.tensors[live.plan.buckets[-1][0]].name
    live.process.call("begin_update", live.plan)
    for bucket in buckets[:-1]:
        live.process.call("load", bucket)
    with pytest.raises(EngineError, match="finish it with commit"):
        live.process.call("resume")
    with pytest.raises(SyncError, match=missing):
        live.process.call("commit", live.version)
    with pytest.raises(EngineError, match="poisoned"):
        live.generate([5], [0])
    live.push(buckets, new)
    assert_engine_holds(live, new)


def test_a_tensor_that_does_not_fit_is_an_error_of_its_bucket(live: LiveEngine) -> None:
    """SGLang's own tensor update would end its scheduler here; ours goes on with the next update."""
    new, buckets = live.next_weights()
    first = live.plan.tensors[0]
    turned = dataclasses.replace(first, shape=(*first.shape[:-1], first.shape[-1] * 2), nbytes=first.nbytes)
    plan = dataclasses.replace(live.plan, tensors=(turned, *live.plan.tensors[1:]))
    live.process.submit(accept_any_plan).result(timeout=60)
    live.process.call("begin_update", plan)
    digests = bucket_digests(live.plan, 0, live.writer)
    with pytest.raises(SyncError, match=rf"bucket 0 of version {live.version} \('{first.name}'"):
        live.process.call("load", dataclasses.replace(buckets[0], digests=digests))
    live.push(buckets, new)
    assert_engine_holds(live, new)


async def accept_any_plan(engine: object) -> None:
    """Checks before the scheduler would refuse the plan that the test sends."""
    engine._state.folder = dataclasses.replace(engine._state.folder, tensors=None)  # type: ignore[attr-defined]


def test_channel_that_is_gone_is_an_error(live: LiveEngine) -> None:
    new, buckets = live.next_weights()
    gone = dataclasses.replace(buckets[0], location=buckets[0].location + "-gone")
    live.process.call("begin_update", live.plan)
    with pytest.raises(SyncError, match="does not exist"):
        live.process.call("load", gone)
    live.push(buckets, new)
    assert_engine_holds(live, new)


@pytest.mark.parametrize(("kind", "ranks"), [("qwen3_moe", 1), ("llama", 1), ("qwen3", 2)])
def test_other_models_and_ranks_update_exactly(tmp_path: Path, kind: str, ranks: int) -> None:
    folder = make_tiny_model(tmp_path / "model", kind, dtype=torch.float32)  # type: ignore[arg-type]
    live = LiveEngine(sglang_config(folder, tensor_model_parallel_size=ranks), folder, tmp_path)
    with live.process:
        assert_engine_holds(live, live.held)
        new, buckets = live.next_weights()
        live.push(buckets, new)
        assert_engine_holds(live, new)
    live.writer.close()


def test_a_failed_start_quotes_the_cause_and_leaves_nothing(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "qwen3")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4096])
    with EngineProcess(sglang_config(folder)) as process:
        with pytest.raises(EngineError, match=r"model.safetensors|engine 0 did not start"):
            process.call("start")
        assert offspring(process.pid) == []


def test_a_scheduler_that_stands_still_answers_no_ping(live: LiveEngine) -> None:
    live.process.call("ping")
    (scheduler,) = (p for p in offspring(live.process.pid) if "scheduler" in " ".join(p.cmdline()))
    scheduler.suspend()
    try:
        asked = live.process.submit("ping")
        with pytest.raises(TimeoutError):
            asked.result(timeout=3)
    finally:
        scheduler.resume()
    asked.result(timeout=60)


def test_a_dead_scheduler_takes_the_engine_process_with_it(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "qwen3")
    process = EngineProcess(sglang_config(folder))
    process.call("start")
    children = offspring(process.pid)
    scheduler = next(p for p in children if "scheduler" in " ".join(p.cmdline()))
    running = process.submit("generate", [5], Sampling(max_tokens=400, ignore_eos=True), [1])
    os.kill(scheduler.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="the engine process ended"):
        running.result(timeout=60)
    _, left = psutil.wait_procs(children, timeout=10)
    assert left == []
