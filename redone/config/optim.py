"""The optimizer: AdamW, its schedule, and where and how its states are kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from redone.config.section import Section


class OptimConfig(Section):
    lr: float = Field(1e-6, gt=0, description="Peak learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Final rate of a decaying schedule.")
    lr_warmup_steps: int = Field(0, ge=0, description="Linear warm-up, in rollout steps.")
    lr_warmup_ratio: float | None = Field(
        None, ge=0, lt=1, description="Warm-up as a share of all steps, instead of lr_warmup_steps."
    )
    lr_decay_style: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Schedule after warm-up."
    )
    weight_decay: float = Field(0.1, ge=0, description="AdamW weight decay (none on 1-D parameters).")
    clip_grad: float = Field(1.0, gt=0, description="Global gradient-norm clip.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW betas.")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    overlap_grad_reduce: bool = Field(
        False, description="Reduce gradients over data-parallel ranks while the backward pass runs."
    )
    overlap_param_gather: bool = Field(
        False,
        description="Gather updated parameters while the next forward pass runs; needs overlap_grad_reduce.",
    )
    cpu_offload: float = Field(
        0.0, ge=0, le=1, description="Share of optimizer states and of its work on the host (CUDA only)."
    )
    precision_aware: bool = Field(
        False, description="TransformerEngine's AdamW with states below fp32 (CUDA only); see moments_dtype."
    )
    moments_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="With precision_aware: both moments."
    )

    @model_validator(mode="after")
    def _rates(self) -> OptimConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} exceeds lr={self.lr}; lower it")
        if self.lr_warmup_steps and self.lr_warmup_ratio is not None:
            raise ValueError(
                f"lr_warmup_steps={self.lr_warmup_steps} and lr_warmup_ratio={self.lr_warmup_ratio} exclude "
                "each other; set one"
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ValueError("overlap_param_gather=true needs overlap_grad_reduce=true; set both")
        if self.moments_dtype != "float32" and not self.precision_aware:
            raise ValueError(f"moments_dtype={self.moments_dtype} needs precision_aware=true; set it")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}; each must be >= 0 and < 1")
        return self
