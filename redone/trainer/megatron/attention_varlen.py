"""Shared-prefix attention in two variable-length flash calls: the CUDA form (bf16 and fp16).

THIS HAS NEVER RUN ON A GPU. The tests check its index arithmetic and its backward on CPU, against a dense
mask, with `varlen_forward` and `varlen_backward` replaced by an emulation of their contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from redone.trainer.megatron.context import Cross, Span


@dataclass(frozen=True, slots=True, eq=False)
class Lengths:
    """Cumulative lengths (int32, from 0) and the largest length of consecutive sequences."""

    cumulative: Tensor
    longest: int


@dataclass(frozen=True, slots=True, eq=False)
class Varlen:
    """The attention plan of one packed row as the flash kernels want it."""

    own: Lengths  # every segment, in row order
    responses: Tensor  # rows of all responses (and of what a context-parallel edge cut off its beginning)
    prompts: Tensor  # rows of the keys that they see: own, or exchanged ones; a row may come twice
    queries: Lengths  # all responses of a piece are one sequence
    keys: Lengths  # their prompts


def make_varlen(spans: Sequence[Span], crosses: Sequence[Cross], device: torch.device) -> Varlen:
    """spans: (start, length) of every segment in row order, covering the row."""

    def lengths(values: Sequence[int]) -> Lengths:
        ends = torch.tensor([0, *values]).cumsum(0).to(device, torch.int32)
        return Lengths(ends, max(values, default=0))

    def rows(ranges: Sequence[tuple[int, int]]) -> Tensor:
        parts = [torch.arange(a, b) for a, b in ranges]
        return (torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)).to(device)

    return Varlen(
        own=lengths([n for _, n in spans]),
        responses=rows([(c.first, c.last) for c in crosses]),
        prompts=rows([(start, start + length) for c in crosses for start, length in c.keys]),
        queries=lengths([c.last - c.first for c in crosses]),
        keys=lengths([sum(length for _, length in c.keys) for c in crosses]),
    )


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, queries: Lengths, keys: Lengths, causal: bool, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """q [Tq, h, d], k and v [Tk, kv, d] -> out [Tq, h, d], log-sum-exp [h, Tq] fp32, RNG state."""
    out, lse, rng, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, queries.cumulative, keys.cumulative, queries.longest, keys.longest, 0.0, causal, False,
        scale=scale,
    )  # fmt: skip
    return out, lse, (rng, unused)


def varlen_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    queries: Lengths,
    keys: Lengths,
    causal: bool,
    scale: float,
    state: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv for a given (not necessarily own) out and lse."""
    result = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, queries.cumulative, keys.cumulative, queries.longest, keys.longest, 0.0,
        causal, *state, scale=scale,
    )  # fmt: skip
    return result[0], result[1], result[2]


class VarlenSharedPrefixAttention(torch.autograd.Function):
    """q [T, h, d], k and v [T, kv, d] -> [T, h, d]. Algorithm and `far` as in attention.py."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, far: Tensor | None, plan: Varlen, scale: float
    ) -> Tensor:
        out, lse, state = varlen_forward(q, k, v, plan.own, plan.own, True, scale)
        states = [state]
        if plan.queries.longest:
            rows = plan.responses
            far_k, far_v = _crossed(k, v, far, plan)
            cross, part, state = varlen_forward(q[rows], far_k, far_v, plan.queries, plan.keys, False, scale)
            states.append(state)
            own = lse[:, rows]
            total = torch.logaddexp(own, part)
            kept, added = ((x - total).exp().T[..., None] for x in (own, part))
            merged = (out[rows] * kept + cross * added).to(out.dtype)
            out, lse = out.index_copy(0, rows, merged), lse.index_copy(1, rows, total)
        ctx.save_for_backward(q, k, v, far, out, lse)
        ctx.plan, ctx.scale, ctx.states = plan, scale, states
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:
        q, k, v, far, out, lse = ctx.saved_tensors
        plan, scale, grad = ctx.plan, ctx.scale, grads[0].contiguous()
        dq, dk, dv = varlen_backward(grad, q, k, v, out, lse, plan.own, plan.own, True, scale, ctx.states[0])
        dfar = None if far is None else torch.zeros_like(far)
        if plan.queries.longest:
            r, p = plan.responses, plan.prompts
            part = lse[:, r].contiguous()
            far_k, far_v = _crossed(k, v, far, plan)
            gq, gk, gv = varlen_backward(
                grad[r],
                q[r],
                far_k,
                far_v,
                out[r],
                part,
                plan.queries,
                plan.keys,
                False,
                scale,
                ctx.states[1],
            )
            dq.index_add_(0, r, gq)
            if dfar is None:
                dk.index_add_(0, p, gk)
                dv.index_add_(0, p, gv)
            else:
                dfar.index_add_(0, p, torch.stack([gk, gv], 1))
        return dq, dk, dv, dfar, None, None


def _crossed(k: Tensor, v: Tensor, far: Tensor | None, plan: Varlen) -> tuple[Tensor, Tensor]:
    """Keys and values that the crosses see, one after the other."""
    if far is None:
        return k[plan.prompts], v[plan.prompts]
    seen = far[plan.prompts]
    return seen[:, 0].contiguous(), seen[:, 1].contiguous()
