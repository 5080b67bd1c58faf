"""Policy losses: their names and clip ranges."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from redone.config.section import Section


class ClipRange(Section):
    clip_ratio_low: float = Field(0.2, ge=0, lt=1, description="Lower clip range.")
    clip_ratio_high: float = Field(0.28, ge=0, description="Upper clip range (DAPO: clip-higher).")


class DapoLoss(ClipRange):
    type: Literal["dapo"] = "dapo"
    clip_ratio_c: float | None = Field(
        None, gt=1, description="Dual clip for negative advantages; off when null."
    )


class GrpoLoss(ClipRange):
    type: Literal["grpo"] = "grpo"
    clip_ratio_high: float = Field(0.2, ge=0, description="Upper clip range.")
    clip_ratio_c: float | None = Field(
        None, gt=1, description="Dual clip for negative advantages; off when null."
    )


class DrGrpoLoss(ClipRange):
    type: Literal["dr_grpo"] = "dr_grpo"
    clip_ratio_high: float = Field(0.2, ge=0, description="Upper clip range.")
    length: int = Field(description="Constant that divides each sequence's token sum.", ge=1)


class GspoLoss(ClipRange):
    type: Literal["gspo"] = "gspo"
    clip_ratio_low: float = Field(3e-4, ge=0, lt=1, description="Lower clip range of the sequence ratio.")
    clip_ratio_high: float = Field(4e-4, ge=0, description="Upper clip range of the sequence ratio.")


class CispoLoss(ClipRange):
    type: Literal["cispo"] = "cispo"
    clip_ratio_low: float = Field(1.0, ge=0, description="Lower clip range (1.0: off).")
    clip_ratio_high: float = Field(0.28, ge=0, description="Upper clip range.")


class SftLoss(Section):
    type: Literal["sft"] = "sft"


LossConfig = Annotated[
    DapoLoss | GrpoLoss | DrGrpoLoss | GspoLoss | CispoLoss | SftLoss, Field(discriminator="type")
]
