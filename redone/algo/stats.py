"""Statistics of evaluations and batches: intervals, paired tests, collapse and mismatch measures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from redone.types import Batch

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal
BOOTSTRAP_CHUNK = 2**22  # resampled values held at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Of a mean paired difference."""

    mean: float
    low: float
    high: float
    p_value: float  # two-sided


def wilson_interval(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a proportion. Raises ValueError unless 0 <= successes <= trials >
    0."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes in {trials} trials")
    p = successes / trials
    scale = 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / scale
    # at the ends the formula is 0 and 1 exactly, floating point is not
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == trials else centre + half


def mcnemar_exact(gained: int, lost: int) -> float:
    """Two-sided exact McNemar p-value: a fair coin among the discordant pairs (1 when there are none)."""
    if gained < 0 or lost < 0:
        raise ValueError(f"negative count: gained={gained}, lost={lost}")
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    return float(min(1.0, 2 * tail / 2**n))


def paired_bootstrap(
    before: Sequence[float], after: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """95 % percentile interval of mean(after - before) over resampled items, and its two-sided p-value.

    p = 2 min(share of means <= 0, share of means >= 0), with one imaginary resample on each side so that it
    is never 0. Raises ValueError on unpaired or empty input.
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if len(before) != len(after) or len(difference) == 0:
        raise ValueError(f"paired values needed, got {len(before)} and {len(after)}")
    n = len(difference)
    rng = np.random.default_rng(seed)
    rows = max(1, BOOTSTRAP_CHUNK // n)
    means = np.concatenate(
        [
            difference[rng.integers(0, n, size=(min(rows, resamples - start), n))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p_value = min(1.0, 2 * (tail + 1) / (resamples + 1))
    return Interval(mean=float(difference.mean()), low=float(low), high=float(high), p_value=p_value)


def effective_sample_size(log_weights: ArrayLike) -> float:
    """Kish's (sum w)^2 / sum w^2 / n, in (0, 1]; 1 when all importance weights are equal. Empty input:
    1."""
    logs = np.asarray(log_weights, dtype=np.float64)
    if logs.size == 0:
        return 1.0
    weights = np.exp(logs - logs.max())
    return float(weights.sum() ** 2 / (weights**2).sum() / weights.size)


def answer_entropy(answers: Iterable[Hashable]) -> float:
    """Entropy (nats) of the empirical distribution of answers; 0 for one single answer or none."""
    counts = np.asarray(list(Counter(answers).values()), dtype=np.float64)
    shares = counts / counts.sum() if counts.size else counts
    return float(-(shares * np.log(shares)).sum()) + 0.0


def common_share(answers: Iterable[Hashable]) -> float:
    """Share of the most frequent answer: near 1 on a multi-class task means collapse. 0 for no answers."""
    counts = Counter(answers)
    return max(counts.values()) / counts.total() if counts else 0.0


def mismatch_metrics(batch: Batch) -> dict[str, float]:
    """How far the engine's log-probabilities are from the trainer's at the start of the step (verl's
    names).

    Over loss tokens; empty when the batch has no old log-probabilities. rollout_corr/kl is the k1 estimate
    of KL(engine || trainer), rollout_corr/ess the effective sample size of the token weights.
    """
    pairs = [
        (t.old_logprobs[t.loss_mask], t.engine_logprobs[t.loss_mask])
        for group in batch.groups
        for t in group.trajectories
        if t.old_logprobs is not None
    ]
    if not pairs:
        return {}
    old = np.concatenate([a for a, _ in pairs]).astype(np.float64)
    engine = np.concatenate([b for _, b in pairs]).astype(np.float64)
    if old.size == 0:
        return {}
    probs_diff = np.abs(np.exp(old) - np.exp(engine))
    logprobs_diff = np.abs(old - engine)
    return {
        "training/rollout_probs_diff_mean": float(probs_diff.mean()),
        "training/rollout_probs_diff_max": float(probs_diff.max()),
        "training/rollout_probs_diff_std": float(probs_diff.std()),
        "training/rollout_logprobs_diff_mean": float(logprobs_diff.mean()),
        "training/rollout_logprobs_diff_max": float(logprobs_diff.max()),
        "rollout_corr/kl": float((engine - old).mean()),
        "rollout_corr/ess": effective_sample_size(old - engine),
    }
