"""What the fused and the chunked head allocate, counted, against the prediction of benchmarks/kernels."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from redone_kernels.linear_logprob import linear_logprob
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.kernels.cases import Head

predicted = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks/kernels/head_memory.py"))["predicted"]


def allocated(call: Callable[[], Tensor], device: torch.device) -> int:
    """Largest sum of live bytes that torch allocates in the call."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        top = max(top, live)
    return top


@pytest.mark.parametrize(("backend", "least"), [("fused", 20), ("chunked", 4)])
def test_peak_is_as_predicted(backend: str, least: float, device: torch.device) -> None:
    """Forward and backward with entropy and main_grad, and at least so many times below whole logits."""
    n, h, v, chunk = 24, 32, 512, 8
    head = Head.random(n, h, v, device, ignore=False)
    main_grad = torch.zeros_like(head.weight)

    def run() -> Tensor:
        hidden, weight = head.hidden.detach().requires_grad_(), head.weight.detach().requires_grad_()
        out = linear_logprob(
            hidden, weight, head.target, entropy="grad", backend=backend, chunk_tokens=chunk,
            wgrad_out=main_grad,
        )  # type: ignore[arg-type]  # fmt: skip
        assert out.entropy is not None
        (out.logprob.sum() + out.entropy.sum()).backward()
        assert hidden.grad is not None
        return hidden.grad

    if device.type == "cuda":
        run()  # cuBLAS's workspace
    peak = allocated(run, device)
    want = predicted(backend, n, v, h, chunk)
    slack = 512 * 40 if device.type == "cuda" else 0  # blocks of the caching allocator
    assert peak <= 1.25 * (want + 4 * n * h) + slack
    assert predicted("naive", n, v, h, chunk) >= least * want
