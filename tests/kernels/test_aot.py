"""Ahead-of-time gate: what sm_90a machine code the shipped kernels become, without a GPU.

The kernels are compiled by `python -m redone_kernels.aot` in a process of its own (Triton caches on disk).
The golden table belongs to one Triton version; `--write` renews it, and the difference shows in review.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes of stack. The statistics of a 128 x 256 tile spill in the per-tile epilogue, not in the matrix loop.
STACK = {"linear_stats-bf16-plain": 160, "linear_stats-bf16-entropy": 160}
STACK_DEFAULT = 128
SHARED_PER_SM = 227 * 1024
REGISTERS_PER_SM = 65536
DOTS = ("linear_stats-bf16", "linear_dlogits-bf16")
STREAMS = ("logits_stats", "logits_backward_", "dapo_loss", "pack_fp8_blocks")
# fp32 heads are exact and slow to compile; they are compiled in the long run
FP32_HEADS = [f"linear_{a}-fp32-{b}" for a in ("stats", "dlogits") for b in ("plain", "entropy")]

Table = dict[str, dict[str, int]]


def compiled(repo: Path, names: list[str]) -> Table:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "redone_kernels.aot", *names],
        env=environment | {"PYTHONPATH": f"{repo / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    table: Table = json.loads(done.stdout)
    assert set(table) == set(names)
    return table


@pytest.fixture(scope="module")
def golden(repo: Path) -> Table:
    from importlib.metadata import version

    file = repo / "kernels/redone_kernels" / f"golden_sm90a_triton-{version('triton')}.json"
    assert file.exists(), f"no {file.name}: python -m redone_kernels.aot --write makes it"
    table: Table = json.loads(file.read_text())
    return table


@pytest.fixture(scope="module")
def facts(repo: Path, golden: Table) -> Table:
    return compiled(repo, [name for name in golden if name not in FP32_HEADS])


def gate(facts: Table, golden: Table) -> None:
    for name, fact in facts.items():
        assert fact == golden[name], f"{name} differs from the golden table"
        assert fact["atomics"] == 0, name
        assert fact["hmma"] == 0, name
        assert fact["local_in_matrix_loop"] == 0, name
        assert fact["stack"] <= STACK.get(name, STACK_DEFAULT), name
        assert fact["shared"] <= SHARED_PER_SM, name
        assert fact["registers"] * fact["threads"] <= REGISTERS_PER_SM, name


def test_default_kernels(facts: Table, golden: Table) -> None:
    gate(facts, golden)


def test_dots_use_wgmma_and_tma(facts: Table) -> None:
    dots = [name for name in facts if name.startswith(DOTS)]
    assert len(dots) == 4
    for name in dots:
        assert facts[name]["hgmma"] > 0 and facts[name]["tma_loads"] > 0, name


def test_streams_load_16_bytes(facts: Table) -> None:
    streams = [name for name in facts if name.startswith(STREAMS)]
    assert len(streams) >= 8
    for name in streams:
        assert facts[name]["wide_loads"] > 0, name


def test_the_table_names_every_case(golden: Table) -> None:
    """In a process of its own: `cases` imports the kernels, which must not happen in a test process."""
    code = "from redone_kernels.aot import cases; print(*[c.name for c in cases()])"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == list(golden), done.stderr[-2000:]


@pytest.mark.slow
def test_fp32_heads(repo: Path, golden: Table) -> None:
    gate(compiled(repo, FP32_HEADS), golden)
