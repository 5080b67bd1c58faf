"""PyTorch references: the definition of what every kernel computes. Product code, differentiable,
fp64-capable; on CPU tensors outside Triton's interpreter they are also what runs."""

from redone_kernels.reference.dapo import (
    RATIO_EXPONENT_LIMIT,
    DapoTerms,
    clipped_surrogate,
    dapo,
    importance_ratio,
)
from redone_kernels.reference.dapo_loss import METRICS, NUM_SUMS, DapoConfig, dapo_loss
from redone_kernels.reference.fp8_blocks import FP8_MAX, pack_fp8_block
from redone_kernels.reference.linear_logprob import TokenLogprobs, linear_logprob
from redone_kernels.reference.logits import logits_backward_, logits_stats, merge_stats
from redone_kernels.reference.segment_sum import segment_sum

__all__ = [
    "FP8_MAX",
    "METRICS",
    "NUM_SUMS",
    "RATIO_EXPONENT_LIMIT",
    "DapoConfig",
    "DapoTerms",
    "TokenLogprobs",
    "clipped_surrogate",
    "dapo",
    "dapo_loss",
    "importance_ratio",
    "linear_logprob",
    "logits_backward_",
    "logits_stats",
    "merge_stats",
    "pack_fp8_block",
    "segment_sum",
]
