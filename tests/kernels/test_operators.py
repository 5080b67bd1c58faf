"""torch.library.opcheck of every operator: schema, fake tensors, autograd registration, AOT dispatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from redone_kernels import dapo_loss, fp8_blocks, fused, logits, segment_sum

from tests.kernels.cases import Head, tokens

FLOATS = [0.2, 0.28, 3.0, 1.5, 0.05, 0.02]


def dapo_arguments(device: torch.device) -> tuple[Any, ...]:
    t = tokens(40, device)
    t = {k: v.nan_to_num() if v.is_floating_point() else v for k, v in t.items()}
    t["logprob"].requires_grad_()
    names = ["logprob", "old_logprob", "advantage", "mask", "ref_logprob", "rollout_logprob", "entropy"]
    return (*(t[n] for n in names), 7.0, FLOATS, False, 3)


def row_arguments(device: torch.device) -> tuple[Any, ...]:
    target = torch.tensor([1, -100, 30], device=device)
    return target, torch.ones(3, device=device) * 5, *(torch.ones(3, device=device) for _ in range(3))


def arguments(name: str, device: torch.device) -> tuple[Any, tuple[Any, ...]]:
    rows = row_arguments(device)
    x = torch.randn(3, 40, device=device)
    head = Head.random(5, 32, 40, device)
    mask = torch.ones(9, dtype=torch.bool, device=device)
    cu = torch.tensor([0, 4, 9], device=device)
    h = (head.hidden, head.weight, head.target)
    five = [torch.ones(5, device=device) for _ in range(4)]
    return {
        "dapo_loss": lambda: (dapo_loss._op, dapo_arguments(device)),
        "logits_stats": lambda: (logits._stats, (x, rows[0], 0, 40, 1.0, 20)),
        "merge_stats": lambda: (logits._merge, (torch.rand(2, 4, 3, device=device), rows[0])),
        "logits_backward_": lambda: (logits._backward_in_place, (x, *rows, 0, 40, 1.0)),
        "logits_backward_into": lambda: (logits._backward_into, (x, torch.zeros_like(x), *rows, 0, 40, 1.0)),
        "linear_stats": lambda: (fused.linear_stats, (*h, 0, 40, 20, 1.0, True)),
        "linear_dlogits": lambda: (fused.linear_dlogits, (*h, *five, 0, 40, 0, 40, 1.0)),
        "segment_sum": lambda: (segment_sum._op, (torch.randn(9, device=device).requires_grad_(), cu, mask)),
        "segment_spread": lambda: (segment_sum._spread, (torch.randn(2, device=device), cu, mask)),
        "pack_fp8_blocks": lambda: (fp8_blocks._op, ([torch.randn(5, 9, device=device).bfloat16()],)),
    }[name]()


@pytest.mark.parametrize(
    "name",
    [
        "dapo_loss",
        "logits_stats",
        "merge_stats",
        "logits_backward_",
        "logits_backward_into",
        "linear_stats",
        "linear_dlogits",
        "segment_sum",
        "segment_spread",
        "pack_fp8_blocks",
    ],
)
def test_operator(name: str, device: torch.device) -> None:
    operator, args = arguments(name, device)
    torch.library.opcheck(operator, args)
