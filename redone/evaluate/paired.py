"""Two evaluations of the same items, score by score: which differences are more than chance, and which remain
so when it is counted how many were looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from redone.algo.stats import mcnemar_exact
from redone.errors import RunFolderError
from redone.evaluate.measures import Floats, Measure, make_measure
from redone.evaluate.records import EvalFolder, Record, differences
from redone.evaluate.resample import (
    RESAMPLES,
    interval,
    item_means,
    resampled,
    scores_of,
    swapped,
    two_sided,
    weights,
)
from redone.evaluate.results import stacked
from redone.evaluate.suite import Suite

COMPARED = 10 * RESAMPLES  # a corrected p must be able to be small
AVERAGE = "average"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """B against A on the items that both have. Scores are 0..100."""

    suite: str
    what: str  # "part metric", or "table: average"
    n: int
    a: float
    b: float
    low: float  # 95 % interval of b - a
    high: float
    test: str  # "McNemar" or "permutation"
    p: float
    adjusted: float = 1.0  # Holm's, over all rows of one comparison

    @property
    def verdict(self) -> str:
        if self.adjusted < 0.05:
            return "B better" if self.b > self.a else "A better"
        return "unclear" if self.p >= 0.05 else "unclear (p < 0.05 only before correction)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """One score of both, its resampled difference, and its difference by chance: [COMPARED] each."""

    a: float
    b: float
    resampled: Floats
    by_chance: Floats
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]


def compare_folders(first: EvalFolder, second: EvalFolder) -> Paired:
    """One row per part and metric (its main score), and one per table's average.

    Raises RunFolderError when the folders share no suite, or a suite was defined differently.
    """
    a, b = first.settings(), second.settings()
    shared = [name for name in a["suites"] if name in b["suites"]]
    if not shared:
        raise RunFolderError(
            f"{first.path} has suites {', '.join(a['suites'])}, {second.path} {', '.join(b['suites'])}: "
            "there is nothing to compare"
        )
    for name in shared:
        if found := next(differences(a["suites"][name], b["suites"][name]), None):
            raise RunFolderError(
                f"suite {name} differs between the folders: {found[0]} is {found[1]!r} in {first.path}, "
                f"{found[2]!r} in {second.path}; evaluate both with the same suite"
            )
    warnings = [
        f"{key} differs: {old} in A, {new} in B; a difference may come from that"
        for key, old, new in differences(
            {k: v for k, v in a.items() if k not in ("suites", "model")},
            {k: v for k, v in b.items() if k not in ("suites", "model")},
        )
    ]
    rows: list[Difference] = []
    for name in shared:
        suite = Suite.model_validate(a["suites"][name])
        rows += compare_suite(suite, first.read(name), second.read(name), a["n"], b["n"], a, b, warnings)
    return Paired(differences=holm(rows), warnings=tuple(warnings))


def compare_suite(
    suite: Suite,
    first: Mapping[str, Record],
    second: Mapping[str, Record],
    samples_a: int,
    samples_b: int,
    settings_a: Mapping[str, Any],
    settings_b: Mapping[str, Any],
    warnings: list[str],
) -> list[Difference]:
    """Not corrected yet. `warnings` grows."""
    found: list[Difference] = []
    gaps: dict[str, Gap] = {}
    sizes = [0, 0, 0]
    for part in suite.parts:
        a = {i: r for i, r in first.items() if r.part == part.id}
        b = {i: r for i, r in second.items() if r.part == part.id}
        common = sorted(a.keys() & b.keys())
        sizes = [total + len(found_in) for total, found_in in zip(sizes, (common, a, b), strict=True)]
        if not common:
            continue
        drawn = weights(part.id, len(common), COMPARED)
        for name, metric in part.metrics.items():
            cosine = _unused if settings_a.get("embedding") and settings_b.get("embedding") else None
            pair = [
                (make_measure(metric, n, cosine), stacked([of[i] for i in common], name))
                for of, n in ((a, samples_a), (b, samples_b))
            ]
            row, per_score = _differ(suite.name, part.id, name, pair, drawn)
            found.append(row)
            if not pair[0][0].partial:
                gaps |= {f"{part.id}/{name}{score}": gap for score, gap in per_score.items()}
    if sizes[0] < max(sizes[1:]):
        warnings.append(
            f"{suite.name}: A has {sizes[1]} items, B {sizes[2]}; only the {sizes[0]} that both have are "
            "compared"
        )
    for table, columns in suite.tables.items():
        average = _average(suite.name, table, list(columns.values()), gaps)
        found += [average] if average else []
    return found


def holm(rows: Sequence[Difference]) -> tuple[Difference, ...]:
    """Holm's step-down correction (1979): the chance of any false claim among all rows stays below alpha."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].p)
    adjusted, worst = [1.0] * len(rows), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, rows[i].p * (len(rows) - rank)))
        adjusted[i] = worst
    return tuple(replace(row, adjusted=p) for row, p in zip(rows, adjusted, strict=True))


