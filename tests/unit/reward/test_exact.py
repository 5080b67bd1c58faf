"""Exact match: spelling that does not matter, and every way of naming more than one answer."""

from __future__ import annotations

from typing import Any

import pytest
from rewarding import answer, prompt

from redone.config.schema import ExactReward
from redone.reward.exact import Exact, the_number


def raw(
    text: str, reference: Any, finish: Any = "stop", extra: dict[str, Any] | None = None, **config: Any
) -> float:
    score = Exact(ExactReward(**config)).score(prompt(reference, **(extra or {})), answer(text, finish))
    assert score.status == "ok", score.detail
    return score.raw


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("Yes", "yes", 1),
        (" ＹＥＳ。 ", "Yes", 1),
        ("“美食”！", "美食", 1),
        ("美食类", "美食", 0),
        ("Rock  &\nroll", "rock & roll", 1),
        ("...", "!", 0),
        ("", "", 1),
        ("42", 42, 1),
        ("b", ["a", "b"], 1),
        ("a, b", ["a", "b"], 0),
        ("１２％", "12%", 1),
    ],
)
def test_text(text: str, reference: Any, expected: int) -> None:
    assert raw(text, reference) == expected


@pytest.mark.parametrize(
    ("text", "config", "expected"),
    [
        ("<answer>no</answer> so <answer>yes</answer>", {"extract": "tag"}, 1),
        ("<answer>yes</answer> so <answer>no</answer>", {"extract": "tag"}, 0),
        ("<answer>a</answer> yes </answer>", {"extract": "tag"}, 0),
        ("yes", {"extract": "tag"}, 0),
        ("no\n\nyes\n \n", {"extract": "last_line"}, 1),
        (r"so \boxed{no} or \boxed{\text{yes}}", {"extract": "box"}, 0),
        (r"\boxed{no}, \boxed{yes}", {"extract": "box"}, 1),
        (r"\boxed{yes", {"extract": "box"}, 0),
        ("yes no", {}, 0),
    ],
)
def test_extraction(text: str, config: dict[str, Any], expected: int) -> None:
    assert raw(text, "yes", **config) == expected


def test_unfinished_and_unusable() -> None:
    assert raw("yes", "yes", finish="length") == 0
    assert raw("yes", "yes", finish="length", require_stop=False) == 1
    assert Exact(ExactReward()).score(prompt({"a": 1}), answer("x")).status == "error"
    assert Exact(ExactReward()).score(prompt([]), answer("x")).status == "error"
    assert Exact(ExactReward(answer="number")).score(prompt("none"), answer("1")).status == "error"


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("The answer is $1,234.50.", "1234.5", 1),
        ("so we get\n#### 18", "9 * 2 = 18\n#### 18", 1),
        ("50%", "0.5", 1),
        ("1/2", 0.5, 1),
        ("3.0", 3, 1),
        ("−3", "-3", 0),  # U+2212 is no ASCII sign: read as 3
        ("-1, 0, 1, 2, 3", "-1", 0),
        ("3 or 4", "3", 0),
        ("3 ... 3", "3", 1),
        ("none", "3", 0),
        ("1/0", "3", 0),
        ("1e9999", "3", 0),
        ("9" * 100_000, "9", 0),
        ("x3", "3", 0),
        ("0.30000001", "0.3", 1),
        ("0.3001", "0.3", 0),
    ],
)
def test_number(text: str, reference: Any, expected: int) -> None:
    assert raw(text, reference, answer="number") == expected


def test_the_number_is_exact() -> None:
    assert the_number("12345678901234567890.1") != the_number("12345678901234567890.2")


CITIES = {"choices": ["Paris", "New York", "York", "上海"]}


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("B", "New York", 1),
        ("(b)", "New York", 1),
        ("B. New York", "New York", 1),
        ("new york", "B", 1),
        ("I think it is New York.", "B", 1),
        ("York", "New York", 0),
        ("答案是上海", "D", 1),
        ("Answer: C", "York", 1),
        ("A B C D", "A", 0),
        ("Paris, New York, York, 上海", "A", 0),
        ("A or B", "A", 0),
        ("Paris or B", "Paris", 1),  # one label is named; a letter beside it is text
        ("London", "Paris", 0),
        ("", "Paris", 0),
    ],
)
def test_choice(text: str, reference: str, expected: int) -> None:
    assert raw(text, reference, extra=CITIES, answer="choice") == expected


def test_choice_of_words_and_letters() -> None:
    assert raw("the answer is no.", "No", answer="choice", labels=("Yes", "No")) == 1
    assert raw("I do not know", "No", answer="choice", labels=("Yes", "No")) == 0
    assert raw("Yes and No", "No", answer="choice", labels=("Yes", "No")) == 0
    assert raw("answer (C)", "C", answer="choice", labels=("A", "B", "C", "D")) == 1
    assert raw("A, B, C, D", "C", answer="choice", labels=("A", "B", "C", "D")) == 0
    assert Exact(ExactReward(answer="choice")).score(prompt("A"), answer("A")).status == "error"
    unknown = Exact(ExactReward(answer="choice", labels=("a", "b"))).score(prompt("z"), answer("a"))
    assert unknown.status == "error"


FOUR = {"choices": ["a", "b", "c", "d"]}


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("a, b", ["a", "b"], 1),
        ("B，A", "a,b", 1),
        ("a", ["a", "b"], 2 / 3),
        ("a, x", ["a", "b"], 0.5),
        ("['a', 'b']", ["a", "b"], 1),
        ('["a"]', ["a"], 1),
        ("[]", [], 1),
        ("", [], 1),
        ("a", [], 0),
        ("[]", ["a"], 0),
        ("a, b, c, d", ["a"], 0),
        ("a, b, c, d", ["a", "b", "c"], 0),
        ("a, b, c, d", ["a", "b", "c", "d"], 1),
        ("a, a, a, a, a", ["a", "b"], 0),
        ("[__import__('os').system('true')]", ["a"], 0),
    ],
)
def test_labels(text: str, reference: Any, expected: float) -> None:
    assert raw(text, reference, extra=FOUR, answer="labels") == pytest.approx(expected)


def test_listing_every_label_of_a_large_open_set_earns_nothing() -> None:
    everything = ", ".join(f"tag{i}" for i in range(50))
    assert raw(everything, ["tag3", "tag7"], answer="labels") == 0
    assert raw("[" * 5000 + "]" * 5000, ["a"], answer="labels") == 0
