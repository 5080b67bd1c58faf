"""Policy losses over the response tokens of one micro-batch.

`policy_loss` returns this micro-batch's share of THE step's loss: the sum over micro-batches and
data-parallel ranks is the loss of the optimizer step, however the batch was cut. Sequences are never cut
across micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import torch
from redone_kernels.reference import (
    RATIO_EXPONENT_LIMIT,
    DapoTerms,
    clipped_surrogate,
    dapo,
    importance_ratio,
)
from redone_kernels.segment_sum import segment_sum
from torch import Tensor

from redone.config.schema import AlgorithmConfig, DrGrpoLoss, ImportanceConfig, LossConfig, SftLoss

WEIGHT_MEAN, WEIGHT_SQUARE = "training/rollout_weight_mean", "training/rollout_weight_square"
KL_EXPONENT_LIMIT = 20.0  # verl's clamps of the k3 estimator
KL_VALUE_LIMIT = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """Response tokens of one micro-batch; floats are fp32 (any one floating dtype works). Rows with
    loss_mask False may hold anything, NaN included: they reach neither values nor gradients."""

    logprobs: Tensor  # [N] of the policy being trained, requires grad
    entropy: Tensor | None  # [N] of the policy being trained
    old_logprobs: Tensor  # [N] trainer's, at the start of the rollout step
    engine_logprobs: Tensor  # [N] rollout engine's
    ref_logprobs: Tensor | None  # [N] reference policy's
    advantages: Tensor  # [N]
    loss_mask: Tensor  # [N] bool
    sequence_ids: Tensor  # [N] int64, index of the response within the micro-batch


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """`sums` add up over micro-batches and ranks to the step's metric, `maxima` are combined by max. All
    detached scalars except `loss`."""

    loss: Tensor
    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]


class Denominators(NamedTuple):
    tokens: int  # loss tokens of the whole optimizer step
    sequences: int  # responses with at least one loss token in the whole optimizer step


def policy_loss(
    inputs: LossInputs, algorithm: AlgorithmConfig, num_loss_tokens: int, num_sequences: int
) -> LossOutput:
    """pg loss of `algorithm.loss` + kl.coef * KL - entropy_coeff * entropy, each aggregated the way the
    loss type aggregates (see `aggregate`).

    num_loss_tokens and num_sequences are those of the whole optimizer step. Raises ValueError when a term
    of the configuration lacks its input (KL without ref_logprobs, entropy bonus without entropy) or a
    denominator is < 1.
    """
    if num_loss_tokens < 1 or num_sequences < 1:
        raise ValueError(f"a step needs loss tokens and sequences, got {num_loss_tokens} and {num_sequences}")
    over = Denominators(num_loss_tokens, num_sequences)
    masked = without_masked_rows(inputs)
    sums: dict[str, Tensor] = {}
    maxima: dict[str, Tensor] = {}

    if isinstance(algorithm.loss, SftLoss):
        loss = aggregate(-masked.logprobs, masked, algorithm.loss, over)
        sums["sft/loss"] = loss.detach()
    else:
        terms = surrogate(masked, algorithm.loss)
        weight = importance_weight(masked, algorithm.importance)
        loss = aggregate(terms.loss if weight is None else terms.loss * weight, masked, algorithm.loss, over)
        sums["actor/pg_loss"] = loss.detach()
        _policy_metrics(masked, terms, over, sums, maxima)
        if weight is not None:
            _importance_metrics(masked, algorithm.importance, weight, over, sums, maxima)

    if algorithm.kl.coef > 0:
        if masked.ref_logprobs is None:
            raise ValueError("algorithm.kl.coef > 0 needs ref_logprobs")
        kl = kl_estimate(masked.logprobs, masked.ref_logprobs, algorithm.kl.estimator)
        kl_loss = aggregate(kl, masked, algorithm.loss, over)
        loss = loss + algorithm.kl.coef * kl_loss
        sums["actor/kl_loss"] = kl_loss.detach()
    if algorithm.entropy_coeff > 0:
        if masked.entropy is None:
            raise ValueError("algorithm.entropy_coeff > 0 needs entropy")
        loss = loss - algorithm.entropy_coeff * aggregate(masked.entropy, masked, algorithm.loss, over)
    if masked.entropy is not None:
        sums["actor/entropy"] = masked.entropy.detach().sum() / over.tokens
    return LossOutput(loss=loss, sums=sums, maxima=maxima)


def without_masked_rows(inputs: LossInputs) -> LossInputs:
    """Every float of a masked row becomes 0, so that 0 * NaN and 0 * inf cannot arise, forward or
    backward."""
    mask = inputs.loss_mask
    values = {
        f.name: getattr(inputs, f.name) for f in fields(inputs) if f.name not in ("loss_mask", "sequence_ids")
    }
    return replace(
        inputs, **{k: torch.where(mask, v, torch.zeros_like(v)) for k, v in values.items() if v is not None}
    )


def aggregate(values: Tensor, inputs: LossInputs, loss: LossConfig, over: Denominators) -> Tensor:
    """[N] token terms (0 on masked rows, or masked here) -> this micro-batch's share of the step's scalar.

    dapo, cispo, sft: token sum / loss tokens of the step.
    grpo, gspo: mean over sequences of each sequence's token mean.
    dr_grpo: token sum / length / sequences of the step (2503.20783).
    """
    values = torch.where(inputs.loss_mask, values, torch.zeros_like(values))
    if loss.type in ("dapo", "cispo", "sft"):
        return values.sum() / over.tokens
    if isinstance(loss, DrGrpoLoss):
        return values.sum() / loss.length / over.sequences
    return sequence_mean(values, inputs).sum() / over.sequences


def sequence_sum(values: Tensor, inputs: LossInputs) -> Tensor:
    """[N] -> [S]: sums over each sequence's rows (masked rows must be 0), in a fixed order on any device."""
    ids = inputs.sequence_ids
    ends = torch.bincount(ids).cumsum(0)
    rows = torch.argsort(ids, stable=True)
    bounds = torch.cat([ends.new_zeros(1), ends])
    return segment_sum(values[rows], bounds, torch.ones_like(inputs.loss_mask)).sums