def _differ(
    suite: str, part: str, metric: str, pair: Sequence[tuple[Measure, Floats]], drawn: Floats
) -> tuple[Difference, dict[str, Gap]]:
    """The main score's row, and every score's gap ("" for the main one)."""
    (measure, numbers), (other, others) = pair
    values, values_b = scores_of(measure, numbers), scores_of(other, others)
    spread, spread_b = resampled(measure, numbers, drawn), resampled(other, others, drawn)
    chance = swapped(measure, numbers, others, part, len(drawn))
    gaps = {
        f"/{name}": Gap(
            a=values[name],
            b=values_b[name],
            resampled=spread_b[name] - spread[name],
            by_chance=chance[name],
            n=numbers.shape[1],
        )
        for name in values
        if name in values_b
    }
    main = gaps[""] = next(iter(gaps.values()))
    means, means_b = item_means(measure, numbers), item_means(other, others)
    if means is not None and means_b is not None and binary(means) and binary(means_b):
        test, p = "McNemar", mcnemar_exact(int(np.sum(means_b > means)), int(np.sum(means_b < means)))
    else:
        test, p = "permutation", two_sided(main.b - main.a, main.by_chance)
    what = f"{part} {metric}" + (" (partial)" if measure.partial else "")
    return _row(suite, what, main, test, p), gaps


def _row(suite: str, what: str, gap: Gap, test: str, p: float) -> Difference:
    low, high = interval(gap.resampled)
    return Difference(
        suite=suite, what=what, n=gap.n, a=gap.a, b=gap.b, low=low, high=high, test=test, p=p
    )  # fmt: skip


def binary(means: Floats) -> bool:
    return bool(np.isin(means, (0.0, 1.0)).all())


def _average(
    suite: str, table: str, columns: Sequence[Sequence[str]], gaps: Mapping[str, Gap]
) -> Difference | None:
    """Of the columns whose every score both evaluations have in full; None for fewer than two."""
    full = [_mean([gaps[n] for n in names]) for names in columns if all(name in gaps for name in names)]
    if len(full) < 2:
        return None
    gap = _mean(full)
    p = two_sided(gap.b - gap.a, gap.by_chance)
    return _row(suite, f"{table}: {AVERAGE} of {len(full)} columns", gap, "permutation", p)


def _mean(gaps: Sequence[Gap]) -> Gap:
    """Of scores whose items are drawn independently, or are the same items drawn together."""
    return Gap(
        a=float(np.mean([gap.a for gap in gaps])),
        b=float(np.mean([gap.b for gap in gaps])),
        resampled=np.mean([gap.resampled for gap in gaps], axis=0),
        by_chance=np.mean([gap.by_chance for gap in gaps], axis=0),
        n=sum(gap.n for gap in gaps),
    )


def _unused(first: str, second: str) -> float:
    """Cosines stand in the records; only finish() is called here."""
    raise AssertionError("a comparison scores nothing")
