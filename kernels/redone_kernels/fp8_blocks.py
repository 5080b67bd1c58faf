"""fp8 block quantisation of many matrices into one bucket, for the weight sync."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from redone_kernels import launch, reference

__all__ = ["PackedBlocks", "pack_fp8_blocks"]

BLOCK = launch.FP8_BLOCK


class PackedBlocks(NamedTuple):
    values: Tensor  # flat float8_e4m3fn, every matrix row-major, one after another
    scales: Tensor  # flat fp32, [ceil(R / 128), ceil(C / 128)] of every matrix, one after another


def pack_fp8_blocks(weights: list[Tensor]) -> PackedBlocks:
    """bf16 matrices [R_i, C_i], contiguous, on one device -> one bucket, by one launch.

    Bit for bit what vLLM makes of the same matrices. Definition: reference.pack_fp8_block, per matrix.
    """
    for i, w in enumerate(weights):
        if w.dim() != 2 or w.dtype != torch.bfloat16 or not w.is_contiguous():
            raise ValueError(f"weights[{i}]: {w.dtype} {tuple(w.shape)}; contiguous bf16 matrices are needed")
    if not weights:
        raise ValueError("weights is empty")
    values, scales = _op(weights)
    return PackedBlocks(values, scales)


def _sizes(weights: list[Tensor]) -> tuple[int, int]:
    """(elements, blocks) of all matrices."""
    blocks = sum(-(-w.shape[0] // BLOCK) * -(-w.shape[1] // BLOCK) for w in weights)
    return sum(w.numel() for w in weights), blocks


@torch.library.custom_op("redone::pack_fp8_blocks", mutates_args=())
def _op(weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    if not launch.runs_triton(weights[0]):
        packed = [reference.pack_fp8_block(w, BLOCK) for w in weights]
        flat = [v.view(torch.uint8).flatten() for v, _ in packed]  # cat knows no fp8 on CPU
        return torch.cat(flat).view(torch.float8_e4m3fn), torch.cat([s.flatten() for _, s in packed])
    from redone_kernels.jit import fp8_blocks as kernels

    elements, blocks = _sizes(weights)
    table, owner, value, block = [], [], 0, 0
    for i, w in enumerate(weights):
        rows, columns = w.shape
        count = -(-rows // BLOCK) * -(-columns // BLOCK)
        table.append([w.data_ptr(), rows, columns, value, block, block])
        owner += [i] * count
        value, block = value + w.numel(), block + count
    device = weights[0].device
    values = torch.empty(elements, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(blocks, dtype=torch.float32, device=device)
    aligned = all(x % 16 == 0 for row in table for x in (row[0], row[2], row[3]))
    if blocks:
        kernels.pack_fp8_blocks[(blocks,)](
            torch.tensor(table, dtype=torch.int64, device=device),
            torch.tensor(owner, dtype=torch.int32, device=device),
            values, scales, BLOCK=BLOCK, FIELDS=launch.FP8_FIELDS, ALIGNED=aligned, ROUND=launch.INTERPRET,
            **launch.FP8_OPTIONS,
        )  # fmt: skip
    return values, scales


@_op.register_fake
def _(weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    elements, blocks = _sizes(weights)
    w = weights[0]
    return w.new_empty(elements, dtype=torch.float8_e4m3fn), w.new_empty(blocks, dtype=torch.float32)
