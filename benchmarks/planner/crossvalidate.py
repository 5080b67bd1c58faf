"""Cross-validates the throughput model on the calibration rows alone; the held-out rows are never read.

python benchmarks/planner/crossvalidate.py POINTS_CSV [--more] [--rows]

Three ways to leave rows out, each followed by a fresh fit to the rest: a configuration (scored where its
family keeps another one: a known family), a family (stack, model line, GPU), and a model line of NeMo RL and
Megatron-Bridge on all its GPUs (an unknown family). Releases of one configuration count once, by their mean
log error. What only single stacks have (SkyRL, verl, tuned benchmarks) cannot be predicted without a row of
that stack: such rows are scored in the first way only.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Hashable
from dataclasses import replace

import numpy as np
from fit import calibration_rows, fit, residuals

from redone.planner.hardware import Constants
from redone.planner.published import Point

SCORED = ("nemo", "bridge")


def configuration(p: Point) -> Hashable:
    """The same for all releases of one configuration."""
    same = replace(p.job.layout, logprob_batches=1.0)
    return p.job.model.layers, p.job.model.hidden, same, p.kind, p.job.work.update_sequences


def left_out(
    points: list[Point], key: Callable[[Point], Hashable], start: Constants | None, rounds: int
) -> dict[str, float]:
    """Row -> log(predicted / published time) of a fit that has seen no row with the same key. Rows whose key
    is None stay in every fit."""
    found = {}
    for group in dict.fromkeys(map(key, points)):
        if group is None:
            continue
        test = [p for p in points if key(p) == group]
        rest = [p for p in points if key(p) != group]
        constants = fit(rest, start=start, starts=1 if start else 3, rounds=rounds, quiet=True)
        found.update(zip((p.id for p in test), residuals(test, constants).tolist(), strict=True))
    return found


def summary(points: list[Point], errors: dict[str, float]) -> str:
    """Statistics over configurations."""
    groups: dict[Hashable, list[float]] = {}
    for p in points:
        if p.id in errors:
            groups.setdefault(configuration(p), []).append(errors[p.id])
    logs = np.array([np.mean(group) for group in groups.values()])
    e = np.abs(np.exp(logs) - 1)
    inside = [float((e <= limit).mean()) for limit in (0.25, 0.35)]
    return (
        f"{len(e):2d} configurations  median {np.median(e):.1%}  p80 {np.quantile(e, 0.8):.1%}"
        f"  worst {e.max():.0%}  within 25/35 %: {inside[0]:.0%} {inside[1]:.0%}"
        f"  mean |log| {np.abs(logs).mean():.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("points")
    parser.add_argument("--more", action="store_true", help="with the rows of more_points.csv")
    parser.add_argument("--rows", action="store_true", help="predicted / published time of every row")
    args = parser.parse_args()
    points = calibration_rows(args.points, more=args.more)
    full = fit(points, starts=3, quiet=True)
    plain = {p.id for p in points if p.family[0] in SCORED and p.job.layout.stack != "tuned"}

    def family(p: Point) -> Hashable:
        return p.family if p.family[0] in SCORED else None

    def line(p: Point) -> Hashable:
        return p.family[1] if p.family[0] in SCORED else None

    known = {
        p.id for p in points for q in points if p.family == q.family and configuration(p) != configuration(q)
    }
    results = {
        "fitted": dict(zip((p.id for p in points), residuals(points, full).tolist(), strict=True)),
        "configuration left out": left_out(points, configuration, full, 10),
        "family left out": left_out(points, family, full, 12),
        "model line left out": left_out(points, line, None, 40),
    }
    for title, errors in results.items():
        allowed = errors.keys() if title == "fitted" else known if "configuration" in title else plain
        kept = {row: errors[row] for row in errors if row in allowed}
        sys.stdout.write(f"{title:24s} {summary(points, kept)}\n")
    if args.rows:
        for p in points:
            cells = "  ".join(f"{math.exp(r[p.id]):.2f}" if p.id in r else "   -" for r in results.values())
            sys.stdout.write(f"{p.id:45s} {cells}\n")


if __name__ == "__main__":
    main()
