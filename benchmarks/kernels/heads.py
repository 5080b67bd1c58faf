"""Head benchmarks: ours beside copy and matmul ceilings, naive PyTorch, torch.compile, installed peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import peers
import torch
from measure import milliseconds, peak_mib
from redone_kernels.dapo_loss import DapoConfig
from redone_kernels.linear_dapo import linear_dapo
from redone_kernels.linear_logprob import linear_logprob
from torch import Tensor

H, V = 2048, 151936
CHECKED = 256  # rows compared with fp64
CHUNK = 2048
Row = dict[str, Any]
Inputs = tuple[Tensor, Tensor, Tensor]


def exact(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """fp64 log-probabilities of the first CHECKED rows, and the gradient of their negative mean by hidden."""
    wide, column = weight.double(), target[:CHECKED, None]
    logp = (hidden[:CHECKED].double() @ wide.T).log_softmax(-1)
    picked = logp.gather(1, column)[:, 0]
    d = logp.exp_().scatter_add_(1, column, -torch.ones_like(picked)[:, None])
    return picked, d @ wide / len(column)


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
    return out + [rate(f"ceiling/{k}", milliseconds(product), n, 1) for k, product in products.items()]


def rate(name: str, ms: float, n: int, products: int, **more: Any) -> Row:
    """TFLOP/s over the products a head cannot avoid."""
    return {"name": name, "N": n, "ms": ms, "TFLOP_per_s": products * 2 * n * H * V / ms / 1e9, **more}


def attempt(name: str, measure: Callable[[], Row]) -> Row:
    """`measure()`; where somebody else's kernel fails, a row that says how."""
    try:
        return measure()
    except peers.FAILURES as error:
        if "ours" in name or name.endswith("/naive"):
            raise
        return {"name": name, "failed": f"{type(error).__name__}: {error}"[:300]}


def forward_rows(inputs: Inputs, want: Tensor) -> list[Row]:
    compiled = torch.compile(peers.naive_forward)

    def ours(backend: Literal["chunked", "fused"], entropy: Literal["none", "metric"]) -> Tensor:
        return linear_logprob(*inputs, entropy=entropy, backend=backend, chunk_tokens=CHUNK).logprob

    calls: dict[str, Callable[[], Tensor]] = {
        "naive": lambda: peers.naive_forward(*inputs)[0],
        "naive-compiled": lambda: compiled(*inputs)[0],
        "ours-chunked": lambda: ours("chunked", "metric"),
        "ours-fused": lambda: ours("fused", "metric"),
        "ours-fused-no-entropy": lambda: ours("fused", "none"),
    }
    out = []

    def measure(name: str, call: Callable[[], Tensor]) -> Row:
        error = float((call()[:CHECKED] - want).abs().max())
        row = rate(name, milliseconds(call, 5), inputs[0].shape[0], 1)
        return row | {"max_abs_error": error, "peak_MiB": peak_mib(call)}

    with torch.no_grad():
        for name, call in calls.items():
            out.append(attempt(f"forward/{name}", partial(measure, f"forward/{name}", call)))
            torch.cuda.empty_cache()
    return out


def accuracy(loss: peers.Loss, inputs: Inputs, want: Tensor, dhidden: Tensor) -> Row:
    """Of a mean cross-entropy over the checked rows, against fp64."""
    x = inputs[0][:CHECKED].clone().requires_grad_()
    value = loss(x, inputs[1], inputs[2][:CHECKED])
    value.backward()
    assert x.grad is not None
    return {
        "loss_error": abs(float(value.detach().double() + want.mean())),
        "dhidden_relative_error": float((x.grad.double() - dhidden).norm() / dhidden.norm()),
    }


def training_rows(inputs: Inputs, want: Tensor, dhidden: Tensor) -> list[Row]:
    """Forward and backward. linear_dapo is rated over its 3 products, what recomputes over the same 3."""
    n = inputs[0].shape[0]
    x, w, target = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_(), inputs[2]
    main_grad = torch.zeros(V, H, dtype=torch.float32, device="cuda")
    old, advantage = torch.full((n,), -12.0, device="cuda"), torch.ones(n, device="cuda")
    mask = torch.ones(n, dtype=torch.bool, device="cuda")

    def ours(backend: Literal["chunked", "fused"]) -> peers.Loss:
        def loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
            how: dict[str, Any] = {"chunk_tokens": CHUNK, "wgrad_out": main_grad}
            return -linear_logprob(x, w, target, entropy="metric", backend=backend, **how).logprob.mean()

        return loss

    def dapo(x: Tensor, w: Tensor, target: Tensor, old: Tensor | None = None) -> Tensor:
        """On the policy itself (old None) with advantage 1, its gradient is that of the cross-entropy."""
        m = len(x)
        return linear_dapo(
            x, w, target, old, advantage[:m], mask[:m], float(m), DapoConfig(), chunk_tokens=CHUNK,
            wgrad_out=main_grad,
        ).loss  # fmt: skip

    makers: dict[str, Callable[[], peers.Loss]] = {
        "naive": lambda: peers.naive, "ours-chunked": lambda: ours("chunked"),
        "ours-fused": lambda: ours("fused"), "ours-linear_dapo": lambda: dapo, **peers.find(),
    }  # fmt: skip

    def measure(name: str, make: Callable[[], peers.Loss]) -> Row:
        loss = make()
        checked = accuracy(loss, (x.detach(), w, target), want, dhidden)
        w.grad = None

        def call() -> None:
            (dapo(x, w, target, old) if loss is dapo else loss(x, w, target)).backward()

        row = rate(name, milliseconds(call, 5, 2), n, 3, peak_MiB=peak_mib(call))
        return row | checked

    out = []
    for name, make in makers.items():
        out.append(attempt(f"training/{name}", partial(measure, f"training/{name}", make)))
        x.grad = w.grad = None
        torch.cuda.empty_cache()
    for row in out:
        if row["name"] == "training/ours-linear_dapo":
            del row["loss_error"]  # its value is a surrogate, not a cross-entropy
    return out


def bench(n: int) -> list[Row]:
    torch.manual_seed(0)
    hidden = (torch.randn(n, H, device="cuda") * 4 / H**0.5).bfloat16()
    weight = torch.randn(V, H, device="cuda").bfloat16()
    inputs = hidden, weight, torch.randint(0, V, (n,), device="cuda")
    want, dhidden = exact(*inputs)
    rows = ceilings(hidden, weight)
    torch.cuda.empty_cache()
    return rows + forward_rows(inputs, want) + training_rows(inputs, want, dhidden)
