"""Two kinds of process: this folder's kernel tests need Triton's interpreter (TRITON_INTERPRET=1 before the
first import of triton) or a CUDA device (REDONE_KERNELS_DEVICE=cuda); everything else must not have it. In an
ordinary run `test_interpreter.py` starts the former."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("REDONE_KERNELS_DEVICE", "cpu")
# The interpreter multiplies with numpy, and OpenBLAS picks its code by the CPU: its Haswell code gives a row
# other bits at another place of a tile. Nehalem's do not, and run on every x86-64.
INTERPRETER = {"TRITON_INTERPRET": "1", "OPENBLAS_CORETYPE": "Nehalem"}
KERNELS = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
ORDINARY = [
    "test_interpreter.py",
    "test_aot.py",
    "test_references.py",
    "test_mutations.py",
    "test_benchmarks.py",
]
IN_KERNEL_PROCESS = [
    "test_dapo_loss.py",
    "test_logits.py",
    "test_linear_logprob.py",
    "test_linear_dapo.py",
    "test_segment_sum.py",
    "test_fp8_blocks.py",
    "test_memory.py",
    "test_operators.py",
]
collect_ignore = ORDINARY if KERNELS else IN_KERNEL_PROCESS


@pytest.fixture
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
