"""segment_sum: per-sequence sums and their gradient."""

from __future__ import annotations

import pytest
import torch
from redone_kernels import reference
from redone_kernels.segment_sum import segment_sum

from tests.kernels.cases import relative


@pytest.mark.parametrize("lengths", [[1], [0, 5, 0], [3, 1500, 20, 1024], []])
def test_matches_fp64(lengths: list[int], device: torch.device) -> None:
    cu = torch.tensor([0, *lengths], device=device).cumsum(0)
    n = sum(lengths)
    mask = (torch.rand(n) > 0.3).to(device)
    values = torch.randn(n).to(device)
    values[~mask] = torch.nan
    values.requires_grad_()
    out = segment_sum(values, cu, mask)
    exact = values.detach().double().requires_grad_()
    sums, counts = reference.segment_sum(exact, cu, mask)
    assert relative(out.sums, sums) <= 1e-6 and torch.equal(out.counts.double(), counts)
    out.sums.square().sum().backward()
    sums.square().sum().backward()
    assert relative(values.grad, exact.grad) <= 1e-6
    assert not values.grad[~mask].any()


def test_neighbours_do_not_matter(device: torch.device) -> None:
    """A sequence's sum has the same bits wherever it lies in the pack."""
    a, b = torch.randn(700).to(device), torch.randn(1300).to(device)
    mask = torch.ones(2000, dtype=torch.bool, device=device)
    first = segment_sum(torch.cat([a, b]), torch.tensor([0, 700, 2000], device=device), mask).sums
    second = segment_sum(torch.cat([b, a]), torch.tensor([0, 1300, 2000], device=device), mask).sums
    assert torch.equal(first, second.flip(0))


def test_mask_must_fit(device: torch.device) -> None:
    with pytest.raises(ValueError, match="mask"):
        segment_sum(torch.zeros(3, device=device), torch.tensor([0, 3]), torch.ones(2, dtype=torch.bool))
