"""Head benchmarks: ours beside copy and matmul ceilings, naive PyTorch, torch.compile, installed peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from measure import milliseconds, peak_mib
from redone_kernels.dapo_loss import DapoConfig
from redone_kernels.linear_dapo import linear_dapo
from redone_kernels.linear_logprob import linear_logprob
from torch import Tensor

H, V = 2048, 151936
CHECKED = 256  # rows compared with fp64
Row = dict[str, Any]


def naive(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Whole logits, as most trainers have it."""
    logp = (hidden @ weight.T).float().log_softmax(-1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def exact(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """fp64 log-probabilities of the first CHECKED rows."""
    logits = hidden[:CHECKED].double() @ weight.double().T
    return logits.log_softmax(-1).gather(1, target[:CHECKED, None])[:, 0]


def ceilings(hidden: Tensor, weight: Tensor) -> list[Row]:
    """Copy bandwidth and the head's own products, in the process of all that is compared with them."""
    n = hidden.shape[0]
    a = torch.empty(2**28, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    copy = milliseconds(lambda: b.copy_(a))
    out = [{"name": "ceiling/copy", "ms": copy, "TB_per_s": 2 * a.nbytes / copy / 1e9}]
    dz = torch.empty(n, V, dtype=torch.bfloat16, device="cuda")
    products: dict[str, Callable[[], Tensor]] = {
        "logits-bf16": lambda: hidden @ weight.T,
        "logits-fp32": lambda: torch.mm(hidden, weight.T, out_dtype=torch.float32),
        "dhidden": lambda: dz @ weight,
        "dweight": lambda: dz.T @ hidden,
    }
    for name, product in products.items():
        out.append(rate(f"ceiling/{name}", milliseconds(product), n, 1))
    return out


def rate(name: str, ms: float, n: int, products: int, **more: Any) -> Row:
    """TFLOP/s over the products a head cannot avoid."""
    return {"name": name, "N": n, "ms": ms, "TFLOP_per_s": products * 2 * n * H * V / ms / 1e9, **more}


def forward_rows(hidden: Tensor, weight: Tensor, target: Tensor, want: Tensor) -> list[Row]:
    calls: dict[str, Callable[[], Tensor]] = {
        "naive": lambda: naive(hidden, weight, target)[0],
        "compiled": lambda: torch.compile(naive)(hidden, weight, target)[0],
        "ours-chunked": lambda: (
            linear_logprob(
                hidden, weight, target, entropy="metric", backend="chunked", chunk_tokens=2048
            ).logprob
        ),
        "ours-fused": lambda: (
            linear_logprob(hidden, weight, target, entropy="metric", backend="fused").logprob
        ),
        "ours-fused-no-entropy": lambda: linear_logprob(hidden, weight, target, backend="fused").logprob,
    }
    out = []
    with torch.no_grad():
        for name, call in calls.items():
            error = float((call()[:CHECKED] - want).abs().max())
            row = rate(f"forward/{name}", milliseconds(call, 5), hidden.shape[0], 1)
            out.append(row | {"max_abs_error": error, "peak_MiB": peak_mib(call)})
    return out


def training_rows(hidden: Tensor, weight: Tensor, target: Tensor) -> list[Row]:
    """Forward and backward. linear_dapo is rated over its 3 products, what recomputes over the same 3."""
    n = hidden.shape[0]
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    main_grad = torch.zeros(V, H, dtype=torch.float32, device="cuda")
    old, advantage = torch.full((n,), -12.0, device="cuda"), torch.randn(n, device="cuda")
    mask = torch.ones(n, dtype=torch.bool, device="cuda")

    def logprob(backend: str) -> Callable[[], None]:
        def run() -> None:
            out = linear_logprob(
                x, w, target, entropy="metric", backend=backend, chunk_tokens=2048, wgrad_out=main_grad
            )  # type: ignore[arg-type]
            out.logprob.sum().backward()

        return run

    def dapo() -> None:
        linear_dapo(
            x, w, target, old, advantage, mask, float(n), DapoConfig(), chunk_tokens=2048, wgrad_out=main_grad
        ).loss.backward()

    def plain() -> None:
        naive(x, w, target)[0].sum().backward()

    calls: dict[str, Callable[[], None]] = {
        "naive": plain, "ours-chunked": logprob("chunked"), "ours-fused": logprob("fused"),
        "ours-linear_dapo": dapo, **peers(x, w, target),
    }  # fmt: skip
    out = []
    for name, call in calls.items():
        out.append(rate(f"training/{name}", milliseconds(call, 5, 2), n, 3, peak_MiB=peak_mib(call)))
        x.grad = w.grad = None
    return out


def peers(x: Tensor, w: Tensor, target: Tensor) -> dict[str, Callable[[], None]]:
    """Cross-entropy heads of what happens to be installed; the others are absent from the table."""
    found: dict[str, Callable[[], None]] = {}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger-flce"] = lambda: liger(w, x, target).backward()
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = lambda: linear_cross_entropy(x, w, target).backward()
    if importlib.util.find_spec("quack"):
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        found["quack"] = lambda: chunked_linear_cross_entropy(x, w, target).backward()
    return found


def bench(n: int) -> list[Row]:
    torch.manual_seed(0)
    hidden = (torch.randn(n, H, device="cuda") * 4 / H**0.5).bfloat16()
    weight = torch.randn(V, H, device="cuda").bfloat16()
    target = torch.randint(0, V, (n,), device="cuda")
    want = exact(hidden, weight, target)
    return [
        *ceilings(hidden, weight),
        *forward_rows(hidden, weight, target, want),
        *training_rows(hidden, weight, target),
    ]
