"""What a run watches itself for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from redone.config.section import Section


class CollapseConfig(Section):
    action: Literal["warn", "stop", "off"] = Field(
        "warn", description="When a classification task's rollouts are one answer: say so, or end the run."
    )
    share: float = Field(0.95, gt=0, le=1, description="Share of the commonest answer from which it counts.")
    steps: int = Field(5, ge=1, description="Steps in a row.")
