"""logits_stats, merge_stats and logits_backward_ against fp64 on whole logits."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from redone_kernels.logits import logits_backward_, logits_stats, merge_stats
from torch import Tensor

from tests.kernels.cases import relative, worst

NEG = -torch.inf


def exact(logits: Tensor, target: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    x = logits.double() / temperature
    logp = x.log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(logp == NEG, 0.0)).sum(-1)
    return logp.gather(1, target[:, None])[:, 0], entropy, x.logsumexp(-1)


def close(logits: Tensor, target: Tensor, temperature: float = 1.0, **place: int) -> None:
    got = merge_stats(logits_stats(logits, target, temperature=temperature, **place), target)
    bound = 1e-5 * max(1.0, float(logits[logits.isfinite()].abs().max()) / temperature)
    for a, b in zip(got, exact(logits, target, temperature), strict=True):
        assert worst(a, b) <= bound


@pytest.mark.parametrize(("n", "v", "split"), [(1, 33, None), (5, 211, 64), (3, 5000, None), (2, 9000, 4500)])
def test_shapes(n: int, v: int, split: int | None, device: torch.device) -> None:
    logits = (torch.randn(n, v) * 5).to(device)
    target = torch.randint(0, v, (n,)).to(device)
    got = merge_stats(logits_stats(logits, target, split=split, temperature=0.7), target)
    for a, b in zip(got, exact(logits, target, 0.7), strict=True):
        assert worst(a, b) <= 1e-5 * max(1.0, float(logits.abs().max()) / 0.7)


def test_bf16_logits(device: torch.device) -> None:
    close((torch.randn(4, 300) * 5).bfloat16().to(device), torch.randint(0, 300, (4,)).to(device))


@pytest.mark.parametrize("shift", [-300.0, -100.0, 300.0, 0.0])
def test_verl_logits_far_from_zero(shift: float, device: torch.device) -> None:
    """verl's epilogue starts its maximum at 0: near -300 it gives a log-probability of +inf."""
    logits = (torch.randn(4, 100) + shift).to(device)
    target = torch.randint(0, 100, (4,)).to(device)
    close(logits, target)
    parts = torch.cat([logits_stats(logits[:, i : i + 50], target, vocab_start=i) for i in (0, 50)])
    for a, b in zip(merge_stats(parts, target), exact(logits, target), strict=True):
        assert worst(a, b) <= 1e-5 * max(1.0, float(logits.abs().max()))


def test_adversarial_rows(device: torch.device) -> None:
    logits = torch.zeros(6, 97)
    logits[1, 3] = 200.0  # all mass on one token
    logits[2] = torch.randn(97) * 1e3
    logits[3, :50] = NEG  # columns ruled out
    logits[4, 1:] = NEG  # one column left
    logits[5, [7, 90]] = 50.0  # equal maxima
    target = torch.tensor([0, 3, 5, 60, 0, 90])
    logits, target = logits.to(device), target.to(device)
    close(logits, target)
    _, entropy, _ = merge_stats(logits_stats(logits, target), target)
    assert float(entropy[1]) == 0 and float(entropy[4]) == 0
    assert abs(float(entropy[5]) - 0.693147) < 1e-6


def test_uneven_shards_padding_and_ignored_rows(device: torch.device) -> None:
    """Shards of 70, 80, 61 and 40 columns, 200 real ids: the third is cut, the fourth is empty."""
    logits = torch.randn(5, 251).to(device)
    target = torch.tensor([69, 70, 149, 150, -100]).to(device)
    parts, start = [], 0
    for width in (70, 80, 61, 40):
        shard = logits[:, start : start + width]
        parts.append(logits_stats(shard, target, vocab_start=start, vocab_size=200))
        start += width
    got = merge_stats(torch.cat(parts), target)
    want = exact(logits[:, :200], target.clamp(min=0))
    for a, b in zip(got, want, strict=True):
        assert worst(a[:4], b[:4]) <= 1e-5 and float(a[4]) == 0


