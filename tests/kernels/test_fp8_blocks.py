"""pack_fp8_blocks: one bucket of many matrices, as each matrix by itself."""

from __future__ import annotations

import pytest
import torch
from redone_kernels import reference
from redone_kernels.fp8_blocks import pack_fp8_blocks
from torch import Tensor


def matrices(device: torch.device) -> list[Tensor]:
    shapes = [(200, 300), (128, 128), (5, 7), (130, 16)]
    out = [(torch.randn(s) * 10.0**i).bfloat16().to(device) for i, s in enumerate(shapes, -2)]
    return [*out, torch.zeros(3, 3, dtype=torch.bfloat16, device=device)]


def check(weights: list[Tensor]) -> None:
    got = pack_fp8_blocks(weights)
    value, block = 0, 0
    for w in weights:
        want, scale = reference.pack_fp8_block(w)
        # as numbers: a tiny negative weight may become -0 in one and +0 in the other
        assert torch.equal(got.values[value : value + w.numel()].view(w.shape).float(), want.float())
        assert torch.equal(got.scales[block : block + scale.numel()].view_as(scale), scale)
        value, block = value + w.numel(), block + scale.numel()
    assert (value, block) == (got.values.numel(), got.scales.numel())


def test_matches_each_matrix(device: torch.device) -> None:
    check(matrices(device))


def test_aligned_matrices(device: torch.device) -> None:
    check([torch.randn(160, 144).bfloat16().to(device), torch.randn(16, 256).bfloat16().to(device)])


def test_refuses_what_it_cannot_read(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"weights\[0\]"):
        pack_fp8_blocks([torch.zeros(4, 4, device=device)])
    with pytest.raises(ValueError, match="empty"):
        pack_fp8_blocks([])