def sequence_mean(values: Tensor, inputs: LossInputs) -> Tensor:
    """[N] -> [S]: mean over each sequence's loss tokens; 0 for a sequence without any."""
    return sequence_sum(values, inputs) / sequence_sum(inputs.loss_mask.to(values.dtype), inputs).clamp(min=1)


def surrogate(inputs: LossInputs, loss: LossConfig) -> DapoTerms:
    """Per-token policy-gradient terms [N] of every loss type but sft."""
    match loss.type:
        case "dapo" | "grpo":
            return dapo(
                inputs.logprobs,
                inputs.old_logprobs,
                inputs.advantages,
                clip_low=loss.clip_ratio_low,
                clip_high=loss.clip_ratio_high,
                dual_clip=loss.clip_ratio_c,
            )
        case "dr_grpo":
            ratio = importance_ratio(inputs.logprobs, inputs.old_logprobs)
        case "gspo":
            ratio = sequence_ratio(inputs)
        case "cispo":
            return cispo_terms(inputs, clip_low=loss.clip_ratio_low, clip_high=loss.clip_ratio_high)
        case _:
            raise ValueError(f"algorithm.loss.type={loss.type} has no policy-gradient terms")
    return clipped_surrogate(
        ratio, inputs.advantages, clip_low=loss.clip_ratio_low, clip_high=loss.clip_ratio_high
    )


def sequence_ratio(inputs: LossInputs) -> Tensor:
    """[N] GSPO-token ratio sg[s_i] * pi / sg[pi], s_i = exp(mean log-ratio of the sequence) (2507.18071 eq.
    13)."""
    log_ratio = (inputs.logprobs - inputs.old_logprobs).detach()
    sequence = sequence_mean(log_ratio, inputs)[inputs.sequence_ids]
    exponent = inputs.logprobs - inputs.logprobs.detach() + sequence
    return torch.exp(exponent.clamp(-RATIO_EXPONENT_LIMIT, RATIO_EXPONENT_LIMIT))


