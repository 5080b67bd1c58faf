"""Block-quantised fp8 weights: e4m3 values and one fp32 scale for every 128 x 128 block."""

from __future__ import annotations

import torch
from torch import Tensor

FP8_MAX = 448.0  # largest finite e4m3
AMAX_FLOOR = 1e-4  # DeepGEMM's; keeps the scale of an all-zero block finite


def pack_fp8_block(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """weight [R, C] floating -> (values [R, C] e4m3, scales [ceil(R / block), ceil(C / block)] fp32).

    scale = max(amax, 1e-4) / 448, value = round(w * (1 / scale)): bit for bit what vLLM's DeepGEMM path makes
    of an unquantised checkpoint (`per_block_cast_to_fp8`).
    """
    rows, columns = weight.shape
    grid = -(-rows // block), -(-columns // block)
    padded = weight.new_zeros(grid[0] * block, grid[1] * block, dtype=torch.float32)
    padded[:rows, :columns] = weight
    view = padded.view(grid[0], block, grid[1], block)
    scale = view.abs().amax(dim=(1, 3), keepdim=True).clamp(AMAX_FLOOR) / FP8_MAX
    values = (view * (1.0 / scale)).to(torch.float8_e4m3fn).view_as(padded)
    return values[:rows, :columns].contiguous(), scale.view(grid)
