"""The head's matrix kernels as operators: `linear_stats` (forward) and `linear_dlogits` (gradient)."""

from __future__ import annotations

import torch
from torch import Tensor

from redone_kernels import launch
from redone_kernels.reference.logits import LOG2E

__all__ = ["linear_dlogits", "linear_stats"]


def _check(hidden: Tensor) -> None:
    if not launch.runs_triton(hidden):
        raise ValueError(
            f"the fused head needs a CUDA device and bf16 or fp32, got {hidden.device} {hidden.dtype};"
            " use backend 'chunked' (or TRITON_INTERPRET=1 for a slow run on CPU)"
        )


@torch.library.custom_op("redone::linear_stats", mutates_args=())
def linear_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    vocab_start: int,
    real: int,
    split: int,
    temperature: float,
    entropy: bool,
) -> Tensor:
    """[S, 4, N] fp32 statistics (see reference.logits) of hidden [N, H] @ weight [V_local, H].T.

    No logits are stored. S = ceil(V_local / split). Without `entropy` the third statistic is 0.
    """
    _check(hidden)
    from redone_kernels.jit import linear_logprob as kernels

    n, h = hidden.shape
    splits = max(-(-weight.shape[0] // split), 1)
    parts = hidden.new_empty(splits, 4, n, dtype=torch.float32)
    if n:
        config = launch.tile(launch.STATS_TILES, hidden)
        launch.allow_descriptors(hidden.device)
        kernels.linear_stats[(-(-n // config.rows), splits)](
            hidden, weight, target, parts, n, weight.shape[0], real, split, vocab_start, LOG2E / temperature,
            H=h, ENT=entropy, UP=launch.INTERPRET, **config.constants(), **config.options(),
        )  # fmt: skip
    return parts


@linear_stats.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    vocab_start: int,
    real: int,
    split: int,
    temperature: float,
    entropy: bool,
) -> Tensor:
    splits = max(-(-weight.shape[0] // split), 1)
    return hidden.new_empty(splits, 4, hidden.shape[0], dtype=torch.float32)


@torch.library.custom_op("redone::linear_dlogits", mutates_args=())
def linear_dlogits(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    first: int,
    width: int,
    vocab_start: int,
    real: int,
    temperature: float,
) -> Tensor:
    """[N, width] in hidden's dtype: gradient of the recomputed logits of columns first .. first + width."""
    _check(hidden)
    from redone_kernels.jit import linear_logprob as kernels

    n, h = hidden.shape
    out = hidden.new_empty(n, width)
    if n:
        config = launch.tile(launch.DLOGITS_TILES, hidden)
        launch.allow_descriptors(hidden.device)
        kernels.linear_dlogits[(-(-n // config.rows), -(-width // config.columns))](
            hidden, weight, target, lse, entropy, grad_logprob, grad_entropy, out,
            n, weight.shape[0], real, first, width, out.stride(0), vocab_start, 1.0 / temperature,
            H=h, HAS_ENT=grad_entropy is not None, UP=launch.INTERPRET,
            **config.constants(), **config.options(),
        )  # fmt: skip
    return out


@linear_dlogits.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    first: int,
    width: int,
    vocab_start: int,
    real: int,
    temperature: float,
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], width)
