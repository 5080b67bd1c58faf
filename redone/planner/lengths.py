"""Response lengths and how they fill micro-batches: the long tail decides both the rollout and the
packing."""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from redone.errors import ConfigError

Lengths = tuple[float, ...]  # sorted tokens; an equal share of responses each
POINTS = 512
SIGMA = 0.8  # log standard deviation where none is given; an input, not a constant of the model


@functools.cache
def truncated_lognormal(mean: float, cap: float, sigma: float) -> Lengths:
    """Quantiles of min(exp(N(mu, sigma)), cap), mu chosen so that the mean is `mean` [tokens].

    Raises ConfigError when no such distribution exists (mean above the cap).
    """
    if not 1 <= mean <= cap:
        raise ConfigError(
            f"mean response length {mean:g} lies outside 1 .. {cap:g} (data.max_response_length)"
        )
    normal = NormalDist()
    z = np.array([normal.inv_cdf((i + 0.5) / POINTS) for i in range(POINTS)])
    low, high = -5.0, 25.0
    for _ in range(60):
        mu = (low + high) / 2
        low, high = (mu, high) if np.minimum(np.exp(mu + sigma * z), cap).mean() < mean else (low, mu)
    return tuple(np.clip(np.exp(high + sigma * z), 1, cap).tolist())


def from_file(path: str | Path, cap: float) -> Lengths:
    """Observed lengths, one integer a line. Raises ConfigError on anything else."""
    try:
        values = [int(line) for line in Path(path).read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--lengths {path}: {error}; give a file with one token count a line") from error
    if not values or min(values) < 1 or max(values) > cap:
        raise ConfigError(
            f"--lengths {path}: every length must lie in 1 .. {cap:g} (data.max_response_length)"
        )
    return tuple(sorted(map(float, values)))


@functools.lru_cache(maxsize=256)
def moments(lengths: Lengths) -> tuple[float, float]:
    """(mean, mean of squares)."""
    values = np.asarray(lengths)
    return float(values.mean()), float((values**2).mean())


@functools.lru_cache(maxsize=256)
def survival(lengths: Lengths, points: int) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """(tokens, share of responses longer than that, tokens between two points) from 0 to the longest."""
    values = np.asarray(lengths)
    edges = np.linspace(0, values[-1], points + 1)[:-1]
    alive = 1 - np.searchsorted(values, edges, side="right") / len(values)
    return edges, alive, float(values[-1] / points)


def draw(lengths: Lengths, count: int) -> NDArray[np.float64]:
    """`count` lengths in a fixed random order: the distribution repeated, so that its tail is always
    there."""
    reps = -(-count // len(lengths))
    spread = np.sort(np.tile(np.asarray(lengths), reps))
    picked = spread[np.linspace(0, len(spread) - 1, count).round().astype(int)]
    return np.random.default_rng(0).permutation(picked)


@functools.cache
def microbatches(
    lengths: Lengths, prompt: float, group: int, sequences: int, budget: int, ranks: int, shared: bool
) -> tuple[int, float]:
    """(micro-batches per rank of one update, tokens per rank), cut and filled as redone.data.pack does.

    `sequences` responses of all ranks together; `shared`: a group's prompt is stored once per piece.
    """
    drawn = draw(lengths, sequences)
    if not shared:
        costs = [prompt + n for n in drawn]
    else:
        costs = []
        for first in range(0, sequences, group):
            costs += _pieces(drawn[first : first + group], prompt, budget)
        while len(costs) < ranks and max(costs) > 2 * prompt:
            costs.sort()
            whole = costs.pop() - prompt
            costs += [prompt + whole / 2] * 2
    costs.sort(reverse=True)
    total = sum(costs)
    count = -(-max(1, -(-int(total) // budget)) // ranks) * ranks
    while not _fits(costs, count, budget):
        count += ranks
    return count // ranks, total / ranks


def _pieces(lengths: NDArray[np.float64], prompt: float, budget: int) -> list[float]:
    total = float(lengths.sum())
    parts = max(1, int(-(-total // max(1.0, budget - prompt))))
    return [prompt + total / parts] * parts


def _fits(costs: Sequence[float], count: int, budget: int) -> bool:
    """Longest first into the emptiest of `count` bins. A single piece may fill a bin whatever its size."""
    loads = [0.0] * count
    for cost in costs:
        load = heapq.heappop(loads)
        if load and load + cost > budget:
            return False
        heapq.heappush(loads, load + cost)
    return True
