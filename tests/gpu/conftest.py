"""`make gpu-check`: a CUDA device, plain torch, triton and pytest. Everything here is marked gpu."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    assert torch.cuda.is_available(), "tests/gpu needs a CUDA device"
    torch.manual_seed(0)
    return torch.device("cuda")
