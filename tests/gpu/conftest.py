"""`make gpu-check`: a CUDA device, plain torch, triton and pytest. Everything here is marked gpu."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    assert torch.cuda.is_available(), "tests/gpu needs a CUDA device"
    torch.manual_seed(0)
    return torch.device("cuda")
