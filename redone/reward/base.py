"""What all rewards share."""

from __future__ import annotations

import math
from collections.abc import Mapping

from redone.config.schema import RewardBase
from redone.types import Score


def make_score(
    raw: float, config: RewardBase, *, parts: Mapping[str, float] | None = None, detail: str = ""
) -> Score:
    """A Score from a raw reward; one outside [0, 1] or not finite is an error, never clamped."""
    if not (math.isfinite(raw) and 0.0 <= raw <= 1.0):
        return failed(f"the reward is {raw}; it must lie in [0, 1]")
    return Score(
        raw=raw, value=config.scale * raw, correct=raw >= config.threshold, parts=parts or {}, detail=detail
    )


def failed(detail: str) -> Score:
    """A reward that could not be computed: the rollout is dropped and counted."""
    return Score(raw=0.0, value=0.0, correct=False, detail=detail, status="error")
