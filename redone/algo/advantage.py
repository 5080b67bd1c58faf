"""Advantages of a group of responses, and the length shaping of their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from redone.config.schema import OverlongBuffer
from redone.types import FloatArray

STD_EPSILON = 1e-6  # verl's


def group_advantages(rewards: Sequence[float], estimator: Literal["grpo", "dr_grpo"]) -> FloatArray:
    """[G] fp32, one advantage per response.

    grpo: (r - mean) / (std + 1e-6) with the unbiased (n - 1) std, as verl; dr_grpo (2503.20783): r - mean.
    A group of one response has advantage 0. Raises ValueError on a non-finite reward.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"non-finite reward in {values.tolist()}")
    if len(values) < 2:
        return np.zeros(len(values), dtype=np.float32)
    centred = values - values.mean()
    if estimator == "grpo":
        centred = centred / (values.std(ddof=1) + STD_EPSILON)
    return np.asarray(centred, dtype=np.float32)


def overlong_penalty(length: int, max_response_length: int, buffer: OverlongBuffer) -> float:
    """DAPO's soft overlong punishment (2503.14476 eq. 13), <= 0, added to the reward.

    verl's reading: the buffer lies inside max_response_length, so the penalty grows linearly from 0 at
    max_response_length - buffer.len tokens to -penalty_factor at max_response_length tokens.
    """
    if not buffer.enable or buffer.len == 0:
        return 0.0
    exceed = length - (max_response_length - buffer.len)
    return min(-exceed / buffer.len * buffer.penalty_factor, 0.0)
