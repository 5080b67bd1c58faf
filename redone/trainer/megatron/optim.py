"""Megatron's distributed AdamW and the learning-rate schedule, which counts rollout steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from redone.algo.schedule import learning_rate
from redone.config.schema import OptimConfig

__all__ = ["apply", "build_optimizer", "inner_optimizers", "learning_rate", "settle", "zero_grad"]


def build_optimizer(
    models: Sequence[DistributedDataParallel],
    config: TransformerConfig,
    optim: OptimConfig,
    dtype: torch.dtype,
) -> Any:
    """AdamW with fp32 master weights and states, sharded over data-parallel ranks.

    1-D parameters have no weight decay. Weights must be loaded before: the master weights are copied here.
    """
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            clip_grad=optim.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            overlap_param_gather=optim.overlap_param_gather,
            **memory_options(optim),
        ),
        list(models),
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return optimizer


def memory_options(optim: OptimConfig) -> dict[str, Any]:
    """Fields of OptimizerConfig that say where and how states are kept."""
    options: dict[str, Any] = {}
    if optim.precision_aware:
        moments = getattr(torch, optim.moments_dtype)
        options |= {
            "use_precision_aware_optimizer": True,
            "exp_avg_dtype": moments,
            "exp_avg_sq_dtype": moments,
        }
    if optim.cpu_offload:
        options |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": optim.cpu_offload,
            "overlap_cpu_optimizer_d2h_h2d": True,
        }
    return options


def settle(models: Sequence[DistributedDataParallel]) -> None:
    """Before parameters are read or written outside of a forward pass: gather those that were updated."""
    for model in models:
        if model.ddp_config.overlap_param_gather:
            model.start_param_sync(force_sync=True)


def zero_grad(models: Sequence[DistributedDataParallel], optimizer: Any) -> None:
    for model in models:
        model.zero_grad_buffer()
    optimizer.zero_grad()


def apply(optimizer: Any, lr: float, weight_decay: float) -> tuple[bool, float]:
    """Clip and step. Returns (applied, norm before clipping); not applied when that is not finite."""
    for group in optimizer.param_groups:
        # Megatron leaves the multipliers to its scheduler; without this, norm weights would decay too.
        group["lr"] = lr * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]
    # step() would clip by a non-finite norm and write NaN into every parameter.
    if optimizer.prepare_grads():
        return False, math.nan
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm):
        return False, norm
    applied, _, _ = optimizer.step()
    return bool(applied), norm


def inner_optimizers(optimizer: Any) -> list[Any]:
    """The distributed optimizers inside Megatron's chain (dense and expert parameters)."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
