"""The reference of the language-model head against the definition, row by row."""

from __future__ import annotations

import pytest
import torch
from redone_kernels.reference import linear_logprob


def problem(dtype: torch.dtype):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=g, dtype=dtype)
    weight = torch.randn(11, 8, generator=g, dtype=dtype)
    return hidden, weight, torch.tensor([0, 3, 9, 1, 1, 4])


@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_linear_logprob_is_log_softmax_over_the_real_vocabulary(temperature):
    hidden, weight, targets = problem(torch.float64)
    found = linear_logprob(hidden, weight, targets, temperature=temperature, vocab_size=10)
    for row, target in enumerate(targets.tolist()):
        exps = torch.stack([torch.exp(hidden[row] @ weight[v] / temperature) for v in range(10)])
        p = exps / exps.sum()
        torch.testing.assert_close(found.logprobs[row], p[target].log(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.entropy[row], -(p * p.log()).sum(), rtol=1e-12, atol=1e-12)


def test_linear_logprob_gradients():
    hidden, weight, targets = problem(torch.float64)

    def value(h, w):
        out = linear_logprob(h, w, targets, temperature=0.7)
        return out.logprobs, out.entropy

    assert torch.autograd.gradcheck(value, (hidden.requires_grad_(), weight.requires_grad_()))


def test_low_precision_inputs_give_fp32():
    hidden, weight, targets = problem(torch.bfloat16)
    out = linear_logprob(hidden, weight, targets)
    assert out.logprobs.dtype == out.entropy.dtype == torch.float32
    exact = linear_logprob(hidden.double(), weight.double(), targets)
    torch.testing.assert_close(out.logprobs.double(), exact.logprobs, rtol=0.02, atol=0.05)
