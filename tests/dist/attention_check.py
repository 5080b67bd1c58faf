"""The shared-prefix attention functions against one dense mask, outputs and gradients, on CPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from redone.types import Segment

SCALE, HEADS, KV_HEADS, DIM = 0.3, 4, 2, 32
# One-token prompt, one-token responses, a lone response, equal and unequal lengths, padding.
LENGTHS = ((33, (5,) * 6), (1, (9, 4, 1)), (25, (12,)), (40, (7, 1, 12, 12, 3)), (3, ()))


def segments() -> list[Segment]:
    result, at = [], 0
    for prompt, responses in LENGTHS:
        starts = [at + prompt + sum(responses[:i]) for i in range(len(responses))]
        pairs = tuple(zip(starts, responses, strict=True))
        result.append(Segment(start=at, length=prompt, responses=pairs))
        at += prompt + sum(responses)
    return result


def compare(dtype: torch.dtype, varlen: bool, size: int = 1) -> dict[str, float]:
    """Relative error of output, dq, dk and dv against the dense mask in fp64, the row cut over `size` ranks.

    "mask" is the share of plan_mask's entries that differ from the definition's.
    """
    from redone.trainer.megatron import attention, attention_varlen
    from redone.trainer.megatron.context import own_tokens

    tokens = sum(p + sum(r) for p, r in LENGTHS)
    padding = -tokens % (2 * size)
    layout = [*segments(), *([Segment(start=tokens, length=padding, responses=())] if padding else [])]
    tokens += padding
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    q, k, v, grad = (torch.randn(tokens, n, DIM, generator=generator).to(dtype) for n in heads)
    owned = [torch.from_numpy(own_tokens(tokens, r, size)) for r in range(size)]
    plans = [attention.make_plan(layout, torch.device("cpu"), r, size) for r in range(size)]

    def exchanged(x: Tensor, rank: int) -> Tensor | None:
        """What the ranks' all-gather would give."""
        sent = [p.exchange and x[own][p.exchange.send] for p, own in zip(plans, owned, strict=True)]
        return plans[rank].exchange and torch.cat(sent)[plans[rank].exchange.order]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        for rank, (plan, own) in enumerate(zip(plans, owned, strict=True)):
            function, index = attention.SharedPrefixAttention, plan
            if varlen:
                function = attention_varlen.VarlenSharedPrefixAttention
                index = attention_varlen.make_varlen(plan.spans, plan.crosses, torch.device("cpu"))
            far = exchanged(torch.stack([k, v], 1), rank)
            out = out.index_copy(0, own, function.apply(q[own], k[own], v[own], far, index, SCALE))
        return out

    def run(function: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        out.backward(grad.to(out.dtype))
        return [x.double() for x in (out.detach(), *(leaf.grad for leaf in leaves))]

    if varlen:
        attention_varlen.varlen_forward = _emulated_forward
        attention_varlen.varlen_backward = _emulated_backward
    mask = attention.dense_mask(layout, tokens)
    dense = run(
        lambda q, k, v: attention.dense_attention(q, k, v, mask, SCALE),
        tuple(x.double() for x in (q, k, v)),
    )
    mine = run(ours, (q, k, v))
    names = ("out", "dq", "dk", "dv")
    errors = {n: float((a - b).norm() / b.norm()) for n, a, b in zip(names, mine, dense, strict=True)}
    return errors | {"mask": _wrong_mask(mask, plans, owned, exchanged)}


def _wrong_mask(mask: Tensor, plans: Any, owned: list[Tensor], exchanged: Any) -> float:
    wrong = 0.0
    for rank, (plan, own) in enumerate(zip(plans, owned, strict=True)):
        from redone.trainer.megatron.attention import plan_mask

        far = exchanged(torch.arange(len(mask)), rank)
        columns = own if far is None else torch.cat([own, far])
        found = torch.zeros(len(own), len(mask)).index_add(1, columns, plan_mask(plan).float())
        wrong += float((found != mask[own].float()).float().mean()) / len(plans)
    return wrong


def shares(size: int) -> dict[str, list[int]]:
    """Per context rank: query-key pairs of one long sequence, and exchanged rows of a prompt of 48 * size
    tokens with as many tokens of answers, none of which an edge cuts."""
    from redone.trainer.megatron import context

    half = 48 * size
    starts = range(half, 2 * half, 8)
    star = [Segment(start=0, length=half, responses=tuple((s, 8) for s in starts))]
    pairs, rows = [], []
    for rank in range(size):
        mine = context.cut([Segment(start=0, length=2 * half, responses=())], rank, size)
        seen = [(c.last - c.first) * sum(n for _, n in c.keys) for c in mine.crosses]
        pairs.append(sum(n * (n + 1) // 2 for _, n in mine.spans) + sum(seen))
        exchange = context.plan(star, rank, size, torch.device("cpu"))[1]
        rows.append(0 if exchange is None else len(exchange.order))
    return {"pairs": pairs, "rows": rows, "prompt": [half], "row": [2 * half]}


def _sequences(queries: Any, keys: Any) -> list[tuple[slice, slice]]:
    ends, other = queries.cumulative.tolist(), keys.cumulative.tolist()
    assert queries.longest == max(b - a for a, b in pairwise(ends))
    pairs = zip(pairwise(ends), pairwise(other), strict=True)
    return [(slice(*a), slice(*b)) for a, b in pairs]


def _heads_first(x: Tensor, repeat: int = 1) -> Tensor:
    return x.transpose(0, 1).repeat_interleave(repeat, 0)[None]


def _emulated_forward(
    q: Tensor, k: Tensor, v: Tensor, queries: Any, keys: Any, causal: bool, scale: float
) -> Any:
    """The contract of the variable-length flash forward, one sequence at a time."""
    from redone.trainer.megatron.attention import _flash

    repeat = q.shape[1] // k.shape[1]
    outs, sums = [], []
    for a, b in _sequences(queries, keys):
        out, lse = _flash(
            _heads_first(q[a]), _heads_first(k[b], repeat), _heads_first(v[b], repeat), causal, scale
        )
        outs.append(out[0].transpose(0, 1))
        sums.append(lse[0])
    return torch.cat(outs), torch.cat(sums, 1), (torch.zeros(2), torch.zeros(()))


def _emulated_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, queries: Any, keys: Any,
    causal: bool, scale: float, state: Any,
) -> Any:  # fmt: skip
    from redone.trainer.megatron.attention import _flash_backward

    repeat = q.shape[1] // k.shape[1]
    parts: list[list[Tensor]] = [[], [], []]
    for a, b in _sequences(queries, keys):
        gq, gk, gv = _flash_backward(
            _heads_first(grad[a].contiguous()), _heads_first(q[a]), _heads_first(k[b], repeat),
            _heads_first(v[b], repeat), _heads_first(out[a]), lse[None, :, a], causal, scale,
        )  # fmt: skip
        parts[0].append(gq[0].transpose(0, 1))
        for i, g in ((1, gk), (2, gv)):
            parts[i].append(g[0].transpose(0, 1).unflatten(1, (k.shape[1], repeat)).sum(2))
    return tuple(torch.cat(p) for p in parts)
