"""The kernels on real hardware: bf16, V = 151,936. `make gpu-check` also runs tests/kernels on the device."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from redone_kernels.dapo_loss import DapoConfig
from redone_kernels.fused import linear_stats
from redone_kernels.linear_dapo import linear_dapo
from redone_kernels.linear_logprob import LogprobOut, linear_logprob
from redone_kernels.logits import merge_stats
from torch import Tensor

pytestmark = pytest.mark.gpu

REPO = Path(__file__).parents[2]
H, V = 2048, 151936
ABSOLUTE = 2e-4  # of log-probabilities and entropy, |logit| <= 30
Rows = tuple[Tensor, Tensor, Tensor]


def rows(n: int, device: torch.device) -> Rows:
    """(hidden, weight, target): bf16 logits of standard deviation about 4."""
    hidden = (torch.randn(n, H, device=device) * 4 / H**0.5).bfloat16()
    return hidden, torch.randn(V, H, device=device).bfloat16(), torch.randint(0, V, (n,), device=device)


def exact(hidden: Tensor, weight: Tensor, target: Tensor) -> Rows:
    """fp64 on the same inputs, 256 rows alive at a time."""
    wide = weight.double()
    out = []
    for i in range(0, hidden.shape[0], 256):
        logits = hidden[i : i + 256].double() @ wide.T
        logp = logits.log_softmax(-1)
        picked = logp.gather(1, target[i : i + 256, None])[:, 0]
        out.append((picked, -(logp.exp() * logp).sum(-1), logits.logsumexp(-1)))
    a, b, c = zip(*out, strict=True)
    return torch.cat(a), torch.cat(b), torch.cat(c)


def forward(inputs: Rows, backend: str) -> LogprobOut:
    return linear_logprob(*inputs, entropy="metric", backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["fused", "chunked"])
@pytest.mark.parametrize("n", [1, 1023])
def test_forward(n: int, backend: str, device: torch.device) -> None:
    inputs = rows(n, device)
    for got, want in zip(forward(inputs, backend), exact(*inputs), strict=True):
        assert float((got - want).abs().max()) <= ABSOLUTE


@pytest.mark.parametrize("n", [8191, 8192])
def test_large_batches_repeat_and_keep_their_rows(n: int, device: torch.device) -> None:
    hidden, weight, target = rows(n, device)
    whole = forward((hidden, weight, target), "fused")
    again = forward((hidden, weight, target), "fused")
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    order = torch.randperm(n, device=device)[:777]
    some = forward((hidden[order].contiguous(), weight, target[order]), "fused")
    assert all(torch.equal(a[order], b) for a, b in zip(whole, some, strict=True))


def test_tensor_parallel_bits(device: torch.device) -> None:
    hidden, weight, target = rows(515, device)
    results = []
    for ranks in (1, 2, 4, 8):
        width = V // ranks
        parts = [
            linear_stats(
                hidden, weight[i * width : (i + 1) * width], target, i * width, width, V // 8, 1.0, True
            )
            for i in range(ranks)
        ]
        results.append(merge_stats(torch.cat(parts), target))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["fused", "chunked"])
def test_backward(backend: str, device: torch.device) -> None:
    hidden, weight, target = rows(300, device)
    g, ge = torch.randn(300, device=device), torch.randn(300, device=device)
    leaf, main_grad = hidden.clone().requires_grad_(), torch.zeros(V, H, device=device)
    out = linear_logprob(
        leaf, weight.clone().requires_grad_(), target, entropy="grad", backend=backend, wgrad_out=main_grad
    )  # type: ignore[arg-type]
    (out.logprob * g + out.entropy * ge).sum().backward()  # type: ignore[operator]
    logits = hidden.double() @ weight.double().T
    logp = logits.log_softmax(-1)
    p = logp.exp()
    entropy = -(p * logp).sum(-1, keepdim=True)
    dlogits = -p * (g[:, None] + ge[:, None] * (logp + entropy))
    dlogits[torch.arange(300, device=device), target] += g
    dx, dw = dlogits @ weight.double(), dlogits.T @ hidden.double()
    assert float((leaf.grad - dx).norm() / dx.norm()) <= 1e-2
    assert float((main_grad - dw).norm() / dw.norm()) <= 4e-3


def test_linear_dapo_is_the_recomputing_head(device: torch.device) -> None:
    hidden, weight, target = rows(600, device)
    old, advantage = torch.full((600,), -12.0, device=device), torch.randn(600, device=device)
    mask = torch.rand(600, device=device) > 0.3
    leaf, main_grad = hidden.clone().requires_grad_(), torch.zeros(V, H, device=device)
    out = linear_dapo(
        leaf, weight, target, old, advantage, mask, 600.0, DapoConfig(), chunk_tokens=256, wgrad_out=main_grad
    )
    out.loss.backward()
    again, second = hidden.clone().requires_grad_(), torch.zeros(V, H, device=device)
    repeat = linear_dapo(
        again, weight, target, old, advantage, mask, 600.0, DapoConfig(), chunk_tokens=256, wgrad_out=second
    )
    repeat.loss.backward()
    assert torch.equal(out.loss, repeat.loss) and torch.equal(leaf.grad, again.grad)
    want = exact(hidden, weight, target)[0]
    assert float((out.logprob - want)[mask].abs().max()) <= ABSOLUTE
    assert torch.isfinite(main_grad).all() and float(main_grad.abs().max()) > 0
    assert not leaf.grad[~mask].any()


@pytest.mark.parametrize("backend", ["fused", "chunked"])
def test_head_memory_at_32768_rows(backend: str, device: torch.device) -> None:
    """Forward and backward of a training step's head within the prediction of benchmarks/kernels."""
    n, chunk = 32768, 1024
    hidden, weight, target = rows(n, device)
    main_grad = torch.zeros(V, H, device=device)
    leaf, weight = hidden.requires_grad_(), weight.requires_grad_()
    forward((hidden[:8].detach(), weight.detach(), target[:8]), backend)  # cuBLAS's workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = linear_logprob(
        leaf, weight, target, entropy="grad", backend=backend, chunk_tokens=chunk, wgrad_out=main_grad
    )  # type: ignore[arg-type]
    assert out.entropy is not None
    (out.logprob.sum() + out.entropy.sum()).backward()
    peak = torch.cuda.max_memory_allocated() - before - leaf.nbytes
    measured = runpy.run_path(str(REPO / "benchmarks/kernels/head_memory.py"))
    assert peak <= 1.25 * measured["predicted"](backend, n, V, H, chunk, bf16=True) + 2**28


def test_compute_sanitizer_finds_nothing() -> None:
    """Every kernel once under memcheck, without the caching allocator, so that every overrun is one."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        pytest.skip("compute-sanitizer (CUDA toolkit) is not installed")
    done = subprocess.run(
        [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "tests/gpu/every_kernel.py"],
        cwd=REPO, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout
