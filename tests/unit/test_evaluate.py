"""Evaluation, paired comparison and baselines, with a fake fleet that looks up its answers."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from redone.config.schema import EvalSampling
from redone.errors import DataError
from redone.evaluate.baselines import (
    CALIBRATED,
    LABEL_LOGPROB,
    Continuations,
    constant_label,
    label_logprob,
    restrict,
)
from redone.evaluate.compare import compare
from redone.evaluate.runner import Evaluation, Item, evaluate, read_evaluation, sample_seed, sampling_of
from redone.types import (
    Completion,
    FloatArray,
    Message,
    Prompt,
    Sampling,
    Score,
    VersionSpan,
    WeightBucket,
    WeightPlan,
)

GREEDY = Sampling(temperature=0.0, max_tokens=4)
STOP = 1


def prompt(number: int, reference: object, task: str = "sentiment") -> Prompt:
    return Prompt(
        id=f"{task}-{number}",
        task=task,
        domain="sns",
        data_source=task,
        messages=(Message(role="user", content="?"),),
        token_ids=np.array([10, 10 + number], dtype=np.int32),
        reference=reference,
        reward="default",
    )


class Fleet:
    """Answers by the prompt's last token; scores a label by `bias` + `evidence` of its first token."""

    def __init__(self, answers: dict[int, str] | None = None, bias: dict[int, float] | None = None) -> None:
        self.answers = answers or {}
        self.bias = bias or {}
        self.in_flight = self.most = 0
        self.seeds: list[tuple[int, ...]] = []
        self.score_calls: list[int] = []

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Completion]:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        await asyncio.sleep(0.001)
        self.in_flight -= 1
        self.seeds.append(tuple(seeds))
        text = self.answers.get(prompt_ids[-1], "")
        completion = Completion(
            token_ids=np.zeros(3, dtype=np.int32),
            text=text.removesuffix("..."),
            logprobs=np.zeros(3, dtype=np.float32),
            finish="length" if text.endswith("...") else "stop",
            versions=(VersionSpan(version=0, start=0, end=3),),
        )
        return [completion] * len(seeds)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[FloatArray]]:
        self.score_calls.append(sum(map(len, sequences)))
        rows = []
        for sequence in sequences:
            assert sequence[-1] == STOP
            values = np.full(len(sequence) - 1, -50.0, dtype=np.float32)  # what the prompt's tokens get
            even = sequence[1] % 2 == 0
            evidence = 1.0 if (sequence[2] == 100) == even else 0.0
            values[1] = self.bias.get(sequence[2], 0.0) + evidence
            values[2:] = -0.125
            rows.append(values)
        return [rows]

    def load(self, plan: WeightPlan, buckets: Sequence[WeightBucket], version: int) -> None:
        raise AssertionError("evaluation loads no weights")

    def awake(self, what: str = "all") -> AbstractContextManager[None]:
        return nullcontext()


class Exact:
    """raw 1 for a text that ends with the reference; `broken` makes the reward fail; `half` earns 0.5."""

    async def score_group(self, prompt: Prompt, completions: Sequence[Completion]) -> list[Score]:
        return [self.score(prompt, completion) for completion in completions]

    def score(self, prompt: Prompt, completion: Completion) -> Score:
        if completion.text == "broken":
            return Score(raw=0.0, value=0.0, correct=False, status="timeout")
        right = completion.text.endswith(str(prompt.reference)) and completion.finish == "stop"
        raw = 0.5 if completion.text == "half" else float(right)
        return Score(raw=raw, value=raw, correct=right, detail=completion.text.rpartition(">")[2])


def test_items_and_summary() -> None:
    labels = ["good", "good", "good", "bad", "bad", "bad"]
    answers = {10: "good", 11: "good", 12: "Bad!", 13: "good", 14: "banana", 15: "bad..."}
    fleet = Fleet(answers)
    found = evaluate([prompt(i, x) for i, x in enumerate(labels)], fleet, Exact(), GREEDY, meta={"step": 3})
    assert [item.correct for item in found.items] == [1, 1, 0, 0, 0, 0]
    assert [item.format_errors for item in found.items] == [0, 0, 0, 0, 1, 1]
    assert [item.prompt_id for item in found.items] == [f"sentiment-{i}" for i in range(6)]
    summary = found.summary("sentiment")
    assert summary.n == 6 and summary.accuracy == pytest.approx(1 / 3)
    assert summary.interval[0] == pytest.approx(0.0968, abs=1e-3)
    assert summary.interval[1] == pytest.approx(0.7000, abs=1e-3)
    assert summary.per_class == {"bad": (3, 0.0), "good": (3, pytest.approx(2 / 3))}
    assert summary.common_answer == "good" and summary.common_share == 0.5
    assert summary.format_errors == pytest.approx(2 / 6) and summary.mean_tokens == 3