def test_rows_beyond_2_31_elements(device: torch.device) -> None:
    """The third row starts at element 2^31: offsets must not be 32 bit."""
    stride = 2**30
    store = torch.empty(2 * stride + 64, dtype=torch.bfloat16, device=device)
    logits = store.as_strided((3, 64), (stride, 1))
    logits.copy_(torch.randn(3, 64))
    close(logits, torch.tensor([1, 2, 3], device=device))


def gradient(logits: Tensor, target: Tensor, g: Tensor, ge: Tensor, temperature: float) -> Tensor:
    leaf = logits.double().requires_grad_()
    logprob, entropy, _ = exact(leaf, target.clamp(min=0), temperature)
    keep = target >= 0
    (torch.where(keep, logprob * g.double() + entropy * ge.double(), 0.0)).sum().backward()
    return leaf.grad


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16])
def test_backward(out_dtype: torch.dtype | None, device: torch.device) -> None:
    logits = (torch.randn(6, 130) * 3).to(device)
    logits[5] = torch.nan
    target = torch.tensor([0, 129, 64, 5, 7, -100]).to(device)
    g, ge = torch.randn(6).to(device), torch.randn(6).to(device)
    _, entropy, lse = merge_stats(logits_stats(logits, target, temperature=0.7), target)
    want = gradient(logits[:5], target[:5], g[:5], ge[:5], 0.7)
    out = None if out_dtype is None else torch.full_like(logits, torch.nan, dtype=out_dtype)
    work = logits.clone()
    got = logits_backward_(work, target, lse, entropy, g, ge, temperature=0.7, out=out)
    assert got is (work if out is None else out)
    assert relative(got[:5], want) <= (2e-6 if out is None else 2**-7)
    assert not got[5].any()


def test_backward_zeroes_padding(device: torch.device) -> None:
    logits = torch.randn(3, 64).to(device)
    target = torch.tensor([1, 2, 3], device=device)
    stats = logits_stats(logits, target, vocab_size=50)
    _, entropy, lse = merge_stats(stats, target)
    ones = torch.ones(3, device=device)
    logits[:, 50:] = torch.nan
    got = logits_backward_(logits, target, lse, entropy, ones, vocab_size=50)
    assert not got[:, 50:].any() and torch.isfinite(got).all()
    assert float(got.sum(1).abs().max()) < 1e-6


@pytest.mark.slow
def test_fuzz(device: torch.device) -> None:
    """Random sizes, temperatures, splits and uneven shards; ignored rows and columns at -inf."""
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        n, v, shards = (int(torch.randint(1, top, (), generator=g)) for top in (7, 400, 5))
        temperature = 0.5 + float(torch.rand((), generator=g))
        logits = torch.randn(n, v, generator=g) * 10 ** float(torch.rand((), generator=g) * 2)
        target = torch.randint(0, v, (n,), generator=g)
        gone = torch.rand(n, v, generator=g) < 0.05
        logits[gone.scatter(1, target[:, None], False)] = NEG
        target[torch.rand(n, generator=g) < 0.2] = -100
        cuts = [0, *sorted(torch.randint(0, v + 1, (shards - 1,), generator=g).tolist()), v]
        parts = [
            logits_stats(logits[:, i:j].to(device), target.to(device), vocab_start=i, temperature=temperature)
            for i, j in pairwise(cuts)
        ]
        got = merge_stats(torch.cat(parts), target.to(device))
        want = exact(logits, target.clamp(min=0), temperature)
        bound = 1e-5 * max(1.0, float(logits[logits.isfinite()].abs().max()) / temperature)
        for a, b in zip(got, want, strict=True):
            assert worst(a.cpu(), torch.where(target >= 0, b, 0.0)) <= bound, seed


def test_no_rows(device: torch.device) -> None:
    logits, target = torch.zeros(0, 8, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    assert [x.shape for x in merge_stats(logits_stats(logits, target), target)] == [(0,)] * 3
