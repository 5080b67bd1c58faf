"""Fits the planner's throughput constants to the published rows that are NOT held out, and reports the
errors.

python benchmarks/planner/fit.py POINTS_CSV            fit, print the constants (to paste into hardware.py)
python benchmarks/planner/fit.py POINTS_CSV --report   no fit: errors of the committed constants,
calibration | held out

Least squares on log(predicted / published) with a weak log-normal prior on every constant, centred on
PRIOR: values guessed by hand before any fit (notes/planner.md, "hand-guessed constants"). Gauss-Newton with
damping, numpy only.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np

from redone.planner.hardware import DEFAULT, Constants
from redone.planner.published import Point, read_holdout, read_points

HOLDOUT = Path(__file__).parents[2] / "redone/planner/holdout.txt"
MORE = Path(__file__).with_name("more_points.csv")  # rows that points.csv lacks; the constants never saw them
PRIOR = dict(
    gemm_dense=0.55, gemm_expert=0.40, fp8_gain=1.5, layer_floor=0.30, moe_floor=1.3, dispatch=0.6,
    network=35.0, decode_hbm=0.75, decode_step=4.0, decode_layer=15.0, decode_moe=40.0, allreduce=12.0,
    fixed=8.0, transition=6.0, overlap=0.12, stack_nemo=1.0, stack_verl=1.0, stack_skyrl=1.0, stack_tuned=0.8,
)  # fmt: skip
WIDTH = dict.fromkeys(PRIOR, math.log(1.5)) | {"stack_skyrl": math.log(4), "stack_verl": math.log(2)}
NOISE = 0.15  # two releases of one configuration differ by 7 % in the median and 18 % at the 80th percentile
STARTS = 5
HUBER = 2.0  # residuals beyond this many NOISE count linearly


def residuals(points: list[Point], constants: Constants) -> np.ndarray:
    return np.array([math.log(p.slowness(constants)) for p in points])


def calibration_rows(path: str | Path, *, more: bool = False) -> list[Point]:
    """Every row that constants may be fitted on: none of the held-out list. `more`: those of MORE as well."""
    held = read_holdout(HOLDOUT)
    return [p for p in (*read_points(path), *(read_points(MORE) if more else ())) if p.id not in held]


def fit(
    points: list[Point],
    *,
    start: Constants | None = None,
    starts: int = STARTS,
    rounds: int = 60,
    quiet: bool = False,
) -> Constants:
    """Constants that minimise the penalised errors of `points`: the best of `starts` descents.

    start: the first descent begins there instead of at PRIOR.
    """
    names = list(PRIOR)
    width = np.array([WIDTH[n] for n in names])
    centre = np.log([PRIOR[n] for n in names])
    first = centre if start is None else np.log([getattr(start, n) for n in names])
    share = np.array([1 / sum(q.job == p.job or _same(p, q) for q in points) ** 0.5 for p in points])

    def at(x: np.ndarray) -> Constants:
        return dataclasses.replace(DEFAULT, **dict(zip(names, np.exp(x).tolist(), strict=True)))

    def system(x: np.ndarray) -> np.ndarray:
        r = residuals(points, at(x)) / NOISE
        robust = np.sign(r) * np.sqrt(np.where(abs(r) < HUBER, r**2, 2 * HUBER * abs(r) - HUBER**2))
        return np.concatenate([robust * share, (x - centre) / width])

    best, lowest = first, math.inf
    rng = np.random.default_rng(0)
    for attempt in range(starts):
        away = attempt / starts * width * rng.standard_normal(len(centre))
        x, value = _descend(system, first if attempt == 0 else centre + away, rounds)
        if not quiet:
            sys.stdout.write(f"start {attempt}: objective {value:.2f}\n")
        if value < lowest:
            best, lowest = x, value
    return at(best)


def _descend(
    system: Callable[[np.ndarray], np.ndarray], x: np.ndarray, rounds: int
) -> tuple[np.ndarray, float]:
    """Gauss-Newton with damping from x: (where it ended, the sum of squares there)."""
    damping, value = 1.0, system(x)
    for _ in range(rounds):
        jacobian = np.stack([(system(x + d) - value) / 1e-4 for d in np.eye(len(x)) * 1e-4], axis=1)
        while damping < 1e7:
            step = np.linalg.solve(jacobian.T @ jacobian + damping * np.eye(len(x)), -jacobian.T @ value)
            new = system(x + step)
            if new @ new < value @ value:
                break
            damping *= 5
        else:
            break
        gain = value @ value - new @ new
        x, value, damping = x + step, new, damping / 3
        if gain < 1e-3:
            break
    return x, float(value @ value)


def _same(a: Point, b: Point) -> bool:
    """Releases of one configuration."""
    return a.job.model is b.job.model and a.job.layout == b.job.layout


def errors(points: list[Point], constants: Constants) -> np.ndarray:
    """|time predicted / published - 1|, over- and under-prediction alike measured against the published
    figure."""
    return np.array([abs(p.slowness(constants) - 1) for p in points])


def pairs(points: list[Point], constants: Constants, gap: float = 0.10) -> list[tuple[str, str, bool, bool]]:
    """(faster, slower, ordered right, different layouts or modes) of every two rows of one family and kind
    whose
    published rates differ by more than `gap`."""
    found = []
    for a, b in combinations(points, 2):
        if a.family != b.family or a.kind != b.kind:
            continue
        fast, slow = (a, b) if a.rate > b.rate else (b, a)
        if fast.rate / slow.rate > 1 + gap:
            rates = [p.rate / p.slowness(constants) for p in (fast, slow)]
            found.append((fast.id, slow.id, rates[0] > rates[1], fast.job.layout != slow.job.layout))
    return found


def show(title: str, points: list[Point], constants: Constants) -> None:
    e = errors(points, constants)
    inside = [float((e <= limit).mean()) for limit in (0.25, 0.35, 0.60)]
    sys.stdout.write(
        f"{title:12s} {len(e):3d} rows  median {np.median(e):.1%}  p80 {np.quantile(e, 0.8):.1%}"
        f"  worst {e.max():.1%}"
        f"  within 25/35/60 %: {inside[0]:.0%} {inside[1]:.0%} {inside[2]:.0%}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("points")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--rows", action="store_true", help="every row")
    args = parser.parse_args()
    held = read_holdout(HOLDOUT)
    everything = read_points(args.points)
    calibration = calibration_rows(args.points)
    constants = DEFAULT if args.report else fit(calibration)
    if not args.report:
        for name in PRIOR:
            sys.stdout.write(f"{name:14s} {getattr(constants, name):.4g}   (prior {PRIOR[name]:g})\n")
    show("calibration", calibration, constants)
    groups = [("calibration", calibration)]
    if args.report:
        for kind in ("in", "cross"):
            groups.append((f"held out {kind}", [p for p in everything if held.get(p.id) == kind]))
            show(*groups[-1], constants)
        groups.append(("later rows", read_points(MORE)))
        show(*groups[-1], constants)
        found = pairs(everything, constants)
        for title, chosen in (
            ("all rows", found),
            ("a held-out row in the pair", [f for f in found if f[0] in held or f[1] in held]),
            ("layouts or modes differ", [f for f in found if f[3]]),
            ("both", [f for f in found if f[3] and (f[0] in held or f[1] in held)]),
        ):
            sys.stdout.write(f"pairs, {title}: {sum(f[2] for f in chosen)} of {len(chosen)} ordered right\n")
            for fast, slow, right, _ in chosen:
                if not right and args.rows:
                    sys.stdout.write(f"    wrong: {fast} is faster than {slow}\n")
    if args.rows:
        for title, chosen in groups:
            for p in chosen:
                sys.stdout.write(
                    f"{title:14s} {p.id:45s} predicted/published time {p.slowness(constants):.2f}\n"
                )


if __name__ == "__main__":
    main()