def test_a_correct_or_extracted_answer_is_no_format_error() -> None:
    prompts = [prompt(i, "good" if i < 2 else "bad") for i in range(4)]
    found = evaluate(prompts, Fleet({10: "so: good", 11: "<answer>bad", 12: "so: good"}), Exact(), GREEDY)
    assert [item.correct for item in found.items] == [1, 0, 0, 0]
    assert [item.format_errors for item in found.items] == [0, 0, 1, 1]


def test_free_text_has_no_label_set() -> None:
    found = evaluate(
        [prompt(i, f"text {i}", "reply") for i in range(3)], Fleet({10: "x", 11: "y..."}), Exact(), GREEDY
    )
    assert [item.format_errors for item in found.items] == [0, 1, 0]
    assert found.summary().per_class == {}


def test_a_failed_reward_is_no_wrong_answer() -> None:
    prompts = [prompt(i, "good") for i in range(3)]
    found = evaluate(prompts, Fleet({10: "good", 11: "broken", 12: "bad"}), Exact(), GREEDY)
    summary = found.summary()
    assert (summary.n, summary.failed, summary.accuracy) == (2, 1, 0.5)


def test_concurrency_is_bounded_and_seeds_do_not_depend_on_order() -> None:
    prompts = [prompt(i, "good") for i in range(20)]
    first, second = Fleet(), Fleet()
    sampled = replace(GREEDY, temperature=1.0)
    evaluate(prompts, first, Exact(), sampled, n=3, seed=7, concurrency=4)
    evaluate(prompts[::-1], second, Exact(), sampled, n=3, seed=7, concurrency=4)
    assert 1 < first.most <= 4
    assert sorted(first.seeds) == sorted(second.seeds) and len(set(first.seeds)) == 20
    assert all(len(set(seeds)) == 3 for seeds in first.seeds)
    assert sample_seed(7, "a", 0) == sample_seed(7, "a", 0) != sample_seed(8, "a", 0)
    assert 0 <= sample_seed(7, "a", 0) < 2**31


def test_an_engine_error_stops_the_evaluation() -> None:
    class Dead(Fleet):
        async def generate(
            self, prompt_ids: Sequence[int], sampling: Sampling, seeds: Sequence[int]
        ) -> list[Completion]:
            raise OSError("engine died")

    with pytest.raises(OSError, match="engine died"):
        evaluate([prompt(i, "good") for i in range(3)], Dead(), Exact(), GREEDY)


def test_writing_and_reading(tmp_path: Path) -> None:
    found = evaluate(
        [prompt(i, "日本") for i in range(2)], Fleet({10: "日本"}), Exact(), GREEDY, n=2, meta={"step": 1}
    )
    path = found.write(tmp_path / "evals", "val-000001")
    assert read_evaluation(path) == found
    assert sorted(p.name for p in path.parent.iterdir()) == ["val-000001.jsonl", "val-000001.summary.json"]
    summary = json.loads((path.parent / "val-000001.summary.json").read_text())
    assert summary["tasks"]["sentiment"]["accuracy"] == 0.5 and summary["meta"] == {"step": 1}


def test_mean_score_weighs_tasks_equally() -> None:
    prompts = [prompt(0, "a"), *(prompt(i, "b", "other") for i in range(1, 4))]
    assert evaluate(prompts, Fleet({10: "a"}), Exact(), GREEDY).mean_score == 0.5


def test_sampling_of() -> None:
    assert sampling_of(EvalSampling(), 24, [1, 2]) == Sampling(
        temperature=0.0, max_tokens=24, stop_token_ids=(1, 2)
    )
    assert sampling_of(EvalSampling(max_tokens=5), 24, []).max_tokens == 5


def evaluation(scores: Sequence[float], task: str = "t") -> Evaluation:
    return Evaluation(
        items=tuple(
            Item(
                prompt_id=f"{task}{i}", task=task, reference="x", outputs=("y",), finishes=("stop",),
                correct=float(s == 1), score=s,
            )
            for i, s in enumerate(scores)
        )
    )  # fmt: skip


