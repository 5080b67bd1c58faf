"""Of every reward: finite, in range, deterministic, independent of order, on any text."""

from __future__ import annotations

import asyncio
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ifeval_pairs import PAIRS
from rewarding import answer, prompt

from redone.api import RewardFn
from redone.config.schema import (
    Check,
    CustomReward,
    ExactReward,
    JudgeConfig,
    MetricReward,
    PatternReward,
    RewardConfig,
    SandboxReward,
)
from redone.reward.extract import fold, normalise
from redone.reward.judge import JudgeItem, LlmJudge
from redone.reward.worker import make_reward
from redone.types import Score

FORMAT = Check(kind="regex", args={"pattern": "[a-z]"})
CHECKS = (
    Check(kind="regex", args={"pattern": "[a-z]+", "min": 1, "max": 9}),
    Check(kind="json_schema", args={}),
    Check(kind="required", args={"words": ["Yes", "也许"]}),
    Check(kind="forbidden", args={"words": ["b", "😂"]}),
    *(
        Check(kind="count", args={"unit": unit, "min": 1, "max": 9})
        for unit in ("characters", "words", "sentences", "lines", "paragraphs")
    ),
    Check(kind="language", args={"language": "zh"}),
)
FIRST = {name: args for name, args, _, _ in reversed(PAIRS)}
IFEVAL = {"instruction_id_list": list(FIRST), "kwargs": list(FIRST.values())}
USER = str(Path(__file__).with_name("user_rewards.py"))
SCHEMA = Check(kind="json_schema", args={"schema": {"type": "object"}})
CASES: dict[str, tuple[RewardConfig, Any]] = {
    "text": (ExactReward(), "上海 or Paris"),
    "tag": (ExactReward(extract="tag"), "yes"),
    "box": (ExactReward(extract="box"), "yes"),
    "number": (ExactReward(answer="number"), "-3.5"),
    "choice": (ExactReward(answer="choice", labels=("Yes", "No", "也许")), "也许"),
    "labels": (ExactReward(answer="labels", labels=("a", "b", "c")), ["a", "b"]),
    "metric": (MetricReward(metrics=("bleu", "chrf", "chrf++")), "今天天气真好 yyds😂"),
    "rouge": (MetricReward(metrics=("rouge1", "rougeL"), max_length_ratio=3), "the cat sat on the mat"),
    "pattern": (PatternReward(checks=(FORMAT, SCHEMA), score="fraction"), ""),
    "metric-zh": (
        MetricReward(metrics=("bleu", "chrf++", "rouge1", "rouge2", "rougeL"), max_length_ratio=20),
        "今天天气真好 yyds😂",
    ),
    "checks": (PatternReward(checks=CHECKS, score="fraction"), ""),
    "ifeval": (PatternReward(score="fraction"), IFEVAL),
    "ifeval-loose": (PatternReward(score="fraction", loose=True), IFEVAL),
    "custom": (CustomReward(path=USER), "a"),
}
REWARDS: dict[str, RewardFn] = {name: make_reward(config) for name, (config, _) in CASES.items()}
PIECES = [
    "<answer>",
    "</answer>",
    "\\boxed{",
    "}",
    "[",
    "]",
    "'",
    '"',
    "a",
    "b",
    "Yes",
    "也许",
    "-3.5",
    "1e9",
    "/0",
]
PIECES += [
    "😂",
    "\u200d",
    "\ud800",
    "\0",
    "\u0345",
    "ﬁ",
    "½",
    "İ",
    "```",
    "***",
    "{",
    ":",
    ",",
    "，",
    "\n",
    " ",
    "%",
]
TEXTS = st.one_of(
    st.text(alphabet=st.characters(), max_size=60),
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
)
LONG = ["x" * 100_000, "<answer>" * 12_500, "[" * 100_000, "9" * 100_000, "\\boxed{" * 14_000, "好" * 100_000]
LONG += ["a " * 50_000, "😂" * 100_000, ("Yes, " * 20_000), "*" * 100_000, "-\n" * 50_000, '{"a":' * 20_000]


