"""Of every reward: finite, in range, deterministic, independent of order, on any text."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rewarding import answer, prompt

from redone.api import RewardFn
from redone.config.schema import Check, ExactReward, MetricReward, PatternReward, RewardConfig
from redone.reward.extract import fold, normalise
from redone.reward.worker import make_reward
from redone.types import Score

FORMAT = Check(kind="regex", args={"pattern": "[a-z]"})
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
    "ifeval": (
        PatternReward(score="fraction"),
        {
            "instruction_id_list": [
                "length_constraints:number_sentences",
                "change_case:capital_word_frequency",
                "detectable_format:number_highlighted_sections",
                "length_constraints:number_paragraphs",
                "combination:two_responses",
                "detectable_format:json_format",
                "startend:quotation",
            ],
            "kwargs": [
                {"num_sentences": 2},
                {"capital_frequency": 1},
                {"num_highlights": 1},
                {"num_paragraphs": 1},
            ]
            + [{}] * 3,
        },
    ),
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
