"""The diagnosis on answers whose causes are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from redone.algo.stats import wilson_interval
from redone.config.pipeline import DiagnoseNode
from redone.pipeline.answers import Answers
from redone.pipeline.diagnose import (
    TaskReport,
    diagnose,
    failing,
    mean_interval,
    score_constants,
)
from redone.pipeline.diagnosis_page import write_diagnosis

from .making import Rewards, answers, prompt, sample

N = 40


def node(**changes: Any) -> DiagnoseNode:
    return DiagnoseNode(evaluation="e", **changes)


def many(raws: tuple[float, ...], task: str = "t", share: float = 1.0) -> list[Answers]:
    """N prompts; the given share of them answered as `raws`, the rest all wrong."""
    return [answers(f"{task}{i}", raws if i < share * N else (0.0,) * len(raws), task) for i in range(N)]


def report(found: list[Answers], base: list[Answers] | None = None, **changes: Any) -> TaskReport:
    constants = changes.pop("constants", {})
    (only,) = diagnose(found, base, constants, node(**changes))
    return only


def test_learnable_by_rl_against_missing_knowledge() -> None:
    sometimes = report(many((1.0, 0.0, 0.0, 0.0)))
    assert sometimes.pass_at_k == 1.0 and sometimes.pass_rate == 0.25 and sometimes.informative == 1.0
    assert sometimes.verdict == "learnable by RL" and sometimes.failing
    never = report(many((0.0, 0.0, 0.0, 0.0)))
    assert never.pass_at_k == 0.0 and never.group_std == 0.0
    assert never.verdict == "missing knowledge" and never.failing
    always = report(many((1.0, 1.0)))
    assert always.verdict == "solved" and not always.failing


def test_graded_rewards_count_by_their_score() -> None:
    graded = many((0.8, 0.6))
    assert not report(graded).failing  # never `correct`, but well scored
    assert report(graded, score="pass_rate").failing
    assert report(graded).reward_scale == pytest.approx((0.6, 0.8, 0.7, 0.1))


def test_a_regression_against_base_fails_a_good_task() -> None:
    now, before = many((1.0, 1.0), share=0.7), many((1.0, 1.0))
    lost = report(now, before)
    assert lost.flags == ("regression",) and lost.failing and lost.difference is not None
    assert lost.difference[2] < 0 and lost.base_score == 1.0
    assert not report(now, now).failing


def test_a_gain_that_a_constant_explains_is_flagged() -> None:
    """SNS-Bench CHLW: `[]` alone scores more than the base model (notes of the paper, section 3.3)."""
    now = [answers(f"t{i}", (), samples=(sample("[]", raw=float(i % 3 > 0)),) * 2) for i in range(N)]
    base = many((1.0, 0.0), share=0.5)
    found = report(now, base, constants={"t": ("[]", 0.66)})
    assert "gain explained by a constant answer" in found.flags and found.failing
    kept = report(now, base, constants={"t": ("[]", 0.66)}, constant_fails=False)
    assert "gain explained by a constant answer" in kept.flags and not kept.failing
    varied = [answers(f"t{i}", (1.0, 0.0) if i % 4 else (0.0, 0.0)) for i in range(N)]
    assert (
        "gain explained by a constant answer" not in report(varied, base, constants={"t": ("[]", 0.1)}).flags
    )


def test_length_collapse_and_failed_rewards_are_flagged() -> None:
    cut = [
        answers(f"t{i}", (), samples=(sample("long", finish="length"), sample("", status="error")))
        for i in range(N)
    ]
    found = report(cut)
    assert {"answers cut by the length limit", "collapsed to one answer", "rewards failed"} <= set(
        found.flags
    )
    assert found.failed_rewards == N and found.cut == 1.0


def test_the_weakest_task_comes_first_and_weights_move_it() -> None:
    found = [
        *many((1.0, 0.0, 0.0, 0.0), "weak"),
        *many((1.0, 1.0, 0.0, 0.0, 0.0), "weaker"),
        *many((1.0,), "good"),
    ]
    ranked = diagnose(found, None, {}, node())
    assert [r.task for r in ranked] == ["weak", "weaker", "good"]
    assert [r.task for r in failing(ranked, None)] == ["weak", "weaker"]
    assert [r.task for r in failing(ranked, 1)] == ["weak"]
    assert diagnose(found, None, {}, node(weights={"weaker": 3.0}))[0].task == "weaker"


def test_slices_by_label_and_by_key() -> None:
    found = [
        answers(
            f"t{i}", (float(i % 2),), reference="ab"[i % 2], slices={"length": "short" if i < 20 else "long"}
        )
        for i in range(N)
    ]
    slices = {s.name: s for s in report(found, slices=("length",)).slices}
    assert slices["reference=b"].pass_rate == 1.0 and slices["reference=a"].pass_rate == 0.0
    assert slices["length=short"].n == 20


def test_intervals_are_wilsons_for_zero_and_one_and_narrower_for_graded_rates() -> None:
    assert mean_interval([1.0] * 3 + [0.0] * 7) == pytest.approx(wilson_interval(3, 10))
    low, high = mean_interval([0.3] * 10)
    assert high - low < 0.3 < wilson_interval(3, 10)[1] - wilson_interval(3, 10)[0]


def test_constants_are_scored_by_the_task_itself() -> None:
    prompts = [prompt(f"p{i}", reference="1" if i % 4 else "0") for i in range(20)]
    found = score_constants(prompts, many((0.0,)), Rewards(good="1"), 10)
    assert found == {"t": ("1", 1.0)}


def test_the_page_and_the_file(tmp_path: Path) -> None:
    found = [*many((1.0, 0.0), "<b>", 0.2), *many((1.0, 1.0), "fine")]
    reports = diagnose(found, many((0.0, 0.0), "fine"), {"fine": ("x", 0.5)}, node())
    write_diagnosis(tmp_path, reports, node())
    page = (tmp_path / "diagnosis.html").read_text()
    assert "&lt;b&gt;" in page and "<b>" not in page and page.count("<svg") == 2
    stored = json.loads((tmp_path / "diagnosis.json").read_text())
    assert stored["failing"] == ["<b>"] and len(stored["tasks"]) == 2