def test_compare_binary() -> None:
    (found,) = compare(evaluation([0.0] * 10 + [1.0] * 6), evaluation([1.0] * 9 + [0.0] + [1.0] * 5 + [0.0]))
    assert (found.test, found.n, found.gained, found.lost) == ("mcnemar", 16, 9, 1)
    assert found.p_value == pytest.approx(2 * 11 / 2**10)  # two-sided binomial(10, 1/2), <= 1
    assert found.before == 6 / 16 and found.after == 14 / 16 and found.significant()
    assert found.low <= found.difference <= found.high


def test_compare_graded_and_several_tasks() -> None:
    graded = evaluation([0.5, 0.25, 0.0, 0.25] * 10)
    better = evaluation([0.75, 0.5, 0.25, 0.25] * 10)
    (found,) = compare(graded, better)
    assert found.test == "bootstrap" and found.gained == 30 and found.significant()
    assert not compare(better, graded)[0].significant()
    two = Evaluation(items=(*graded.items, *evaluation([1.0, 0.0], "u").items))
    assert [c.task for c in compare(two, two)] == ["all", "t", "u"]
    assert math.isclose(compare(two, two)[2].p_value, 1.0)


def test_compare_refuses_other_items_and_leaves_out_failures() -> None:
    with pytest.raises(ValueError, match="t2"):
        compare(evaluation([1.0, 0.0]), evaluation([1.0, 0.0, 1.0]))
    before, after = evaluation([1.0, 0.0]), evaluation([1.0, 1.0])
    broken = replace(after, items=(after.items[0], replace(after.items[1], failed=1)))
    (found,) = compare(before, broken)
    assert found.n == 1 and found.gained == 0


TEST = [prompt(i, "good" if i % 2 == 0 else "bad") for i in range(8)] + [prompt(9, "bad")]
VAL = [prompt(i, "good" if i % 2 == 0 else "bad") for i in range(20, 28)]


def encode(text: str) -> list[int]:
    return {"good": [100, 5], "bad": [101]}[text]


def test_constant_label() -> None:
    found = constant_label(TEST)
    assert found.summary().accuracy == pytest.approx(5 / 9)
    assert {item.outputs for item in found.items} == {("bad",)}


def continuations(fleet: Fleet) -> Continuations:
    """Summed log-probabilities of each label after each prompt, by the fake fleet."""

    def summed(prompts: Sequence[Prompt], labels: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        sums = []
        for p in prompts:
            scored = fleet.score([[*p.token_ids.tolist(), *ids] for ids in labels])[0]
            sums.append([float(s[len(p.token_ids) - 1 :].sum()) for s in scored])
        return np.asarray(sums)

    return summed


def test_label_logprob_reads_label_tokens_only_and_calibration_removes_the_bias() -> None:
    fleet = Fleet(bias={100: 3.0})
    found = label_logprob(TEST, VAL, continuations(fleet), encode, STOP)
    assert {item.outputs for item in found[LABEL_LOGPROB].items} == {("good",)}  # the bias hides the evidence
    assert found[LABEL_LOGPROB].summary().accuracy == pytest.approx(4 / 9)
    assert found[CALIBRATED].summary().accuracy == 1.0
    assert [c.task for c in compare(found[LABEL_LOGPROB], found[CALIBRATED])] == ["all"]


def test_label_logprob_sums_over_label_and_stop() -> None:
    # even prompts: the first token alone prefers good (0.1 to 0), the sum prefers bad (-0.15 to -0.125)
    fleet = Fleet(bias={100: -0.9})
    found = label_logprob(TEST, VAL, continuations(fleet), encode, STOP)
    assert {i.outputs for i in found[LABEL_LOGPROB].items if int(i.prompt_id[-1]) % 2 == 0} == {("bad",)}


def test_labels_come_from_validation_not_test() -> None:
    seen: list[str] = []

    def recording(text: str) -> list[int]:
        seen.append(text)
        return encode(text)

    odd = [replace(p, reference="unseen") for p in TEST[:3]] + TEST[3:]
    label_logprob(odd, VAL, continuations(Fleet()), recording, STOP)
    assert seen == ["bad", "good"]
    with pytest.raises(DataError, match="'sentiment'"):
        label_logprob(TEST, [replace(p, task="x") for p in VAL], continuations(Fleet()), encode, STOP)


def test_baselines_need_a_label_set() -> None:
    free = [prompt(i, f"text {i}", "reply") for i in range(6)]
    with pytest.raises(DataError, match=r"evaluate\.baselines"):
        constant_label(free)
    mixed = constant_label([*TEST, *free])
    assert len(mixed.items) == 9
    everything = evaluate([*TEST, *free], Fleet(), Exact(), GREEDY)
    assert compare(mixed, restrict(everything, mixed))[0].n == 9
