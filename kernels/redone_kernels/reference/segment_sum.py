"""Sums over the tokens of each sequence of a packed batch."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, cu_seqlens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(sums [S] in values' dtype, counts [S] same dtype) over rows cu_seqlens[i] .. cu_seqlens[i + 1].

    values [N] floating, cu_seqlens [S + 1] int32/int64 ascending, mask [N] bool; rows with mask False may
    hold anything.
    """
    lengths = cu_seqlens.diff()
    index = torch.repeat_interleave(torch.arange(lengths.numel(), device=values.device), lengths)
    rows = slice(int(cu_seqlens[0]), int(cu_seqlens[-1]))
    kept = torch.where(mask, values, torch.zeros_like(values))[rows]
    zeros = values.new_zeros(lengths.numel())
    return zeros.index_add(0, index, kept), zeros.index_add(0, index, mask[rows].to(values.dtype))
