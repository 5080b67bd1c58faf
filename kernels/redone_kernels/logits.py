"""Row kernels over materialised logits: `logits_stats`, `merge_stats`, `logits_backward_`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from redone_kernels import launch, reference
from redone_kernels.reference.logits import LOG2E

__all__ = ["logits_backward_", "logits_stats", "merge_stats"]


def _real(width: int, vocab_start: int, vocab_size: int | None) -> int:
    """Columns of a shard of `width` that are not padding of the vocabulary."""
    return width if vocab_size is None else min(max(vocab_size - vocab_start, 0), width)


def logits_stats(
    logits: Tensor,
    target: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    split: int | None = None,
) -> Tensor:
    """[S, 4, N] fp32 (max, sum, relative entropy sum, target logit), base 2, one pass over the logits.

    logits [N, V_local] fp32 or bf16, rows contiguous; target [N] int64 global ids, negative: ignored; columns
    whose global id is >= vocab_size are padding; S = ceil(V_local / split), 1 without `split`. Definition:
    reference.logits_stats.
    """
    width = logits.shape[1]
    return _stats(
        logits,
        target,
        vocab_start,
        _real(width, vocab_start, vocab_size),
        temperature,
        split or max(width, 1),
    )


@torch.library.custom_op("redone::logits_stats", mutates_args=())
def _stats(
    logits: Tensor, target: Tensor, vocab_start: int, real: int, temperature: float, split: int
) -> Tensor:
    if not launch.runs_triton(logits):
        return reference.logits_stats(
            logits, target, vocab_start=vocab_start, real=real, temperature=temperature, split=split
        )
    from redone_kernels.jit import logits as kernels

    n, width = logits.shape
    splits = max(-(-width // split), 1)
    parts = logits.new_empty(splits, 4, n, dtype=torch.float32)
    if n:
        kernels.logits_stats[(n, splits)](
            logits, target, parts, n, width, real, split, logits.stride(0), vocab_start, LOG2E / temperature,
            BLOCK=launch.ROW_BLOCK, **launch.ROW_OPTIONS,
        )  # fmt: skip
    return parts


@_stats.register_fake
def _(logits: Tensor, target: Tensor, vocab_start: int, real: int, temperature: float, split: int) -> Tensor:
    splits = max(-(-logits.shape[1] // split), 1)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(splits, 4, logits.shape[0], dtype=dtype)


def merge_stats(parts: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """parts [S, 4, N] of all shards in vocabulary order, target [N] -> (logprob, entropy, lse), fp32 [N].

    Merged one after another: no atomics, the same bits every time and on every rank. Rows with a negative
    target give 0 in all three.
    """
    out: tuple[Tensor, Tensor, Tensor] = _merge(parts.contiguous(), target)
    return out


@torch.library.custom_op("redone::merge_stats", mutates_args=())
def _merge(parts: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not launch.runs_triton(parts):
        return reference.merge_stats(parts, target)
    from redone_kernels.jit import logits as kernels

    count, _, n = parts.shape
    logprob, entropy, lse = (parts.new_empty(n) for _ in range(3))
    if n:
        kernels.merge_stats[(-(-n // launch.MERGE_BLOCK),)](
            parts, target, logprob, entropy, lse, n, count, BLOCK=launch.MERGE_BLOCK, **launch.MERGE_OPTIONS
        )
    return logprob, entropy, lse


@_merge.register_fake
def _(parts: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = parts.shape[2]
    return parts.new_empty(n), parts.new_empty(n), parts.new_empty(n)


def logits_backward_(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None = None,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of the raw logits [N, V_local], written over `logits`, or into `out` where given.

    `out` serves a bf16 gradient of fp32 logits: bf16 written into the fp32 rows would race with the threads
    that still read them. `logits` is clobbered in either case. Padding columns and rows with a negative
    target become exactly 0. Definition: reference.logits_backward_.
    """
    real = _real(logits.shape[1], vocab_start, vocab_size)
    target_buffer = logits if out is None else out
    rows = [target, lse, entropy, grad_logprob, grad_entropy]
    if out is None:
        _backward_in_place(logits, *rows, vocab_start, real, temperature)
    else:
        _backward_into(logits, out, *rows, vocab_start, real, temperature)
    return target_buffer


def _launch_backward(
    logits: Tensor, out: Tensor, rows: list[Any], vocab_start: int, real: int, temperature: float
) -> None:
    if not launch.runs_triton(logits):
        target, lse, entropy, grad, grad_entropy = rows
        reference.logits_backward_(
            logits, target, lse, entropy, grad, grad_entropy,
            vocab_start=vocab_start, real=real, temperature=temperature, out=out,
        )  # fmt: skip
        return
    from redone_kernels.jit import logits as kernels

    n, width = logits.shape
    if n and width:
        kernels.logits_backward_[(n, -(-width // launch.ROW_BLOCK))](
            logits, out, *rows, width, real, logits.stride(0), out.stride(0), vocab_start, 1.0 / temperature,
            HAS_ENT=rows[-1] is not None, BLOCK=launch.ROW_BLOCK, **launch.ROW_OPTIONS,
        )  # fmt: skip


@torch.library.custom_op("redone::logits_backward_", mutates_args=("logits",))
def _backward_in_place(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    vocab_start: int,
    real: int,
    temperature: float,
) -> None:
    rows = [target, lse, entropy, grad_logprob, grad_entropy]
    _launch_backward(logits, logits, rows, vocab_start, real, temperature)


@torch.library.custom_op("redone::logits_backward_into", mutates_args=("logits", "out"))
def _backward_into(
    logits: Tensor,
    out: Tensor,
    target: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    vocab_start: int,
    real: int,
    temperature: float,
) -> None:
    rows = [target, lse, entropy, grad_logprob, grad_entropy]
    _launch_backward(logits, out, rows, vocab_start, real, temperature)


@_backward_in_place.register_fake
def _(*args: Any) -> None:
    return None


@_backward_into.register_fake
def _(*args: Any) -> None:
    return None
