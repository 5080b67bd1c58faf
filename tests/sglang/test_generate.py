"""What SGLang samples and reports through our adapter, against the Hugging Face model of the same weights.

Real SGLang on a CPU with a test stub for its CUDA kernel package (tests/sglang/stubs): nothing of its
kernels, CUDA graphs or memory saver is shown here.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from redone.errors import EngineError
from redone.types import Sampling
from tests.engines.harness import LiveEngine

pytestmark = pytest.mark.sglang

TOLERANCE = 1e-5
LONG = [3 + (7 * i) % 90 for i in range(80)]
EOS = 1


def worst_difference(live: LiveEngine, prompt: list[int], completion: Any, temperature: float = 1.0) -> float:
    expected = live.held.logprobs(prompt, completion.token_ids.tolist(), temperature)
    return float(np.abs(expected - completion.logprobs).max())


def test_logprobs_match_hugging_face(live: LiveEngine) -> None:
    for prompt in ([5], [5, 9, 40], LONG):
        for completion in live.generate(prompt, range(8)):
            assert completion.token_ids.dtype == np.int32 and completion.logprobs.dtype == np.float32
            assert worst_difference(live, prompt, completion) <= TOLERANCE


def test_temperature_is_part_of_the_logprobs(live: LiveEngine) -> None:
    for completion in live.generate(LONG, range(4), temperature=0.7):
        assert worst_difference(live, LONG, completion, temperature=0.7) <= TOLERANCE
        assert worst_difference(live, LONG, completion, temperature=1.0) > 0.01


@pytest.mark.parametrize("cut", [{"top_p": 0.5}, {"top_k": 5}])
def test_cut_logprobs_are_renormalised(live: LiveEngine, cut: dict[str, Any]) -> None:
    """One token: its log-probability among the smallest set that holds 0.5 of the mass, or among five."""
    logprobs = torch.log_softmax(live.held.logits(LONG)[-1], -1)
    ordered, order = logprobs.sort(descending=True)
    kept = cut.get("top_k") or int((ordered.exp().cumsum(0) < 0.5).sum()) + 1
    expected = dict(zip(order[:kept].tolist(), torch.log_softmax(ordered[:kept], -1).tolist(), strict=True))
    for completion in live.generate(LONG, range(16), **cut, max_tokens=1):
        assert completion.logprobs[0] == pytest.approx(expected[int(completion.token_ids[0])], abs=TOLERANCE)


def test_greedy_matches_hugging_face(live: LiveEngine) -> None:
    ids = list(LONG)
    for _ in range(24):
        ids.append(int(live.held.logits(ids)[-1].argmax()))
    (completion,) = live.generate(LONG, [0], temperature=0.0, ignore_eos=True)
    assert completion.token_ids.tolist() == ids[len(LONG) :]
    assert worst_difference(live, LONG, completion) <= TOLERANCE


def test_forced_lengths_hold_whatever_is_sampled(live: LiveEngine) -> None:
    forced = live.generate(LONG, [7, 8, 9], ignore_eos=True, lengths=(3, 20, 1), max_tokens=20)
    assert [len(c.token_ids) for c in forced] == [3, 20, 1]
    assert {c.finish for c in forced} == {"length"}


def test_only_the_named_stop_tokens_end_and_they_stay(live: LiveEngine) -> None:
    (free,) = live.generate([5, 6], [7], ignore_eos=True, max_tokens=60)
    ids = free.token_ids.tolist()
    assert free.finish == "length" and len(ids) == 60
    stop = ids[10]
    cut = ids.index(stop) + 1
    (stopped,) = live.generate([5, 6], [7], stop_token_ids=(stop, 127), max_tokens=60)
    assert stopped.finish == "stop" and stopped.token_ids.tolist() == ids[:cut]
    assert len(stopped.logprobs) == cut and stopped.versions[-1].end == cut


def test_end_tokens_of_the_folder_stop_by_default_and_not_beside_others(live: LiveEngine) -> None:
    free = live.generate([5, 6], range(24), max_tokens=64, ignore_eos=True)
    ended = live.generate([5, 6], range(24), max_tokens=64)
    others = live.generate([5, 6], range(24), max_tokens=64, stop_token_ids=(127,))
    hits = 0
    for a, b, c in zip(free, ended, others, strict=True):
        ids = a.token_ids.tolist()
        hits += EOS in ids
        assert b.token_ids.tolist() == ids[: ids.index(EOS) + 1 if EOS in ids else 64]
        assert b.finish == ("stop" if EOS in ids else "length") and "<|im_end|>" not in b.text
        assert c.token_ids.tolist() == ids[: ids.index(127) + 1 if 127 in ids else 64]
    assert hits > 0


def test_tokens_depend_on_the_seed_only(live: LiveEngine) -> None:
    """Alone, again, and among requests of other kinds (greedy, top-p): the same; another seed: others."""
    (alone,) = live.generate(LONG, [11], max_tokens=48)
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"top_p": 0.8}]
    others = [
        live.process.submit(
            "generate", [4 + i, 9, 30 + i], Sampling(max_tokens=40, **kinds[i % 3]), [100 + i]
        )
        for i in range(12)
    ]
    group = live.generate(LONG, [10, 11, 12, 11], max_tokens=48)
    for future in others:
        future.result(timeout=120)
    assert group[1].token_ids.tolist() == alone.token_ids.tolist() == group[3].token_ids.tolist()
    assert len({tuple(c.token_ids.tolist()) for c in group}) == 3


def test_score_and_canary_match_hugging_face(live: LiveEngine) -> None:
    live.generate(LONG, [0])  # its prefix is cached now
    sequences = [LONG, [5, 6], LONG[:40]]
    for sequence, found in zip(sequences, live.process.call("score", sequences), strict=True):
        expected = live.held.logprobs(sequence[:1], sequence[1:])
        assert found.shape == (len(sequence) - 1,)
        assert np.abs(found - expected).max() <= TOLERANCE
    reading = live.process.call("canary", sequences, LONG)
    assert len(reading.scores) == 3 and len(reading.probe_ids) == 4
    expected = live.held.logprobs(LONG, reading.probe_ids.tolist())
    assert np.abs(reading.probe_logprobs - expected).max() <= TOLERANCE


def test_streams_are_refused(live: LiveEngine) -> None:
    with pytest.raises(EngineError, match="engine 0: the layers of SGLang's models cannot be watched"):
        live.process.call("streams", LONG, False)


def test_limits_are_errors(live: LiveEngine) -> None:
    assert live.info["max_model_len"] == 512 and live.info["vocab_size"] == 128
    with pytest.raises(EngineError, match=r"prompt of 80 tokens and max_tokens=433 .* 512 tokens"):
        live.generate(LONG, [0], max_tokens=433)
    with pytest.raises(EngineError, match="use temperature=0"):
        live.generate(LONG, [0], top_k=1)
    (longest,) = live.generate(LONG, [0], max_tokens=432, ignore_eos=True)
    assert len(longest.token_ids) == 432 and worst_difference(live, LONG, longest) <= TOLERANCE
    assert len(live.process.call("score", [[5] * 511])[0]) == 510


def test_sleep_and_wake(live: LiveEngine) -> None:
    before = live.generate(LONG, [3])[0]
    live.process.call("sleep")
    with pytest.raises(EngineError, match="asleep"):
        live.generate(LONG, [3])
    live.process.call("wake", "weights")
    assert len(live.process.call("score", [[5, 6, 7]])[0]) == 2
    live.process.call("wake", "all")
    assert live.generate(LONG, [3])[0].token_ids.tolist() == before.token_ids.tolist()


def test_pause_keeps_requests(live: LiveEngine) -> None:
    (free,) = live.generate(LONG, [5], max_tokens=200, ignore_eos=True)
    live.process.call("pause")
    future = live.process.submit("generate", LONG, Sampling(max_tokens=200, ignore_eos=True), [5])
    with pytest.raises(TimeoutError):
        future.result(timeout=1)
    live.process.call("resume")
    assert future.result(timeout=120)[0].token_ids.tolist() == free.token_ids.tolist()


async def cancelled(engine: Any) -> list[int]:
    """Tokens that each of two requests had when a cancelled call had left SGLang."""
    requests = engine._core.manager.rid_to_state
    sampling = Sampling(max_tokens=400, ignore_eos=True)
    task = asyncio.create_task(engine.generate(LONG, sampling, [1, 2]))
    while len(requests) < 2:
        await asyncio.sleep(0.01)
    states = list(requests.values())
    await asyncio.sleep(0.2)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    while requests:
        await asyncio.sleep(0.01)
    assert task.cancelled()
    return [len(state.output_ids) for state in states]


def test_a_cancelled_call_is_aborted(live: LiveEngine) -> None:
    assert max(live.process.submit(cancelled).result(timeout=120)) < 400
    assert worst_difference(live, LONG, live.generate(LONG, [0])[0]) <= TOLERANCE
