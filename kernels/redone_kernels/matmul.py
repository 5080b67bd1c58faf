"""The three products of a head with fp32 results (fp64 for fp64 inputs), whatever the inputs' dtype.

On CUDA they are cuBLAS with bf16 inputs and fp32 output. CPU PyTorch has no such product: inputs are
widened a block of the vocabulary at a time, so that a bf16 weight is never copied whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

VOCAB_BLOCK = 8192


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def _native(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64)


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(i, min(i + VOCAB_BLOCK, rows)) for i in range(0, rows, VOCAB_BLOCK))


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, H] @ weight [V, H].T -> [n, V]."""
    if _native(x):
        return x @ weight.T
    if x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    for part in _blocks(weight.shape[0]):
        out[:, part] = x.float() @ weight[part].float().T
    return out


def add_hidden_grad(out: Tensor, dlogits: Tensor, weight: Tensor) -> None:
    """out [n, H] += dlogits [n, V] @ weight [V, H]; out in the wide dtype."""
    if _native(dlogits):
        out.addmm_(dlogits, weight)
    elif dlogits.is_cuda:
        torch.addmm(out, dlogits, weight, out_dtype=torch.float32, out=out)
    else:
        for part in _blocks(weight.shape[0]):
            out.addmm_(dlogits[:, part].float(), weight[part].float())


def add_weight_grad(out: Tensor, dlogits: Tensor, x: Tensor) -> None:
    """out [V, H] += dlogits [n, V].T @ x [n, H]; out in the wide dtype."""
    if _native(dlogits):
        out.addmm_(dlogits.T, x)
    elif dlogits.is_cuda:
        torch.addmm(out, dlogits.T, x, out_dtype=torch.float32, out=out)
    else:
        for part in _blocks(out.shape[0]):
            out[part].addmm_(dlogits[:, part].T.float(), x.float())
