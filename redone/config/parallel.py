"""How the trainer is cut over ranks, and what is particular to mixture-of-experts models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from redone.config.section import Section


class ParallelConfig(Section):
    tensor: int = Field(1, ge=1, description="Tensor parallel size (sequence parallel with it).")
    pipeline: int = Field(1, ge=1, description="Pipeline parallel size.")
    virtual_pipeline: int = Field(
        1, ge=1, description="Model chunks per pipeline stage (interleaved schedule; smaller bubble)."
    )
    context: int = Field(
        1, ge=1, description="Context parallel size: ranks that share the tokens of every micro-batch."
    )
    expert: int = Field(1, ge=1, description="Expert parallel size.")
    expert_tensor: int = Field(1, ge=1, description="Tensor parallel size inside experts.")


class MoeConfig(Section):
    """Mixture-of-experts choices; without meaning for dense models. Tokens are never dropped."""

    load_balancing: Literal["none", "aux_loss", "expert_bias"] = Field(
        "none",
        description="aux_loss: Switch loss per micro-batch, tokens weighted by their multiplicity."
        " expert_bias (loss-free) needs a sigmoid router, which no supported family has: refused.",
    )
    aux_loss_coeff: float = Field(1e-3, gt=0, description="Coefficient of aux_loss.")
    router_fp32: bool = Field(True, description="Router logits in fp32, whatever model.dtype is.")
    dispatcher: Literal["alltoall", "deepep", "hybridep"] = Field(
        "alltoall",
        description="How tokens reach their experts. deepep, hybridep: DeepEP's kernels (CUDA only; need"
        " router_fp32 and expert or expert_tensor > 1).",
    )
    routing_replay: Literal["auto", "engine", "trainer", "off"] = Field(
        "auto",
        description="Expert choices the trainer repeats. engine (R3): those of the rollout, which vLLM then"
        " returns; trainer (R2): those of its own old-log-probability pass; auto: engine with vLLM, trainer"
        " with SGLang.",
    )
