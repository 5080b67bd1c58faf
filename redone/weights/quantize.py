"""Block-quantised weights (weights.quantization=fp8_block): what engines read of checkpoints such as
Qwen3-30B-A3B-FP8. e4m3 values with one fp32 factor per block of 128 x 128; `<weight>_scale_inv` holds the
factors: weight = value * factor (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 128
SCALE = "_scale_inv"
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
DTYPE = "float8_e4m3fn"
_PROJECTION = re.compile(r"layers\.\d+\..*\.(q|k|v|o|gate|up|down)_proj\.weight$")

Meta = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def is_quantized(name: str) -> bool:
    """The projections of attention, MLP and experts. Embeddings, head, router and norms stay as they are."""
    return _PROJECTION.search(name) is not None


def blocks(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of the factors of a matrix; the last of each may be of a smaller block."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantized_metas(metas: Iterable[Meta]) -> Iterator[Meta]:
    """Every tensor of the quantised model: the factors follow their weight."""
    for name, dtype, shape in metas:
        if is_quantized(name):
            yield name, DTYPE, shape
            yield name + SCALE, "float32", blocks(shape)
        else:
            yield name, dtype, shape


def quantized_tensors(tensors: Iterable[tuple[str, Tensor | None]]) -> Iterator[tuple[str, Tensor | None]]:
    """The same of an exporter's stream, which has tensors on rank 0 only."""
    for name, tensor in tensors:
        if not is_quantized(name):
            yield name, tensor
        elif tensor is None:
            yield from ((name, None), (name + SCALE, None))
        else:
            values, factors = quantize(tensor)
            yield from ((name, values), (name + SCALE, factors))


@torch.no_grad()
def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] of any float -> ([N, K] e4m3, [ceil(N / 128), ceil(K / 128)] fp32).

    Each block's largest magnitude becomes 448; rounding is to nearest, so a value is off by at most 1/16 of
    itself (2^-10 of the factor where that is more). A block of zeros has the factor 1.
    """
    (rows, columns), (high, wide) = weight.shape, blocks(tuple(weight.shape))
    whole = pad(weight.float(), (0, wide * BLOCK - columns, 0, high * BLOCK - rows))
    tiles = whole.view(high, BLOCK, wide, BLOCK)
    most = tiles.abs().amax((1, 3))
    factors = torch.where(most > 0, most / LARGEST, 1.0)
    values = (tiles / factors[:, None, :, None]).clamp(-LARGEST, LARGEST)
    flat = values.view(high * BLOCK, wide * BLOCK)[:rows, :columns]
    return flat.to(torch.float8_e4m3fn), factors


def dequantize(values: Tensor, factors: Tensor) -> Tensor:
    """[N, K] fp32."""
    rows, columns = values.shape
    spread = factors.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return values.float() * spread
