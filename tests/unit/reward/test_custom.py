"""User code in this process: what it may return, and what becomes of what it may not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from rewarding import answer, prompt

from redone.config.schema import CustomReward
from redone.reward.custom import Custom, columns
from redone.types import Score


def custom(folder: Path, body: str, **config: Any) -> Custom:
    file = folder / "mine.py"
    file.write_text(f"def compute_score(*args, **kwargs):\n    {body}\n")
    return Custom(CustomReward(path=str(file), **config))


def scored(folder: Path, body: str, **config: Any) -> Score:
    return custom(folder, body, **config).score(prompt("gold", hint=3), answer("text"))


@pytest.mark.parametrize("value", ["0", "1", "0.25", "True", "{'score': 0.5, 'seen': 2, 'why': 'x'}"])
def test_numbers_from_0_to_1_count(tmp_path: Path, value: str) -> None:
    found = scored(tmp_path, f"return {value}")
    assert found.status == "ok" and found.raw == float(eval(value)["score"] if "{" in value else eval(value))
    assert found.parts == ({"seen": 2.0} if "{" in value else {})


@pytest.mark.parametrize(
    "value",
    ["1.5", "-0.1", "float('nan')", "float('inf')", "'1'", "None", "{}", "{'score': 2}", "[1]", "10**400"],
)
def test_anything_else_is_an_error_and_no_zero(tmp_path: Path, value: str) -> None:
    assert scored(tmp_path, f"return {value}").status == "error"


def test_verl_arguments(tmp_path: Path) -> None:
    body = "return float(kwargs == dict(data_source='d', solution_str='text', ground_truth='gold', "
    assert scored(tmp_path, body + "extra_info={'hint': 3}))").raw == 1


@pytest.mark.parametrize("error", ["ValueError('my bug')", "SystemExit('my bug')"])
def test_what_it_raises_is_logged_with_its_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: str
) -> None:
    with caplog.at_level(logging.ERROR):
        assert scored(tmp_path, f"raise {error}").status == "error"
    assert "my bug" in caplog.text and "mine.py" in caplog.text and "line 2" in caplog.text


def test_trl_batches_and_columns(tmp_path: Path) -> None:
    pairs = "zip(kwargs['completions'], kwargs['ground_truth'])"
    body = f"return [float(c[0]['content'] == g) for c, g in {pairs}]"
    found = custom(tmp_path, body, form="trl").score_many(
        [prompt("a", x=1), prompt("b", y=2)], [answer("a"), answer("a")]
    )
    assert [score.raw for score in found] == [1, 0]
    names = columns([prompt("a", x=1), prompt("b", y=2)])
    assert names["x"] == [1, None] and names["y"] == [None, 2] and names["ground_truth"] == ["a", "b"]
    for body in ("return [1.0]", "return 1.0", "return '10'"):
        wrong = custom(tmp_path, body, form="trl").score_many([prompt("a")] * 2, [answer("a")] * 2)
        assert [score.status for score in wrong] == ["error", "error"]
