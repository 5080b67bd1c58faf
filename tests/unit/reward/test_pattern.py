"""The pattern reward: checks from configuration and row, fraction, gate; the checks beside IFEval's."""

from __future__ import annotations

from typing import Any

import pytest
from rewarding import answer, prompt

from redone.config.schema import Check, PatternReward
from redone.errors import ConfigError
from redone.reward.checks import CHECKERS
from redone.reward.pattern import Pattern
from redone.types import Score

IFEVAL = {
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{}, {"num_words": 3, "relation": "at least", "unused": None}],
}


def score(text: str, reference: Any = "", extra: dict[str, Any] | None = None, **config: Any) -> Score:
    return Pattern(PatternReward(**config)).score(prompt(reference, **(extra or {})), answer(text))


def test_ifeval_rows_strict_and_fraction() -> None:
    assert score("one two three", IFEVAL).raw == 1
    assert score("one, two, three", IFEVAL).raw == 0
    assert score("one, two, three", extra=IFEVAL, score="fraction").raw == 0.5
    assert "no_comma" in score("one, two, three", IFEVAL).detail
    assert score("Sure, so:\none two three", IFEVAL).raw == 0
    assert score("Sure, so:\none two three", IFEVAL, loose=True).raw == 1


def test_a_gate_decides_over_everything() -> None:
    checks = (
        Check(kind="regex", args={"pattern": "<think>.*</think>"}, gate=True),
        Check(kind="required", args={"words": ["cat"]}),
        Check(kind="forbidden", args={"words": ["dog"]}),
    )
    for text, expected in (
        ("<think>x</think> cat", 1),
        ("<think>x</think> cat dog", 2 / 3),
        ("cat", 0),
    ):
        assert score(text, checks=checks, score="fraction").raw == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kind", "args", "good", "bad"),
    [
        ("regex", {"pattern": r"\d+", "full": True}, "12", "12a"),
        ("regex", {"pattern": "<a>", "min": 1, "max": 1}, "<a>", "<a><a>"),
        ("regex", {"pattern": "x", "max": 0}, "y", "x"),
        (
            "json_schema",
            {"schema": {"type": "object", "required": ["a"]}},
            '```json\n{"a": 1}\n```',
            '{"b": 1}',
        ),
        ("json_schema", {}, "[1]", "[1"),
        ("required", {"words": ["Ｃat", "上海"]}, "我在上海看到 CAT", "concatenate 上海"),
        ("forbidden", {"words": ["no"]}, "I know", "oh no!"),
        ("count", {"unit": "characters", "max": 3}, "a b c", "abcd"),
        ("count", {"unit": "words", "min": 4, "max": 4}, "two words 你好", "two words 你"),
        ("count", {"unit": "sentences", "min": 2}, "很好。是的。", "很好"),
        ("count", {"unit": "lines", "max": 1}, "a\n\n", "a\nb"),
        ("count", {"unit": "paragraphs", "min": 2}, "a\n\nb", "a\nb"),
        ("language", {"language": "zh"}, "今天的天气非常好，我们去公园吧。", "The weather is nice today."),
    ],
)
def test_checks(kind: str, args: dict[str, Any], good: str, bad: str) -> None:
    assert CHECKERS[kind](good, args) and not CHECKERS[kind](bad, args)


def test_mistakes_are_errors_not_zeros() -> None:
    assert score("x").status == "error"
    assert score("x", {"instruction_id_list": ["no:such"], "kwargs": [{}]}).status == "error"
    assert score("x", {"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}).status == "error"
    assert score("x", {"checks": [{"kind": "count", "args": {"unit": "miles"}}]}).status == "error"
    assert score("x", {"checks": [{"kind": "regex", "args": {"pattern": "("}}]}).status == "error"
    with pytest.raises(ConfigError, match="no_such_check; use one of"):
        Pattern(PatternReward(checks=(Check(kind="no_such_check"),)))
    with pytest.raises(ValueError, match="pattern="):
        PatternReward(checks=(Check(kind="regex", args={"pattern": "("}),))
