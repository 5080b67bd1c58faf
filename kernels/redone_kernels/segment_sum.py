"""Per-sequence sums of a packed batch (sequence-level ratios, sequence means, per-sequence metrics)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from redone_kernels import launch, reference

__all__ = ["SegmentSums", "segment_sum"]


class SegmentSums(NamedTuple):
    sums: Tensor  # [S] fp32 (fp64 for fp64 values)
    counts: Tensor  # [S] rows of the mask, same dtype


def segment_sum(values: Tensor, cu_seqlens: Tensor, mask: Tensor) -> SegmentSums:
    """Sums of values [N] over rows cu_seqlens[i] .. cu_seqlens[i + 1] where mask [N] bool is set.

    cu_seqlens [S + 1] int32/int64, ascending, from 0 to N. Deterministic, where scatter_add on a GPU is not.
    A row outside the mask may hold NaN and gets gradient 0. Definition: reference.segment_sum.
    """
    if mask.shape != values.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool {tuple(values.shape)}, is {mask.dtype} {tuple(mask.shape)}")
    sums, counts = _op(values.contiguous(), cu_seqlens, mask.contiguous())
    return SegmentSums(sums, counts.detach())


@torch.library.custom_op("redone::segment_sum", mutates_args=())
def _op(values: Tensor, cu_seqlens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if not launch.runs_triton(values):
        return reference.segment_sum(values, cu_seqlens, mask)
    from redone_kernels.jit import segment_sum as kernels

    s = cu_seqlens.numel() - 1
    sums, counts = (values.new_empty(s, dtype=torch.float32) for _ in range(2))
    if s:
        kernels.segment_sum[(s,)](
            values, mask, cu_seqlens, sums, counts, BLOCK=launch.SEGMENT_BLOCK, **launch.SEGMENT_OPTIONS
        )
    return sums, counts


@_op.register_fake
def _(values: Tensor, cu_seqlens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(values.dtype, torch.float32)
    s = cu_seqlens.shape[0] - 1
    return values.new_empty(s, dtype=dtype), values.new_empty(s, dtype=dtype)


@torch.library.custom_op("redone::segment_spread", mutates_args=())
def _spread(grad: Tensor, cu_seqlens: Tensor, mask: Tensor) -> Tensor:
    """Every row of the mask gets its sequence's gradient [S], the others 0: [N]."""
    if not launch.runs_triton(grad):
        rows = torch.repeat_interleave(grad, cu_seqlens.diff())
        return torch.where(mask, rows, torch.zeros_like(rows))
    from redone_kernels.jit import segment_sum as kernels

    out = grad.new_empty(mask.shape)
    if grad.numel():
        kernels.segment_spread[(grad.numel(),)](
            grad.contiguous(), mask, cu_seqlens, out, BLOCK=launch.SEGMENT_BLOCK, **launch.SEGMENT_OPTIONS
        )
    return out


@_spread.register_fake
def _(grad: Tensor, cu_seqlens: Tensor, mask: Tensor) -> Tensor:
    return grad.new_empty(mask.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad_sums: Tensor, grad_counts: Tensor) -> tuple[Any, ...]:
    return _spread(grad_sums, *ctx.saved_tensors).to(ctx.dtype), None, None


_op.register_autograd(_backward, setup_context=_save)
