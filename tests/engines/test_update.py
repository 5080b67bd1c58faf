"""Weight updates: exact, all or nothing, and named when they fail. Each test leaves a healthy engine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from redone.errors import EngineError, SyncError
from redone.types import Sampling
from tests.engines.harness import HeldWeights, LiveEngine
from tests.engines.test_generate import LONG, TOLERANCE, worst_difference


def assert_engine_holds(live: LiveEngine, weights: HeldWeights) -> None:
    for prompt in ([5, 9], LONG):
        for completion in live.generate(prompt, range(4)):
            expected = weights.logprobs(prompt, completion.token_ids.tolist())
            assert np.abs(expected - completion.logprobs).max() <= TOLERANCE


def test_updates_are_exact_and_drop_the_prefix_cache(live: LiveEngine) -> None:
    """Three in a row: vLLM's MoE packing goes wrong from the first reload on, other state may only later."""
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
    old, new, completions = live.push_while_generating(LONG, sampling)
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
    for late in (("load", buckets[2]), ("commit", live.version)):
        with pytest.raises(SyncError, match="no weight update in progress"):
            live.process.call(*late)
    with pytest.raises(EngineError, match=f"poisoned.*{victim.name}"):  # the reason is still the first one
        live.generate([5], [0])
    with pytest.raises(EngineError, match="poisoned"):
        live.process.call("resume")
    byte.bitwise_xor_(1)
    live.push(buckets, new)
    assert_engine_holds(live, new)


def test_half_loaded_layers_do_not_leak_into_the_next_update(live: LiveEngine) -> None:
    """Give up after bucket k, for many k: some cut each kind of layer in two. Then a complete update."""
    new, buckets = live.next_weights()
    broken = dataclasses.replace(buckets[0], digests=(0,) * len(buckets[0].digests))
    for k in range(1, len(buckets), 2):
        live.process.call("begin_update", live.plan)
        for bucket in buckets[:k]:
            live.process.call("load", bucket)
        with pytest.raises(SyncError, match="arrived damaged"):
            live.process.call("load", broken)
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


def test_stale_bytes_are_named(live: LiveEngine) -> None:
    """The channel still holds the previous version: every digest is valid, for other weights."""
    new, buckets = live.next_weights()
    live.publish(live.held)
    live.process.call("begin_update", live.plan)
    with pytest.raises(SyncError, match="arrived damaged"):
        live.process.call("load", buckets[0])
    live.publish(new)
    live.push(buckets, new)
    assert_engine_holds(live, new)


def test_another_plan_is_refused_and_harmless(live: LiveEngine) -> None:
    if live.version == 0:  # the hash is compared with that of the first update
        new, buckets = live.next_weights()
        live.push(buckets, new)
    with pytest.raises(SyncError, match=f"{'0' * 32} differs from {live.plan.hash}"):
        live.process.call("begin_update", live.misplan())
    assert worst_difference(live, LONG, live.generate(LONG, [0])[0]) <= TOLERANCE


def test_channel_that_is_gone_is_an_error(live: LiveEngine) -> None:
    new, buckets = live.next_weights()
    gone = dataclasses.replace(buckets[0], location=buckets[0].location + "-gone")
    live.process.call("begin_update", live.plan)
    with pytest.raises(SyncError, match="does not exist"):
        live.process.call("load", gone)
    live.push(buckets, new)
    assert_engine_holds(live, new)


def test_swapped_tensors_are_named(live: LiveEngine) -> None:
    """Two tensors of one shape change places in transit (two experts, in the mixture of experts)."""
    new, buckets = live.next_weights()
    stem = (
        "mlp.experts.{}.up_proj.weight" if "mlp.experts.1" in str(live.plan.tensors) else "mlp.{}_proj.weight"
    )
    parts = ("1", "2") if "experts" in stem else ("gate", "up")
    first, second = (
        next(t for t in live.plan.tensors if t.name.endswith(stem.format(part))) for part in parts
    )
    views = [live.writer.view(t.offset, t.nbytes) for t in (first, second)]
    kept = views[0].clone()
    views[0].copy_(views[1])
    views[1].copy_(kept)
    live.process.call("begin_update", live.plan)
    with pytest.raises(SyncError, match=f"tensor '{first.name}'.*arrived damaged"):
        for bucket in buckets:
            live.process.call("load", bucket)
    live.publish(new)
    live.push(buckets, new)
    assert_engine_holds(live, new)
