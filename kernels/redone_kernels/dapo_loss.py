"""The token-level DAPO loss: loss, gradient and the sums behind every metric in one pass over the tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from redone_kernels import launch, reference
from redone_kernels.reference import METRICS, NUM_SUMS, DapoConfig

__all__ = ["METRICS", "NUM_SUMS", "DapoConfig", "DapoLossOut", "combine_metrics", "dapo_loss"]

_KL = {"k1": 1, "k2": 2, "k3": 3}


class DapoLossOut(NamedTuple):
    loss: Tensor  # scalar, carries the gradient of logprob and entropy
    metrics: Tensor  # [len(METRICS)] detached: raw sums, then maxima; divide after the reduction over ranks


def dapo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    denom: float,
    cfg: DapoConfig,
    *,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    entropy: Tensor | None = None,
) -> DapoLossOut:
    """sum over the mask of (w * surrogate + kl_beta * kl - ent_coef * entropy), divided by `denom`.

    All [N] of one floating dtype, contiguous, mask [N] bool; denom: loss tokens of the whole optimizer step.
    Rows with mask False may hold NaN: they reach neither values nor gradients, which are exactly 0. No host
    synchronisation, no atomics: the same inputs give the same bits. Definition: reference.dapo_loss.
    Raises ValueError for a denominator <= 0, a shape that differs, or a term without its input.
    """
    if not denom > 0:
        raise ValueError(f"denom={denom} must be > 0: the number of loss tokens of the optimizer step")
    if cfg.tis_cap is not None and rollout_logprob is None:
        raise ValueError("tis_cap needs rollout_logprob; give it or set tis_cap=None")
    if cfg.kl_beta != 0 and ref_logprob is None:
        raise ValueError("kl_beta != 0 needs ref_logprob; give it or set kl_beta=0")
    if cfg.ent_coef != 0 and entropy is None:
        raise ValueError("ent_coef != 0 needs entropy; give it or set ent_coef=0")
    named = {
        "old_logprob": old_logprob, "advantage": advantage, "mask": mask, "ref_logprob": ref_logprob,
        "rollout_logprob": rollout_logprob, "entropy": entropy,
    }  # fmt: skip
    for name, value in named.items():
        if value is not None and value.shape != logprob.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, logprob {tuple(logprob.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}; it must be bool")
    loss, metrics, _, _ = _op(
        logprob, old_logprob, advantage, mask, ref_logprob, rollout_logprob, entropy, float(denom),
        [cfg.clip_low, cfg.clip_high, cfg.dual_clip or 0.0, cfg.tis_cap or 0.0, cfg.kl_beta, cfg.ent_coef],
        cfg.tis_mode == "mask", _KL[cfg.kl],
    )  # fmt: skip
    return DapoLossOut(loss, metrics.detach())


def combine_metrics(parts: Tensor) -> Tensor:
    """[R, len(METRICS)] of micro-batches or ranks -> one vector: sums added, maxima taken."""
    return torch.cat([parts[:, :NUM_SUMS].sum(0), parts[:, NUM_SUMS:].amax(0)])


@torch.library.custom_op("redone::dapo_loss", mutates_args=())
def _op(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None,
    entropy: Tensor | None,
    denom: float,
    floats: list[float],
    tis_mask: bool,
    kl: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss [], metrics, d loss / d logprob [N], d loss / d entropy [N], or [0] where that is 0)."""
    low, high, dual, cap, beta, ent_coef = floats
    slope = logprob.new_empty(0)
    if ent_coef:
        slope = torch.where(mask, -ent_coef / denom, 0.0).to(logprob.dtype)
    if not launch.runs_triton(logprob):
        cfg = DapoConfig(
            clip_low=low, clip_high=high, dual_clip=dual or None, tis_cap=cap or None, kl_beta=beta,
            ent_coef=ent_coef, tis_mode="mask" if tis_mask else "clip", kl={v: k for k, v in _KL.items()}[kl],
        )  # fmt: skip
        loss, metrics, grad = reference.dapo_loss(
            logprob, old_logprob, advantage, mask, denom, cfg,
            ref_logprob=ref_logprob, rollout_logprob=rollout_logprob, entropy=entropy,
        )  # fmt: skip
        return loss, metrics, grad, slope
    grad = torch.empty_like(logprob, dtype=torch.float32)
    loss, metrics = _launch(
        [logprob, old_logprob, advantage, mask, ref_logprob, rollout_logprob, entropy], grad, denom, floats,
        tis_mask, kl,
    )  # fmt: skip
    return loss, metrics, grad, slope


def _launch(
    inputs: list[Tensor | None], grad: Tensor, denom: float, floats: list[float], tis_mask: bool, kl: int
) -> tuple[Tensor, Tensor]:
    from redone_kernels.jit import dapo_loss as kernels

    low, high, dual, cap, beta, ent_coef = floats
    filled = [x if x is None else x.contiguous() for x in inputs]
    new, old, advantage, mask, ref, rollout, entropy = filled
    assert new is not None
    n = new.numel()
    programs = max(-(-n // launch.DAPO_BLOCK), 1)
    part = new.new_empty(programs, launch.DAPO_WIDTH, dtype=torch.float32)
    out = new.new_empty(launch.DAPO_WIDTH, dtype=torch.float32)
    loss = new.new_empty((), dtype=torch.float32)
    kernels.dapo_loss[(programs,)](
        new, old, advantage, mask, ref, rollout, entropy, grad, part,
        n, 1.0 / denom, 1.0 - low, 1.0 + high, dual, cap, beta, ent_coef,
        HAS_DUAL=dual > 0, HAS_TIS=cap > 0, TIS_MASK=tis_mask, HAS_ROLLOUT=rollout is not None,
        KL=kl if ref is not None else 0, HAS_ENT=entropy is not None,
        BLOCK=launch.DAPO_BLOCK, WIDTH=launch.DAPO_WIDTH, **launch.DAPO_OPTIONS,
    )  # fmt: skip
    kernels.reduce_parts[(1,)](
        part, out, loss, programs, 1.0 / denom,
        SUMS=NUM_SUMS, ROWS=launch.DAPO_REDUCE_ROWS, WIDTH=launch.DAPO_WIDTH, **launch.DAPO_OPTIONS,
    )  # fmt: skip
    return loss, out[: len(METRICS)]


@_op.register_fake
def _fake(logprob: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    floats: list[float] = rest[7]
    dtype = torch.promote_types(logprob.dtype, torch.float32)
    grad = torch.empty_like(logprob, dtype=dtype)
    slope = logprob.new_empty(logprob.shape if floats[5] else (0,))
    return logprob.new_empty((), dtype=dtype), logprob.new_empty(len(METRICS), dtype=dtype), grad, slope


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2], output[3])


def _backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    grad, slope = ctx.saved_tensors
    rest = (None,) * 5
    entropy = None
    if ctx.needs_input_grad[6]:
        entropy = slope * grad_loss if slope.numel() else torch.zeros_like(grad)
    return (grad * grad_loss, *rest, entropy, None, None, None, None)


_op.register_autograd(_backward, setup_context=_save)
