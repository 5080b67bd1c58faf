"""What a run watches itself for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from redone.config.section import Section


class CollapseConfig(Section):
    """Signs of a policy that has collapsed; each must hold for `steps` steps in a row."""

    action: Literal["warn", "stop", "off"] = Field(
        "warn", description="On a sign of collapse: say so, end the run as well, or do not look."
    )
    share: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Sign 1: the commonest answer's share of a classification task's rollouts is at least "
        "this.",
    )
    entropy_share: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Sign 2: actor/entropy is below this share of its value in the run's first step; 0: off.",
    )
    max_kl: float = Field(
        1.0,
        gt=0,
        description="Sign 3: actor/kl_loss (nat per token, against the initial weights; only there with "
        "algorithm.kl.coef > 0) is above this.",
    )
    steps: int = Field(5, ge=1, description="Steps in a row.")
