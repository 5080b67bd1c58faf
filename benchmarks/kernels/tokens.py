"""Benchmarks of the kernels that are bound by bandwidth or launch latency."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from measure import back_to_back, milliseconds
from redone_kernels import reference
from redone_kernels.dapo_loss import DapoConfig, dapo_loss
from redone_kernels.fp8_blocks import pack_fp8_blocks
from redone_kernels.logits import logits_backward_, logits_stats, merge_stats
from redone_kernels.segment_sum import segment_sum

V = 151936
Row = dict[str, Any]


def stream(name: str, call: Callable[[], Any], size: int) -> Row:
    ms = milliseconds(call)
    return {"name": name, "ms": ms, "TB_per_s": size / ms / 1e9}


def row_kernels(n: int = 2048) -> list[Row]:
    logits = torch.randn(n, V, device="cuda")
    target = torch.randint(0, V, (n,), device="cuda")
    stats = logits_stats(logits, target)
    _, entropy, lse = merge_stats(stats, target)
    g = torch.randn(n, device="cuda")
    out = torch.empty(n, V, dtype=torch.bfloat16, device="cuda")
    return [
        stream("logits_stats", lambda: logits_stats(logits, target), logits.nbytes),
        stream(
            "logits_backward_",
            lambda: logits_backward_(logits, target, lse, entropy, g, out=out),
            logits.nbytes + out.nbytes,
        ),
        {"name": "merge_stats", "ms": milliseconds(lambda: merge_stats(stats, target))},
    ]


def dapo_rows(n: int) -> list[Row]:
    new, old, advantage = (torch.randn(n, device="cuda") for _ in range(3))
    mask = torch.ones(n, dtype=torch.bool, device="cuda")
    cfg = DapoConfig(dual_clip=10.0)
    arguments = (new, old, advantage, mask, float(n), cfg)
    graph = torch.cuda.CUDAGraph()
    dapo_loss(*arguments)
    with torch.cuda.graph(graph):
        dapo_loss(*arguments)
    size = n * (4 * 4 + 1)
    out = [stream(f"dapo_loss-{n}", graph.replay, size)]
    if n <= 2**20:
        out.append({"name": f"dapo_loss-{n}-warm", "ms": back_to_back(graph.replay)})
        out.append(stream(f"dapo_loss-{n}-eager", lambda: dapo_loss(*arguments), size))
        out.append(stream(f"dapo_loss-{n}-naive", lambda: reference.dapo_loss(*arguments), size))
    return out


def bench() -> list[Row]:
    torch.manual_seed(0)
    rows = row_kernels()
    for n in (8192, 65536, 2**26):
        rows += dapo_rows(n)
    n = 2**20
    values, mask = torch.randn(n, device="cuda"), torch.ones(n, dtype=torch.bool, device="cuda")
    cu = torch.arange(0, n + 1, 4096, device="cuda")
    rows.append(stream("segment_sum", lambda: segment_sum(values, cu, mask), n * 5))
    weights = [torch.randn(2048, 768, device="cuda").bfloat16() for _ in range(384)]
    size = sum(w.numel() * 3 for w in weights)
    rows.append(stream("pack_fp8_blocks", lambda: pack_fp8_blocks(weights), size))
    return rows
