"""What the engine samples and reports, against the Hugging Face model of the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from redone.errors import EngineError
from tests.engines.harness import LiveEngine

TOLERANCE = 1e-5
LONG = [3 + (7 * i) % 90 for i in range(80)]  # more than two KV blocks of 32
EOS = 1


def worst_difference(
    live: LiveEngine, prompt: list[int], completion: object, temperature: float = 1.0
) -> float:
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


def test_top_p_logprobs_are_renormalised(live: LiveEngine) -> None:
    """One token: its log-probability among the smallest set that holds 0.5 of the mass."""
    logprobs = torch.log_softmax(live.held.logits(LONG)[-1], -1)
    ordered, order = logprobs.sort(descending=True)
    kept = int((ordered.exp().cumsum(0) < 0.5).sum()) + 1
    expected = dict(zip(order[:kept].tolist(), torch.log_softmax(ordered[:kept], -1).tolist(), strict=True))
    for completion in live.generate(LONG, range(16), top_p=0.5, max_tokens=1):
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
    (free,) = live.generate(LONG, [8], ignore_eos=True)
    assert free.token_ids[:20].tolist() == forced[1].token_ids.tolist(), "the length changes no token"


def test_stop_token_ends_and_stays(live: LiveEngine) -> None:
    (free,) = live.generate(LONG, [7], ignore_eos=True)
    assert free.finish == "length" and len(free.token_ids) == 24
    stop = int(free.token_ids[10])
    cut = free.token_ids.tolist().index(stop) + 1
    (stopped,) = live.generate(LONG, [7], stop_token_ids=(stop, 127))
    assert stopped.finish == "stop"
    assert stopped.token_ids.tolist() == free.token_ids.tolist()[:cut]
    assert len(stopped.logprobs) == cut and stopped.versions[-1].end == cut
    assert free.text.startswith(stopped.text) and len(stopped.text) < len(free.text)
    assert worst_difference(live, LONG, stopped) <= TOLERANCE


def test_end_tokens_of_the_folder_stop_by_default(live: LiveEngine) -> None:
    free = live.generate([5, 6], range(24), max_tokens=64, ignore_eos=True)
    ended = live.generate([5, 6], range(24), max_tokens=64)
    hits = 0
    for a, b in zip(free, ended, strict=True):
        ids = a.token_ids.tolist()
        cut = ids.index(EOS) + 1 if EOS in ids else 64
        hits += EOS in ids
        assert b.token_ids.tolist() == ids[:cut]
        assert b.finish == ("stop" if EOS in ids else "length")
        assert "<|im_end|>" not in b.text
    assert hits > 0


def test_tokens_depend_on_the_seed_only(live: LiveEngine) -> None:
    """Alone, again, and among 32 other requests: same token ids; another seed: others."""
    (alone,) = live.generate(LONG, [11], max_tokens=48)
    others = [
        live.process.submit("generate", [4 + i, 9, 30 + i], _sampling(40), [100 + i]) for i in range(32)
    ]
    group = live.generate(LONG, [10, 11, 12, 11], max_tokens=48)
    for future in others:
        future.result(timeout=60)
    assert group[1].token_ids.tolist() == alone.token_ids.tolist() == group[3].token_ids.tolist()
    assert len({tuple(c.token_ids.tolist()) for c in group}) == 3


def _sampling(max_tokens: int) -> object:
    from redone.types import Sampling

    return Sampling(max_tokens=max_tokens)


def test_concurrent_prompts_keep_their_own_results(live: LiveEngine) -> None:
    prompts = [[3 + i, 20 + i, 50] * (1 + i % 4) for i in range(24)]
    futures = [live.process.submit("generate", p, _sampling(16), [i, i + 1]) for i, p in enumerate(prompts)]
    for i, (prompt, future) in enumerate(zip(prompts, futures, strict=True)):
        completions = future.result(timeout=60)
        assert [len(c) for c in (completions,)] == [2]
        assert max(worst_difference(live, prompt, c) for c in completions) <= TOLERANCE
        assert (
            completions[0].token_ids.tolist()
            == live.generate(prompt, [i], max_tokens=16)[0].token_ids.tolist()
        )


def test_more_prefill_than_one_step_takes(live: LiveEngine) -> None:
    """48 distinct prompts of 120 tokens exceed the 4096 tokens of a step: whole prompts wait, none is cut."""
    prompts = [[3 + (i * (j + 1) + j) % 90 for j in range(120)] for i in range(48)]
    live.process.call("pause")  # so that all stand in the queue when the first step is planned
    futures = [live.process.submit("generate", p, _sampling(8), [i]) for i, p in enumerate(prompts)]
    live.process.call("resume")
    for prompt, future in zip(prompts, futures, strict=True):
        assert worst_difference(live, prompt, future.result(timeout=120)[0]) <= TOLERANCE


def test_score_is_raw_and_ignores_the_prefix_cache(live: LiveEngine) -> None:
    live.generate(LONG, [1])  # the prefix is cached now
    sequences = [LONG, LONG[:40], [9, 8]]
    for sequence, scores in zip(sequences, live.process.call("score", sequences), strict=True):
        expected = live.held.logprobs(sequence[:1], sequence[1:])
        assert scores.dtype == np.float32 and scores.shape == (len(sequence) - 1,)
        assert np.abs(scores - expected).max() <= TOLERANCE


def test_too_long_is_refused_with_numbers(live: LiveEngine) -> None:
    assert live.info["max_model_len"] == 512 and live.info["vocab_size"] == 128
    with pytest.raises(EngineError, match=r"prompt of 80 tokens and max_tokens=433 .* 512 tokens"):
        live.generate(LONG, [0], max_tokens=433)
    with pytest.raises(EngineError, match=r"sequence 0 of 512 tokens; it needs 2 to 511"):
        live.process.call("score", [[5] * 512])
    with pytest.raises(EngineError, match="refused"):
        live.generate([5], [0], stop_token_ids=(1000,))
    assert live.generate([5], [0])[0].finish in ("stop", "length")


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
    future = live.process.submit("generate", LONG, _sampling(200), [5])
    with pytest.raises(TimeoutError):
        future.result(timeout=1)
    live.process.call("resume")
    assert free.token_ids.tolist()[: len(future.result(timeout=60)[0].token_ids)] == (
        future.result()[0].token_ids.tolist()
    )
