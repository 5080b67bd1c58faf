"""The planner's seconds against published runs: held-out rows (redone/planner/holdout.txt) test, the others
guard.

Targets are the issue's. Where the model misses one, the test states it as an expected failure with the
figure.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from redone.planner.hardware import DEFAULT
from redone.planner.published import Point, read_holdout, read_points


@pytest.fixture(scope="module")
def held(repo: Path) -> dict[str, str]:
    return read_holdout(repo / "redone/planner/holdout.txt")


@pytest.fixture(scope="module")
def points(redone_data: Path) -> list[Point]:
    return read_points(redone_data / "published-runs/points.csv")


def errors(points: list[Point]) -> np.ndarray:
    return np.array([abs(p.slowness() - 1) for p in points])


def chosen(points: list[Point], held: dict[str, str], kind: str) -> np.ndarray:
    return errors([p for p in points if held.get(p.id) == kind])


def ordered(points: list[Point]) -> list[tuple[str, str, bool]]:
    """(faster, slower, predicted so) of two rows of one stack, model line and GPU with a published gap over
    10 %."""
    found = []
    for a, b in combinations(points, 2):
        if a.family == b.family and a.kind == b.kind:
            fast, slow = (a, b) if a.rate > b.rate else (b, a)
            if fast.rate > 1.1 * slow.rate:
                found.append((fast.id, slow.id, fast.rate / fast.slowness() > slow.rate / slow.slowness()))
    return found


def test_at_least_15_configurations_are_held_out(
    repo: Path, points: list[Point], held: dict[str, str]
) -> None:
    lines = (repo / "redone/planner/holdout.txt").read_text().splitlines()
    assert sum(line.startswith(("in ", "cross ")) for line in lines) >= 15
    assert set(held) <= {p.id for p in points} and set(held.values()) == {"in", "cross"}
    calibrated = {p.family[:2] for p in points if p.id not in held}
    cross = {p.family[:2] for p in points if held.get(p.id) == "cross"}
    assert not calibrated & cross


def test_layouts_and_modes_are_ordered_right(points: list[Point], held: dict[str, str]) -> None:
    pairs = ordered(points)
    tested = [p for p in pairs if p[0] in held or p[1] in held]
    assert len(tested) >= 50
    for group in (pairs, tested):
        assert sum(p[2] for p in group) / len(group) >= 0.85


def test_held_out_rows_of_known_families(points: list[Point], held: dict[str, str]) -> None:
    e = chosen(points, held, "in")
    assert (e <= 0.25).mean() >= 0.80
    assert e.max() <= 0.60
    assert np.median(e) <= 0.18  # measured 16.6 %; the target of 12 % is below


@pytest.mark.xfail(strict=True, reason="measured 16.6 %; held-out rows were never fitted on")
def test_target_in_family_median(points: list[Point], held: dict[str, str]) -> None:
    assert np.median(chosen(points, held, "in")) <= 0.12


def test_held_out_families(points: list[Point], held: dict[str, str]) -> None:
    slow = [p.slowness() for p in points if held.get(p.id) == "cross"]
    assert max(max(s, 1 / s) for s in slow) <= 2.5
    assert np.median(np.abs(np.array(slow) - 1)) <= 0.30  # measured 28.7 %; the target of 20 % is below


@pytest.mark.xfail(strict=True, reason="measured 28.7 %; held-out rows were never fitted on")
def test_target_cross_family_median(points: list[Point], held: dict[str, str]) -> None:
    assert np.median(chosen(points, held, "cross")) <= 0.20


@pytest.mark.xfail(strict=True, reason="measured 64 % within 35 %; held-out rows were never fitted on")
def test_target_cross_family_80_percent(points: list[Point], held: dict[str, str]) -> None:
    assert (chosen(points, held, "cross") <= 0.35).mean() >= 0.80


def test_the_band_covers_75_to_95_percent(points: list[Point], held: dict[str, str]) -> None:
    width = {"in": DEFAULT.band_near, "cross": DEFAULT.band_far}
    inside = [abs(math.log(p.slowness())) <= math.log(width[held[p.id]]) for p in points if p.id in held]
    assert 0.75 <= np.mean(inside) <= 0.95


def test_calibration_rows_stay_where_the_fit_left_them(points: list[Point], held: dict[str, str]) -> None:
    e = errors([p for p in points if p.id not in held])
    assert len(e) == 26 and np.median(e) <= 0.09 and e.max() <= 0.40


def test_rows_found_later_were_never_fitted_on(repo: Path, points: list[Point], held: dict[str, str]) -> None:
    """Other layouts, GPU counts and modes of calibrated models."""
    later = read_points(repo / "benchmarks/planner/more_points.csv")
    assert len(later) == 7 and not {p.id for p in later} & ({p.id for p in points} | set(held))
    assert errors(later).max() <= 0.35


def test_engines_further_ahead_decode_more_sequences_at_once(repo: Path) -> None:
    """192 H100, 8 steps ahead, published 34.5 s. With one batch in flight an engine decodes 64 sequences and
    the prediction is twice as long."""
    (row,) = [p for p in read_points(repo / "benchmarks/planner/more_points.csv") if "async8" in p.id]
    assert row.job.work.ahead == 8 and abs(row.slowness() - 1) <= 0.10
    one = replace(row, job=replace(row.job, work=replace(row.job.work, ahead=1)))
    assert one.slowness() > 1.5
