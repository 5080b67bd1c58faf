"""The token-level DAPO loss with every term and metric, in plain PyTorch; the gradient is autograd's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from redone_kernels.reference.dapo import RATIO_EXPONENT_LIMIT, DapoTerms, dapo

KL_EXPONENT_LIMIT = 20.0  # verl's clamps of the k3 estimator
KL_VALUE_LIMIT = 10.0

# Entries of the metric vector, raw sums over the rows whose mask is set. The first NUM_SUMS add up over
# micro-batches and ranks, the others are combined by max. All are finite for finite inputs.
METRICS = (
    "loss",  # everything that is minimised, undivided
    "pg_loss",  # the weighted surrogate alone
    "tokens",
    "clip_high",  # tokens whose clip at 1 + clip_high counts
    "clip_low",  # tokens whose clip at 1 - clip_low counts
    "dual_clip",
    "k1_old",  # old - new, clamped: estimates KL(old || new)
    "k3_old",  # ratio - 1 - log ratio
    "kl_ref",
    "tis_weight",
    "tis_capped",  # tokens whose raw weight exceeds the cap
    "ratio",
    "entropy",
    "grad_abs",  # |d loss / d logprob|, undivided
    "nonfinite",  # rows whose mask is set and whose inputs or loss are not finite
    "rollout_diff",  # |old - rollout|
    "rollout_prob_diff",  # |exp(old) - exp(rollout)|
    "ratio_max",
    "logprob_diff_max",  # |new - old|
    "rollout_diff_max",
    "rollout_prob_diff_max",
    "tis_weight_max",  # raw, before the cap
)
NUM_SUMS = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class DapoConfig:
    """Static choices of the loss; the same meanings as the `algorithm` section of a run's configuration."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None  # > 1
    tis_cap: float | None = None  # None: no importance weight
    tis_mode: Literal["clip", "mask"] = "clip"  # clip: min(w, cap); mask: w where w <= cap, else 0
    kl_beta: float = 0.0
    kl: Literal["k1", "k2", "k3"] = "k3"
    ent_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip={self.dual_clip} must be > 1, or None for off")
        if self.tis_cap is not None and self.tis_cap <= 0:
            raise ValueError(f"tis_cap={self.tis_cap} must be > 0, or None for off")


def _kl(new: Tensor, ref: Tensor, kind: str) -> Tensor:
    """[N] Schulman's k1, k2, k3 of KL(new || ref); k3 clamped as in verl."""
    if kind == "k1":
        return new - ref
    if kind == "k2":
        return 0.5 * (new - ref).square()
    exponent = (ref - new).clamp(-KL_EXPONENT_LIMIT, KL_EXPONENT_LIMIT)
    return (exponent.exp() - exponent - 1).clamp(-KL_VALUE_LIMIT, KL_VALUE_LIMIT)


def _limit(x: Tensor) -> Tensor:
    return x.clamp(-RATIO_EXPONENT_LIMIT, RATIO_EXPONENT_LIMIT)


def _slope(
    new: Tensor,
    old: Tensor,
    adv: Tensor,
    weight: Tensor,
    terms: DapoTerms,
    ref: Tensor | None,
    cfg: DapoConfig,
) -> Tensor:
    """[N] derivative of each row by its log-probability, undivided; what autograd makes of the loss."""
    flat = terms.clipped | terms.dual_clipped | ((new - old).abs() > RATIO_EXPONENT_LIMIT)
    slope = torch.where(flat, 0.0, -adv * terms.ratio) * weight
    if ref is None:
        return slope
    gap = ref - new
    if cfg.kl == "k1":
        return slope + cfg.kl_beta
    if cfg.kl == "k2":
        return slope - cfg.kl_beta * gap
    grown = gap.clamp(-KL_EXPONENT_LIMIT, KL_EXPONENT_LIMIT).exp()
    flat = (gap.abs() > KL_EXPONENT_LIMIT) | (grown - gap - 1 > KL_VALUE_LIMIT)
    return slope + cfg.kl_beta * torch.where(flat, 0.0, 1 - grown)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss scalar with its graph, metrics [22], d loss / d logprob [N]), all in the inputs' dtype.

    All [N] floating but mask [N] bool; rows with mask False may hold anything. The loss is
    sum(w * surrogate + kl_beta * kl - ent_coef * entropy) / denom over the rows of the mask
    (DAPO 2503.14476 eq. 8; w = TIS/MIS weight pi_old / pi_rollout, no gradient).
    """
    zero = torch.zeros_like(logprob)

    def clean(x: Tensor | None) -> Tensor:
        return zero.detach() if x is None else torch.where(mask, x, zero)

    new, old, adv = clean(logprob), clean(old_logprob), clean(advantage)
    ref, ent = clean(ref_logprob), clean(entropy)
    rollout = clean(old_logprob if rollout_logprob is None else rollout_logprob)
    terms = dapo(new, old, adv, clip_low=cfg.clip_low, clip_high=cfg.clip_high, dual_clip=cfg.dual_clip)
    raw = _limit(old - rollout).exp()
    weight = torch.ones_like(new)
    capped = torch.zeros_like(mask)
    if cfg.tis_cap is not None:
        capped = raw > cfg.tis_cap
        weight = raw.clamp(max=cfg.tis_cap) if cfg.tis_mode == "clip" else torch.where(capped, 0.0, raw)
    pg = terms.loss * weight
    kl = _kl(new, ref, cfg.kl) if ref_logprob is not None else zero
    rows = torch.where(mask, pg + cfg.kl_beta * kl - cfg.ent_coef * ent, zero)
    total = rows.sum()
    grad = torch.where(
        mask, _slope(new, old, adv, weight, terms, ref if ref_logprob is not None else None, cfg), zero
    )
    log_ratio = _limit(new - old)
    probe = (new + old + adv + ref + ent + rollout) * 0 + rows * 0
    sums = [
        rows, pg * mask, mask, terms.clipped & (adv > 0), terms.clipped & (adv < 0), terms.dual_clipped,
        -log_ratio, (terms.ratio - 1 - log_ratio) * mask, kl * mask, weight * mask, capped & mask,
        terms.ratio * mask, ent, grad.abs(), probe != 0, (old - rollout).abs(),
        (old.exp() - rollout.exp()).abs() * mask,
    ]  # fmt: skip
    maxima = [
        terms.ratio * mask, (new - old).abs(), sums[15], sums[16],
        raw * mask if cfg.tis_cap is not None else zero,
    ]  # fmt: skip
    values = [s.to(logprob.dtype).sum() for s in sums]
    values += [m.max() if m.numel() else m.new_zeros(()) for m in maxima]
    return total / denom, torch.stack(values).detach(), grad.detach() / denom
