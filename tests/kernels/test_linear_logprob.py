"""linear_logprob: the fused and the chunked backend against fp64, and the fused one's bits."""

from __future__ import annotations

import pytest
import torch
from redone_kernels.fused import linear_stats
from redone_kernels.linear_logprob import LogprobOut, linear_logprob
from redone_kernels.logits import merge_stats
from torch import Tensor

from tests.kernels.cases import Head, oracle, relative, worst


def forward(head: Head, backend: str = "fused", **how: object) -> LogprobOut:
    return linear_logprob(
        head.hidden, head.weight, head.target, entropy="metric", backend=backend, **how  # type: ignore[arg-type]
    )  # fmt: skip


def check_forward(head: Head, vocab_size: int | None = None, temperature: float = 1.0) -> None:
    got = forward(head, vocab_size=vocab_size, temperature=temperature)
    want = oracle(head, vocab_size=vocab_size, temperature=temperature)
    largest = float((head.hidden.double() @ head.weight.double().T).abs().max()) / temperature
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert worst(a, b) <= 1e-5 * max(1.0, largest)


@pytest.mark.parametrize(
    ("n", "h", "v"), [(1, 32, 33), (15, 64, 64), (17, 96, 100), (16, 40, 70), (37, 64, 211)]
)
def test_forward_shapes(n: int, h: int, v: int, device: torch.device) -> None:
    check_forward(Head.random(n, h, v, device), temperature=0.7)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "h", "v"), [(64, 256, 1000), (17, 256, 2000)])
def test_forward_larger(n: int, h: int, v: int, device: torch.device) -> None:
    check_forward(Head.random(n, h, v, device))


def test_forward_bf16(device: torch.device) -> None:
    check_forward(Head.random(17, 64, 70, device, dtype=torch.bfloat16))


def test_verl_out_of_range_columns(device: torch.device) -> None:
    """verl #2656: columns past the vocabulary's end counted as logits of 0, here above all the real ones."""
    check_forward(Head.shifted(5, 32, 33, device, -100.0))
    head = Head.shifted(5, 32, 64, device, -50.0)
    head.target.clamp_(max=39)
    head.weight[40:] = 0.0
    check_forward(head, vocab_size=40)


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_verl_logits_near_minus_300(shift: float, device: torch.device) -> None:
    check_forward(Head.shifted(5, 32, 70, device, shift))


def test_one_token_has_all_the_mass(device: torch.device) -> None:
    head = Head.random(4, 32, 40, device, scale=1e-3, ignore=False)
    head.hidden[:, 0], head.weight[:, 0] = 1.0, 0.0
    head.weight[7, 0] = 300.0
    head.target[:] = 7
    got = forward(head)
    assert float(got.logprob.abs().max()) == 0 and float(got.entropy.abs().max()) == 0