def cispo_terms(inputs: LossInputs, *, clip_low: float, clip_high: float) -> DapoTerms:
    """-sg(clip(r)) A log pi (MiniMax-M1, 2506.13585 eq. 4): clipped tokens keep their gradient."""
    ratio = importance_ratio(inputs.logprobs, inputs.old_logprobs).detach()
    weight = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return DapoTerms(
        loss=-weight * inputs.advantages * inputs.logprobs,
        ratio=ratio,
        clipped=weight != ratio,
        dual_clipped=torch.zeros_like(weight, dtype=torch.bool),
    )


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """[N] estimate of KL(pi || pi_ref) from tokens of pi (Schulman's k1, k2, k3; k3 clamped as in verl).

    As a loss only k2 has the right gradient in expectation.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    exponent = (-log_ratio).clamp(-KL_EXPONENT_LIMIT, KL_EXPONENT_LIMIT)
    return (torch.exp(exponent) - exponent - 1).clamp(-KL_VALUE_LIMIT, KL_VALUE_LIMIT)


def raw_importance(inputs: LossInputs, level: Literal["token", "sequence"]) -> Tensor:
    """[N] pi_old(trainer) / pi(engine), of the token or of its whole sequence, detached."""
    log_weight = (inputs.old_logprobs - inputs.engine_logprobs).detach()
    if level == "sequence":
        log_weight = sequence_sum(log_weight, inputs)[inputs.sequence_ids]
    return torch.exp(log_weight.clamp(-RATIO_EXPONENT_LIMIT, RATIO_EXPONENT_LIMIT))


def importance_weight(inputs: LossInputs, importance: ImportanceConfig) -> Tensor | None:
    """[N] stop-gradient weight of the policy-gradient term: TIS min(w, cap), or MIS: w where w <= cap, else
    0."""
    if importance.level == "off":
        return None
    weight = raw_importance(inputs, importance.level)
    if importance.mode == "truncate":
        return weight.clamp(max=importance.cap)
    return torch.where(weight <= importance.cap, weight, torch.zeros_like(weight))


def _policy_metrics(
    inputs: LossInputs,
    terms: DapoTerms,
    over: Denominators,
    sums: dict[str, Tensor],
    maxima: dict[str, Tensor],
) -> None:
    """verl's names; every mean is over the loss tokens of the step."""
    mask, dtype = inputs.loss_mask, inputs.logprobs.dtype
    log_ratio = (inputs.logprobs - inputs.old_logprobs).detach()
    mismatch = inputs.old_logprobs - inputs.engine_logprobs
    probs_diff = (inputs.old_logprobs.exp() - inputs.engine_logprobs.exp()).abs() * mask
    sums["actor/pg_clipfrac"] = (terms.clipped & mask).to(dtype).sum() / over.tokens
    sums["actor/pg_clipfrac_lower"] = (terms.dual_clipped & mask).to(dtype).sum() / over.tokens
    sums["actor/ppo_kl"] = -log_ratio.clamp(-RATIO_EXPONENT_LIMIT, RATIO_EXPONENT_LIMIT).sum() / over.tokens
    sums["training/rollout_logprobs_diff_mean"] = mismatch.abs().sum() / over.tokens
    sums["training/rollout_probs_diff_mean"] = probs_diff.sum() / over.tokens
    found = mismatch_sums(inputs.old_logprobs, inputs.engine_logprobs, mask)
    sums |= {name: value / over.tokens for name, value in found.items()}
    maxima["actor/ratio_max"] = _max(terms.ratio * mask)
    maxima["training/rollout_logprobs_diff_max"] = _max(mismatch.abs())
    maxima["training/rollout_probs_diff_max"] = _max(probs_diff)


def mismatch_sums(old: Tensor, engine: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Token sums of [N] log-probabilities: KL(engine || trainer) estimated from the engine's samples, and the
    weight w = pi_old(trainer) / pi(engine) with its square. Rows with mask False may hold anything."""
    mismatch = torch.where(mask, old - engine, torch.zeros_like(old))
    weight = torch.exp(mismatch.clamp(-RATIO_EXPONENT_LIMIT, RATIO_EXPONENT_LIMIT)) * mask
    return {
        "training/rollout_kl_k1": -mismatch.sum(),
        "training/rollout_kl_k3": (weight - mask.to(old.dtype) - mismatch).sum(),
        WEIGHT_MEAN: weight.sum(),
        WEIGHT_SQUARE: weight.square().sum(),
    }


def with_effective_sample_size(sums: Mapping[str, float]) -> dict[str, float]:
    """The step's sums, with (mean w)^2 / mean w^2 over its loss tokens, w = pi_old(trainer) / pi(engine)."""
    found = dict(sums)
    square = found.pop(WEIGHT_SQUARE, 0.0)
    if square > 0:
        found["training/rollout_ess"] = found[WEIGHT_MEAN] ** 2 / square
    return found


def _importance_metrics(
    inputs: LossInputs,
    importance: ImportanceConfig,
    weight: Tensor,
    over: Denominators,
    sums: dict[str, Tensor],
    maxima: dict[str, Tensor],
) -> None:
    mask = inputs.loss_mask
    raw = raw_importance(inputs, "sequence" if importance.level == "sequence" else "token")
    sums["actor/importance_weight"] = (weight * mask).sum() / over.tokens
    sums["actor/importance_weight_capped"] = ((raw > importance.cap) & mask).to(raw.dtype).sum() / over.tokens
    maxima["actor/importance_weight_max"] = _max(raw * mask)


def _max(values: Tensor) -> Tensor:
    """Maximum of non-negative values; 0 for an empty micro-batch."""
    return values.detach().max() if values.numel() else values.new_zeros(())
