"""Where and how kernels run: the interpreter switch, static launch configurations, no autotuning.

Tuning at run time would execute candidates on live (in-place) data and change the arithmetic of a row
with the machine's mood. Configurations are tables; `aot` compiles every entry.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# Fused multiply-add is on in Triton <= 3.9 and off by default from 3.10: said at every launch, or the bits
# move with the version.
COMMON: dict[str, Any] = {"enable_fp_fusion": True}


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Tile of a matrix kernel. Fixed per dtype: never a function of the rows or of the machine."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    tma: bool

    def constants(self) -> dict[str, Any]:
        return {"BM": self.rows, "BN": self.columns, "BK": self.depth, "TMA": self.tma}

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, **COMMON}


STATS_TILES = {
    torch.bfloat16: TileConfig(128, 256, 64, warps=8, stages=3, tma=True),
    torch.float32: TileConfig(64, 64, 32, warps=4, stages=2, tma=False),
}
DLOGITS_TILES = {
    torch.bfloat16: TileConfig(128, 128, 64, warps=8, stages=4, tma=True),
    torch.float32: TileConfig(64, 64, 32, warps=4, stages=2, tma=False),
}
INTERPRETER_TILE = TileConfig(16, 32, 32, warps=4, stages=1, tma=False)

DAPO_BLOCK, DAPO_WIDTH, DAPO_REDUCE_ROWS = 1024, 32, 64
DAPO_OPTIONS = {"num_warps": 4, **COMMON}
ROW_BLOCK = 4096
ROW_OPTIONS = {"num_warps": 8, **COMMON}
MERGE_BLOCK = 128
MERGE_OPTIONS = {"num_warps": 4, **COMMON}
SEGMENT_BLOCK = 1024
SEGMENT_OPTIONS = {"num_warps": 4, **COMMON}
FP8_BLOCK, FP8_FIELDS = 128, 6
FP8_OPTIONS = {"num_warps": 16, **COMMON}


def runs_triton(x: Tensor) -> bool:
    """Whether `x` goes to the Triton kernel; otherwise (CPU, or fp64 anywhere) the PyTorch reference runs."""
    return (x.is_cuda or INTERPRET) and x.dtype != torch.float64


def tile(table: dict[torch.dtype, TileConfig], x: Tensor) -> TileConfig:
    """The configuration for x [., H]; TMA needs rows of a multiple of 16 bytes, aligned."""
    if INTERPRET:
        return INTERPRETER_TILE
    if x.dtype not in table:
        raise ValueError(f"fused head: no configuration for {x.dtype}; use one of {sorted(map(str, table))}")
    config = table[x.dtype]
    if config.tma and (x.shape[1] * x.element_size()) % 16:
        raise ValueError(f"fused head: hidden size {x.shape[1]} is no multiple of 8; use backend 'chunked'")
    return config


def allow_descriptors(device: torch.device) -> None:
    """Give Triton the scratch memory in which kernels build their TMA descriptors on the device."""
    if INTERPRET:
        return
    import triton

    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device))
