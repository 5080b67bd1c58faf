from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from redone.algo.stats import (
    answer_entropy,
    common_share,
    effective_sample_size,
    mcnemar_exact,
    mismatch_metrics,
    paired_bootstrap,
    wilson_interval,
)
from redone.types import Batch, TrainGroup, Trajectory


def test_wilson_published_values():
    """Newcombe 1998, table I, method 3 (Wilson without continuity correction)."""
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611)}
    for (k, n), interval in {**published, (1, 29): (0.0061, 0.1718)}.items():
        assert wilson_interval(k, n) == pytest.approx(interval, abs=5e-5)
    assert wilson_interval(29, 29)[1] == 1.0
    with pytest.raises(ValueError, match="trials"):
        wilson_interval(0, 0)


def test_wilson_solves_its_equation():
    low, high = wilson_interval(37, 120)
    for p in (low, high):
        assert abs(37 / 120 - p) == pytest.approx(1.959963984540054 * math.sqrt(p * (1 - p) / 120))


def test_mcnemar_counts_coin_flips():
    for gained, lost in product(range(6), range(6)):
        n = gained + lost
        extreme = abs(gained - lost)
        flips = [sum(bits) for bits in product((0, 1), repeat=n)]
        share = sum(abs(2 * heads - n) >= extreme for heads in flips) / len(flips)
        assert mcnemar_exact(gained, lost) == pytest.approx(share)
    assert mcnemar_exact(53, 5) == pytest.approx(3.5e-11, rel=0.02)


def test_paired_bootstrap_agrees_with_the_normal_approximation():
    rng = np.random.default_rng(1)
    before = rng.random(400)
    after = before + rng.normal(0.02, 0.3, 400)
    found = paired_bootstrap(before.tolist(), after.tolist())
    d = after - before
    half = 1.96 * d.std(ddof=1) / math.sqrt(400)
    assert found.mean == pytest.approx(d.mean())
    assert (found.low, found.high) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.1 * half)
    z = abs(d.mean()) / (half / 1.96)
    assert found.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.03)
    assert found == paired_bootstrap(before.tolist(), after.tolist())


def test_paired_bootstrap_extremes():
    same = paired_bootstrap([1.0, 0.0], [1.0, 0.0])
    assert (same.low, same.high, same.p_value) == (0.0, 0.0, 1.0)
    better = paired_bootstrap([0.0] * 9, [1.0] * 9, resamples=999)
    assert better.p_value == pytest.approx(2 / 1000)
    with pytest.raises(ValueError, match="paired"):
        paired_bootstrap([1.0], [1.0, 2.0])


def test_collapse_measures():
    assert answer_entropy(["a", "b"]) == pytest.approx(math.log(2))
    assert answer_entropy(["a", "a"]) == answer_entropy([]) == 0.0
    assert common_share(["a", "b", "a", "a"]) == 0.75
    assert common_share([]) == 0.0


def test_effective_sample_size():
    assert effective_sample_size([3.0] * 5) == pytest.approx(1.0)
    assert effective_sample_size([0.0, -1000.0]) == pytest.approx(0.5)
    w = np.array([1.0, 2.0, 4.0])
    assert effective_sample_size(np.log(w)) == pytest.approx(7**2 / 21 / 3)


def test_mismatch_metrics_look_at_loss_tokens_only():
    def batch(old):
        trajectory = Trajectory(
            token_ids=np.arange(3, dtype=np.int32),
            loss_mask=np.array([True, False, True]),
            advantages=np.zeros(3, np.float32),
            engine_logprobs=np.log(np.array([0.5, 0.9, 0.25], np.float32)),
            old_logprobs=old,
        )
        group = TrainGroup(prompt_id="p", prompt_ids=np.zeros(1, np.int32), trajectories=(trajectory,))
        return Batch.of([group])

    assert mismatch_metrics(batch(None)) == {}
    found = mismatch_metrics(batch(np.log(np.array([0.25, 0.1, 0.25], np.float32))))
    assert found["training/rollout_probs_diff_max"] == pytest.approx(0.25)
    assert found["training/rollout_probs_diff_mean"] == pytest.approx(0.125)
    assert found["training/rollout_logprobs_diff_max"] == pytest.approx(math.log(2))
    assert found["rollout_corr/kl"] == pytest.approx(math.log(2) / 2)
    assert found["rollout_corr/ess"] == pytest.approx(1.5**2 / 1.25 / 2)
