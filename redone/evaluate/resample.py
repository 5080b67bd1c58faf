"""Bootstrap of scores that are functions of sums (measures.py): items are drawn, their samples together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from redone.evaluate.measures import Floats, Measure

RESAMPLES = 1000


def weights(part: str, items: int, resamples: int = RESAMPLES) -> Floats:
    """[resamples, items] how often each item is drawn. The same for two models on the same part and items."""
    rng = _generator(part, items)
    return rng.multinomial(items, np.full(items, 1 / items), size=resamples).astype(np.float64)


def scores_of(measure: Measure, numbers: Floats) -> dict[str, float]:
    """`numbers`: [samples, items, k]. Score -> value, 0..100, the main one first."""
    replicates = measure.replicates(numbers)
    each = [measure.finish(rows.sum(axis=0).tolist()) for rows in replicates]
    return {name: sum(found.get(name, 0.0) for found in each) / len(each) for name in each[0]}


def resampled(measure: Measure, numbers: Floats, drawn: Floats) -> dict[str, Floats]:
    """Score -> [resamples]."""
    replicates = measure.replicates(numbers)
    names = list(scores_of(measure, numbers))
    values = np.zeros((len(names), len(drawn)))
    for rows in replicates:
        for b, sums in enumerate((drawn @ rows).tolist()):
            found = measure.finish(sums)
            for at, name in enumerate(names):
                values[at, b] += found.get(name, np.nan) / len(replicates)
    return dict(zip(names, values, strict=True))


def interval(values: Floats) -> tuple[float, float]:
    """95 % percentile interval; resamples in which a score is not defined are left out."""
    kept = values[np.isfinite(values)]
    if not len(kept):
        return 0.0, 100.0
    low, high = np.quantile(kept, [0.025, 0.975])
    return float(low), float(high)


def swapped(measure: Measure, first: Floats, second: Floats, part: str, resamples: int) -> dict[str, Floats]:
    """Score -> [resamples] second - first after each item's answers changed sides by a coin: what the
    difference would be if the two did not differ. Valid for few items too, where a bootstrap is not."""
    a, b = measure.replicates(first), measure.replicates(second)
    if a.shape != b.shape:  # another number of samples: each item's mean stands for it
        a, b = a.mean(axis=0, keepdims=True), b.mean(axis=0, keepdims=True)
    coins = _generator(f"coins/{part}", a.shape[1]).integers(0, 2, size=(resamples, a.shape[1])).astype(float)
    names = list(scores_of(measure, first))
    values = np.zeros((len(names), resamples))
    for left, right in zip(a, b, strict=True):
        moved = coins @ (right - left)
        for sign, sums in ((1.0, right.sum(axis=0) - moved), (-1.0, left.sum(axis=0) + moved)):
            for n, row in enumerate(sums.tolist()):
                found = measure.finish(row)
                for at, name in enumerate(names):
                    values[at, n] += sign * found.get(name, np.nan) / len(a)
    return dict(zip(names, values, strict=True))


def two_sided(difference: float, by_chance: Floats) -> float:
    """Share of differences by chance that are as large, the seen one among them: never 0."""
    kept = by_chance[np.isfinite(by_chance)]
    return float((1 + int((np.abs(kept) >= abs(difference) - 1e-9).sum())) / (len(kept) + 1))


def item_means(measure: Measure, numbers: Floats) -> Floats | None:
    """[items] the value of each item (nan when it could not be scored) of a score that is their mean, else
    None."""
    if not measure.mean:
        return None
    sums = measure.replicates(numbers).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], np.nan), dtype=np.float64)


def mean_of(arrays: Mapping[str, Floats]) -> Floats:
    """[resamples] of a plain mean over columns whose items are drawn independently."""
    return np.asarray(np.stack(list(arrays.values())).mean(axis=0), dtype=np.float64)


def _generator(name: str, items: int) -> np.random.Generator:
    digest = hashlib.blake2b(f"{name}/{items}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
