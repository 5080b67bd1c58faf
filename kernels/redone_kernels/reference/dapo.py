"""The DAPO surrogate, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RATIO_EXPONENT_LIMIT = 20.0  # e^20 is far outside any clip range and far inside fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class DapoTerms:
    """Per-token terms, all [N]; no mask and no denominator applied yet."""

    loss: Tensor  # dtype of the inputs, carries the gradient
    ratio: Tensor  # pi / pi_old, detached
    clipped: Tensor  # bool: the clip range is what counts
    dual_clipped: Tensor  # bool: the dual clip is what counts (negative advantages only)


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """exp(logprobs - old_logprobs) with the exponent clamped to +-20; the gradient is zero outside the
    clamp."""
    return torch.exp((logprobs - old_logprobs).clamp(-RATIO_EXPONENT_LIMIT, RATIO_EXPONENT_LIMIT))


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> DapoTerms:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), bounded by -dual_clip * A where A < 0.

    ratio, advantages: [N], ratio differentiable. Sources: PPO (1707.06347) eq. 7, DAPO (2503.14476) eq. 8
    with its two clip ranges, dual clip (1912.09729) eq. 5.
    """
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = torch.maximum(plain, bounded)
    clipped = (bounded > plain).detach()
    dual = torch.zeros_like(clipped)
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        negative = advantages < 0
        dual = (negative & (loss > ceiling)).detach()
        loss = torch.where(negative, torch.minimum(loss, ceiling), loss)
    return DapoTerms(loss=loss, ratio=ratio.detach(), clipped=clipped, dual_clipped=dual)


def dapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = None,
) -> DapoTerms:
    """Token terms of DAPO (2503.14476 eq. 8; RedOne 2.0 eq. 6-8). All inputs [N], one floating dtype.

    The step's loss is sum(loss * loss_mask) / (number of loss tokens of the whole optimizer step).
    """
    ratio = importance_ratio(logprobs, old_logprobs)
    return clipped_surrogate(ratio, advantages, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