def backward(head: Head, backend: str, **how: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by the backend and by fp64 autograd: (hidden, weight, exact hidden, exact weight)."""
    hidden, weight = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
    g, ge = (torch.randn(head.target.shape, device=hidden.device) for _ in range(2))
    out = linear_logprob(hidden, weight, head.target, entropy="grad", backend=backend, temperature=0.7, **how)  # type: ignore[arg-type]
    (out.logprob * g + out.entropy * ge).sum().backward()  # type: ignore[operator]
    exact = Head(head.hidden.double().requires_grad_(), head.weight.double().requires_grad_(), head.target)
    logprob, entropy, _ = oracle(exact, temperature=0.7)
    (logprob * g + entropy * ge).sum().backward()
    into = how.get("wgrad_out")
    return hidden.grad, weight.grad if into is None else into, exact.hidden.grad, exact.weight.grad  # type: ignore[return-value]


@pytest.mark.parametrize("backend", ["fused", "chunked"])
def test_backward(backend: str, device: torch.device) -> None:
    head = Head.random(17, 40, 70, device)
    dx, dw, ex, ew = backward(head, backend, chunk_tokens=9)
    assert relative(dx, ex) <= 2e-6 and relative(dw, ew) <= 2e-6
    assert not dx[head.target < 0].any()


def test_backward_bf16(device: torch.device) -> None:
    dx, dw, ex, ew = backward(Head.random(17, 64, 70, device, dtype=torch.bfloat16), "fused")
    assert relative(dx, ex) <= 1e-2 and relative(dw, ew) <= 1e-2


def test_weight_gradient_accumulates(device: torch.device) -> None:
    into = torch.ones(70, 40, device=device)
    _, dw, _, ew = backward(Head.random(17, 40, 70, device), "fused", wgrad_out=into)
    assert relative(dw, ew + 1.0) <= 2e-6


def test_ignored_rows_may_hold_nan(device: torch.device) -> None:
    head = Head.random(9, 32, 40, device, ignore=False)
    head.target[[2, 8]] = -100
    head.hidden[[2, 8]] = torch.nan
    hidden, weight = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
    out = linear_logprob(hidden, weight, head.target, entropy="grad", backend="fused")
    (out.logprob + out.entropy).sum().backward()
    assert not out.logprob[[2, 8]].any() and not hidden.grad[[2, 8]].any()
    assert all(torch.isfinite(x).all() for x in (*out, hidden.grad, weight.grad))


def shards(head: Head, count: int, splits: int = 8) -> tuple[Tensor, ...]:
    """What `count` tensor-parallel ranks gather and merge."""
    width = head.weight.shape[0] // count
    split = head.weight.shape[0] // splits
    parts = [
        linear_stats(
            head.hidden, head.weight[i * width : (i + 1) * width].contiguous(), head.target, i * width, width,
            split, 0.7, True,
        )
        for i in range(count)
    ]  # fmt: skip
    return merge_stats(torch.cat(parts), head.target)


@pytest.mark.parametrize("v", [320, 8 * 19])
def test_tensor_parallel_bits(v: int, device: torch.device) -> None:
    """1, 2, 4, 8 shards: the same bits, also where a split is no multiple of a tile."""
    head = Head.random(17, 64, v, device)
    whole = shards(head, 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, forward(head, temperature=0.7), strict=True))
    for count in (2, 4, 8):
        assert all(torch.equal(a, b) for a, b in zip(whole, shards(head, count), strict=True))


def test_batch_composition_bits(device: torch.device) -> None:
    """Rows keep their bits when permuted, and when the batch is cut elsewhere."""
    head = Head.random(40, 64, 160, device)
    whole = forward(head)
    order = torch.randperm(40)[:23].to(device)
    some = forward(Head(head.hidden[order].contiguous(), head.weight, head.target[order]))
    assert all(torch.equal(a[order], b) for a, b in zip(whole, some, strict=True))
    cut = [forward(Head(head.hidden[i:j], head.weight, head.target[i:j])) for i, j in ((0, 7), (7, 40))]
    for field in range(3):
        assert torch.equal(whole[field], torch.cat([c[field] for c in cut]))


def test_repeats_to_the_bit(device: torch.device) -> None:
    head = Head.random(17, 64, 70, device)
    assert all(torch.equal(a, b) for a, b in zip(forward(head), forward(head), strict=True))


def test_every_output_is_written(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN: what a kernel left unwritten would show."""
    fresh = torch.Tensor.new_empty

    def poisoned(self: Tensor, *size: object, **how: object) -> Tensor:
        out = fresh(self, *size, **how)  # type: ignore[call-overload]
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    head = Head.random(17, 40, 70, device)
    check_forward(head)
    for backend in ("fused", "chunked"):
        dx, dw, ex, ew = backward(head, backend, chunk_tokens=9)
        assert relative(dx, ex) <= 2e-6 and relative(dw, ew) <= 2e-6


def test_no_rows(device: torch.device) -> None:
    head = Head.random(0, 32, 40, device)
    assert forward(head).logprob.shape == (0,)


def test_refuses(device: torch.device) -> None:
    head = Head.random(3, 32, 40, device)
    with pytest.raises(ValueError, match="temperature"):
        forward(head, temperature=0.0)
    with pytest.raises(ValueError, match="fused"):
        forward(Head(head.hidden.double(), head.weight.double(), head.target))
