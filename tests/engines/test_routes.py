"""The expert choices that the engine returns are those that Hugging Face's routers make, for every token."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from redone.data.tiny import make_tiny_model
from redone.errors import EngineError
from redone.types import Completion, RouteArray, Sampling
from tests.engines.engine_process import EngineProcess
from tests.engines.harness import HeldWeights, LiveEngine, engine_config
from tests.engines.test_generate import LONG

ROUTED = Sampling(max_tokens=24, routes=True)
recording = pytest.mark.parametrize("live", ["in_process_moe"], indirect=True)


def whole(completion: Completion) -> RouteArray:
    """[P + R - 1, L, K]"""
    assert completion.prompt_experts is not None and completion.routed_experts is not None
    return np.concatenate([completion.prompt_experts, completion.routed_experts])


def check(held: HeldWeights, prompt: list[int], completion: Completion) -> None:
    """All tokens but the last, all layers."""
    ids = [*prompt, *completion.token_ids.tolist()]
    routes = whole(completion)
    assert routes.dtype == np.int16 and routes.shape == (len(ids) - 1, 4, 2)
    assert np.array_equal(np.sort(routes, -1), held.routes(ids[:-1]))


@recording
def test_every_token_and_layer(live: LiveEngine) -> None:
    """Twelve prompts at once, some with a cached prefix, three samples each that end at different tokens."""
    prompts = [[3 + i, 20 + i, 50] * (1 + i % 4) + LONG[: 40 * (i % 3)] for i in range(12)] + [LONG, LONG]
    futures = [live.process.submit("generate", p, ROUTED, [i, i + 1, i + 2]) for i, p in enumerate(prompts)]
    for prompt, future in zip(prompts, futures, strict=True):
        completions = future.result(timeout=60)
        for completion in completions:
            check(live.held, prompt, completion)
            assert completion.prompt_experts is completions[0].prompt_experts  # sent and kept once
    for again in (LONG, LONG[:64], [*LONG, 7]):  # all or most of it is cached now
        for completion in live.process.call("generate", again, ROUTED, [1, 2]):
            check(live.held, again, completion)


@recording
def test_the_choices_differ_from_token_to_token(live: LiveEngine) -> None:
    """Else agreement would mean little."""
    (completion,) = live.process.call("generate", LONG, ROUTED, [5])
    routes = np.sort(whole(completion), -1)
    distinct = [len({tuple(row) for row in routes[:, layer].tolist()}) for layer in range(4)]
    assert min(distinct) > 1 and max(distinct) > 10, distinct


@recording
def test_choices_around_an_update_are_those_of_each_tokens_own_pass(live: LiveEngine) -> None:
    sampling = Sampling(max_tokens=400, ignore_eos=True, routes=True)
    old, new, completions = live.push_while_generating(LONG, sampling)
    for completion in completions:
        first = completion.versions[0]
        ids = [*LONG, *completion.token_ids.tolist()][:-1]
        found, cut = np.sort(whole(completion), -1), len(LONG) + first.end - 1
        before, after = old.routes(ids), new.routes(ids)
        assert np.array_equal(found[:cut], before[:cut]) and np.array_equal(found[cut:], after[cut:])
        assert not np.array_equal(before[:cut], after[:cut])
    (completion,) = live.process.call("generate", LONG, ROUTED, [1])
    check(new, LONG, completion)


async def give_up(engine: Any) -> list[int]:
    """Requests whose choices a worker holds: while they run, after they were cancelled, after other calls."""

    async def held() -> int:
        return (await engine._core.rpc(lambda worker: len(worker._redone_routes._known)))[0]

    sampling = Sampling(max_tokens=400, ignore_eos=True, routes=True)
    task = asyncio.create_task(engine.generate(LONG, sampling, [1, 2, 3]))
    while not await held():
        await asyncio.sleep(0.01)
    counts = [await held()]
    task.cancel()
    await asyncio.wait([task])
    counts.append(await held())
    await engine.generate(LONG, Sampling(max_tokens=4), [1])
    await engine.score([LONG])
    await engine.generate(LONG, ROUTED, [1])
    return [*counts, await held()]


@recording
def test_what_is_given_up_or_not_wanted_leaves_nothing(live: LiveEngine) -> None:
    assert live.process.submit(give_up).result(timeout=60) == [3, 0, 0]


@pytest.mark.parametrize("live", ["async_dense_tied"], indirect=True)
def test_choices_of_an_engine_that_records_none_are_refused(live: LiveEngine) -> None:
    with pytest.raises(EngineError, match=r"trainer.moe.routing_replay=engine"):
        live.process.call("generate", LONG, ROUTED, [1])


@pytest.mark.slow
def test_a_dense_model_is_refused_at_start(tmp_path: Path) -> None:
    cfg = engine_config(make_tiny_model(tmp_path, "qwen3"), True, "engine")
    refused = r"0 of 4 layers .*routing_replay=trainer"
    with EngineProcess(cfg) as process, pytest.raises(EngineError, match=refused):
        process.call("start")


async def start_narrow(engine: Any) -> int:
    """Prompts in chunks of 48 tokens, and a KV cache of 1,024 tokens: requests are preempted."""
    arguments = engine._arguments

    def narrow(cfg: Any, limit: int) -> dict[str, Any]:
        small = {"max_num_batched_tokens": 48, "max_num_seqs": 32, "kv_cache_memory_bytes": 2 << 20}
        return arguments(cfg, limit) | small | {"enable_chunked_prefill": True}

    engine._arguments = narrow
    await engine.start()
    return (await engine._core.rpc(lambda worker: worker.model_runner.kv_cache_config.num_blocks))[0]


async def count_resumed(engine: Any) -> int:
    def resumed(worker: Any) -> int:
        recorder = worker._redone_routes
        if not hasattr(recorder, "seen"):
            recorder.seen, resume = [], recorder.resume
            recorder.resume = lambda *args: (recorder.seen.append(args), resume(*args))
        return len(recorder.seen)

    return (await engine._core.rpc(resumed))[0]


@pytest.mark.slow
def test_chunks_and_preemption(tmp_path: Path) -> None:
    """Greedy, because a chunk rewinds a seeded request's generator, which vLLM on CPU cannot."""
    folder = make_tiny_model(tmp_path, "qwen3_moe", dtype=torch.float32)
    held = HeldWeights(folder)
    prompts = [[3 + (i * (j + 1) + j) % 90 for j in range(120)] for i in range(12)]
    greedy = Sampling(temperature=0.0, max_tokens=60, ignore_eos=True, routes=True)
    with EngineProcess(engine_config(folder, True, "engine")) as process:
        assert process.submit(start_narrow).result(timeout=300) <= 1024 // 32
        process.submit(count_resumed).result(timeout=60)
        futures = [process.submit("generate", p, greedy, [0]) for p in prompts]
        for prompt, future in zip(prompts, futures, strict=True):
            check(held, prompt, future.result(timeout=120)[0])
        assert process.submit(count_resumed).result(timeout=60) > 0


@pytest.mark.slow
def test_asyncllm_on_two_tensor_ranks(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "qwen3_moe", dtype=torch.float32)
    held = HeldWeights(folder)
    cfg = engine_config(folder, False, "engine", tensor_model_parallel_size=2)
    with EngineProcess(cfg) as process:
        process.call("start")
        prompts = [LONG, [5, 9, 40], LONG[:70]]
        futures = [process.submit("generate", p, ROUTED, range(4)) for p in prompts]
        for prompt, future in zip(prompts, futures, strict=True):
            for completion in future.result(timeout=120):
                check(held, prompt, completion)
