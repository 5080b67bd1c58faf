from __future__ import annotations

import statistics

import numpy as np
import pytest

from redone.algo.advantage import group_advantages, overlong_penalty
from redone.algo.select import refill_count
from redone.config.schema import OverlongBuffer


def test_grpo_uses_the_unbiased_std():
    rewards = [0.0, 1.0, 1.0, 0.25]
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    expected = [(r - mean) / (std + 1e-6) for r in rewards]
    assert group_advantages(rewards, "grpo") == pytest.approx(expected, rel=1e-6)
    assert group_advantages(rewards, "grpo").dtype == np.float32


def test_dr_grpo_only_centres():
    assert group_advantages([0.0, 1.0, 2.0], "dr_grpo").tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo"])
def test_groups_without_a_signal(estimator):
    assert group_advantages([0.7], estimator).tolist() == [0.0]
    assert group_advantages([], estimator).shape == (0,)
    assert np.abs(group_advantages([0.1] * 7, estimator)).max() < 1e-8


def test_a_non_finite_reward_is_an_error():
    with pytest.raises(ValueError, match="non-finite"):
        group_advantages([0.0, float("nan")], "grpo")


def test_overlong_penalty_grows_inside_the_buffer():
    """DAPO's numbers: maximum 20,480, buffer 4,096, so that the penalty begins at 16,384."""
    buffer = OverlongBuffer(enable=True, len=4096, penalty_factor=1.0)
    found = [overlong_penalty(n, 20480, buffer) for n in (1, 16384, 16385, 18432, 20480)]
    assert found == pytest.approx([0.0, 0.0, -1 / 4096, -0.5, -1.0])
    half = OverlongBuffer(enable=True, len=10, penalty_factor=0.5)
    assert overlong_penalty(20, 20, half) == -0.5
    assert overlong_penalty(20, 20, OverlongBuffer()) == 0.0


def test_refill_count():
    assert refill_count(8, 0, 0) == 8
    assert refill_count(8, 8, 8) == 0
    assert refill_count(8, 4, 8) == 8  # 4 missing at a share of 1/2
    assert refill_count(8, 6, 8) == 3  # 2 missing at 3/4
    assert refill_count(8, 0, 8) == 8  # never more than one full batch
    assert refill_count(100, 97, 1000) == 12  # the share is taken as at least 1/4