def score(name: str, text: str) -> Score:
    return REWARDS[name].score(prompt(CASES[name][1]), answer(text))


def check(found: Score) -> None:
    assert found.status == "ok", found.detail
    assert math.isfinite(found.raw) and 0 <= found.raw <= 1
    assert found.correct == (found.raw >= 1) and found.value == found.raw
    assert all(math.isfinite(value) for value in found.parts.values())


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=40)
@given(text=TEXTS)
def test_any_text(name: str, text: str) -> None:
    first = score(name, text)
    check(first)
    assert score(name, text) == first


@pytest.mark.parametrize("name", CASES)
def test_empty_and_very_long_texts(name: str) -> None:
    for text in ("", " ", *LONG):
        check(score(name, text))


@settings(max_examples=15)
@given(texts=st.lists(TEXTS, min_size=2, max_size=8), seed=st.integers(0, 99))
def test_order_does_not_matter(texts: list[str], seed: int) -> None:
    order = random.Random(seed).sample(range(len(texts)), len(texts))
    for name in CASES:
        forward = [score(name, text).raw for text in texts]
        shuffled = {i: score(name, texts[i]).raw for i in order}
        assert forward == [shuffled[i] for i in range(len(texts))]


class Talker:
    """A judge's client (ours) that says the same to every question."""

    def __init__(self, text: str) -> None:
        self.text = text

    async def ask(self, body: Any) -> str:
        return self.text


VERDICTS = st.one_of(
    TEXTS,
    st.sampled_from(["Score: ", "**Verdict:** ", '{"score": ', "tie", "A"]).flatmap(
        lambda start: st.one_of(TEXTS, st.integers().map(str), st.floats().map(str)).map(
            lambda end: start + end
        )
    ),
)


@settings(max_examples=40)
@given(said=VERDICTS, texts=st.lists(TEXTS, min_size=2, max_size=4), structured=st.booleans())
def test_a_judge_on_any_text_that_says_anything(said: str, texts: list[str], structured: bool) -> None:
    items = [JudgeItem(prompt=prompt("reference"), completion=answer(text)) for text in texts]
    for mode in ("pointwise", "pairwise"):
        judge = LlmJudge(JudgeConfig(base_url="http://judge/v1", model="m", mode=mode, structured=structured))
        found = asyncio.run(judge.score_with(Talker(said), items))
        for one in found:
            assert (one.score is None) == (one.status != "ok")
            assert one.score is None or (math.isfinite(one.score) and 0 <= one.score <= 1)
        again = asyncio.run(judge.score_with(Talker(said), items[::-1]))
        assert [one.score for one in found] == [one.score for one in again[::-1]]


@pytest.fixture(scope="module")
def sandbox() -> RewardFn:
    return make_reward(SandboxReward(wall_s=30))


@pytest.mark.parametrize("text", ["", *LONG, "😂\ud800\0"], ids=lambda text: repr(text[:6]))
def test_a_sandbox_on_any_program(sandbox: RewardFn, text: str) -> None:
    for wrapped in (text, f"```python\n{text}\n```"):
        found = sandbox.score(prompt(["assert one() == 1"]), answer(wrapped))
        check(found)
        assert found.raw == 0


@given(text=TEXTS)
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert fold(fold(text)) == fold(text)
    assert normalise(normalise(text)) == normalise(text)


@settings(max_examples=10)
@given(text=st.text(min_size=1, max_size=40).filter(lambda t: bool(t.strip())))
def test_the_reference_is_always_right(text: str) -> None:
    exact = make_reward(ExactReward()).score(prompt(text), answer(text))
    assert exact.raw == 1
    if fold(text):
        assert make_reward(MetricReward()).score(prompt(text), answer(text)).raw == 1
