"""Attention over a packed row in which every response attends to its prompt and to itself.

Each prompt is stored and computed once. Three steps per layer: (1) every segment (prompt, response,
padding) attends causally to itself; (2) the queries of all responses of a piece attend to their prompt's
keys; (3) both are merged through their log-sum-exp. Under context parallelism a rank has its own rows only;
the keys of (2) are then exchanged (context.py), and the earlier part of a segment cut by a rank's edge is
among them. The backward runs the same kernels with the MERGED
output and log-sum-exp, which is exact, because P = exp(S - lse_total) and D = rowsum(dO * O_total) hold for
each part alone. (Letting autograd differentiate the merge would lose d(lse), which the flash kernels'
backward ignores: wrong dq and dk with a right output.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from redone.trainer.megatron import context
from redone.trainer.megatron.attention_varlen import Varlen, VarlenSharedPrefixAttention, make_varlen
from redone.trainer.megatron.context import Cross, Exchange, Span
from redone.trainer.megatron.token_loss import LossRows
from redone.types import Segment

MAX_PADDING = 0.25  # segments of unlike length are batched together up to this share of padding


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """`count` segments padded to `length`, for one batched causal call."""

    count: int
    length: int
    gather: Tensor  # [count * length] row to read; 0 where the slot is padding
    slots: Tensor  # [n] slots that hold a token
    tokens: Tensor  # [n] the row that each of these slots stands for


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """Index arithmetic of one micro-batch on this rank, shared by all layers. Rows are this rank's own."""

    segments: tuple[Segment, ...]  # of the whole row
    spans: tuple[Span, ...]  # what attends causally to itself
    blocks: tuple[Block, ...]  # the same, batched; on CPU only
    crosses: tuple[Cross, ...]  # keys are own rows, or exchanged rows where there is an exchange
    varlen: Varlen | None  # on CUDA only
    exchange: Exchange | None  # under context parallelism, unless no query needs another rank's keys


@dataclass(eq=False)
class PackedRow(PackedSeqParams):
    """What the model needs to know of a packed row (T, N: this rank's part of it, under context parallelism);
    travels as Megatron's `packed_seq_params`.

    qkv_format is 'sbhd', with which Megatron applies the rotary table row by row.
    """

    plan: AttentionPlan | None = None
    positions: Tensor | None = None  # [T] int64
    rows: Tensor | None = None  # [N] int64, own rows whose hidden state predicts a target
    targets: Tensor | None = None  # [N] int64
    temperature: float = 1.0
    entropy: Literal["none", "value", "grad"] = "none"
    loss: LossRows | None = None  # where the head may make the loss's gradient itself
    token_weight: Tensor | None = None  # [T] fp32, multiplicity in the unshared batch
    routes: Tensor | None = None  # [T, L, K] int16, expert choices to repeat
    record: bool = False  # keep the router's choices


def make_plan(
    segments: Sequence[Segment], device: torch.device, rank: int = 0, size: int = 1
) -> AttentionPlan:
    """Plan the attention calls of one packed row, for `rank` of a context group of `size`."""
    mine, exchange = context.plan(segments, rank, size, device)
    blocks: tuple[Block, ...] = ()
    varlen = None
    if device.type == "cuda":
        varlen = make_varlen(mine.spans, mine.crosses, device)
    else:
        blocks = tuple(_block(group) for group in _group_by_length(mine.spans))
    return AttentionPlan(tuple(segments), mine.spans, blocks, mine.crosses, varlen, exchange)


def _group_by_length(spans: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Spans of nearly equal length together, longest first; at most MAX_PADDING of a group is padding."""
    group: list[tuple[int, int]] = []
    real = 0
    for span in sorted(spans, key=lambda s: (-s[1], s[0])):
        if group and group[0][1] * (len(group) + 1) > (1 + MAX_PADDING) * (real + span[1]):
            yield group
            group, real = [], 0
        group.append(span)
        real += span[1]
    if group:
        yield group


def _block(spans: Sequence[tuple[int, int]]) -> Block:
    starts = torch.tensor([s for s, _ in spans])
    lengths = torch.tensor([n for _, n in spans])
    length = int(lengths.max())
    offsets = torch.arange(length)
    real = offsets[None] < lengths[:, None]
    index = (starts[:, None] + offsets[None]).masked_fill(~real, 0).flatten()
    slots = real.flatten().nonzero().squeeze(1)
    return Block(len(spans), length, index, slots, index[slots])


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q, k, v [b, h, s, d] -> out [b, h, s, d], log-sum-exp [b, h, s] fp32."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # The kernel reads lse through the strides of its own forward: [b, s, h] in memory.
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, scale=scale
    )
    return result[0], result[1], result[2]


def _take(x: Tensor, block: Block, repeat: int = 1) -> Tensor:
    """[T, h, d] -> [count, h * repeat, length, d]."""
    x = x.index_select(0, block.gather).view(block.count, block.length, *x.shape[1:]).transpose(1, 2)
    return x.repeat_interleave(repeat, 1) if repeat > 1 else x


def _tokens(x: Tensor, block: Block) -> Tensor:
    """[count, h, length, ...] -> [n, h, ...]: the slots that hold a token."""
    return x.transpose(1, 2).reshape(block.count * block.length, x.shape[1], *x.shape[3:])[block.slots]


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """[s, h, d] -> [1, kv_heads, (h / kv_heads) * s, d]: grouped queries become rows (non-causal only)."""
    s, h, d = x.shape
    return x.view(s, kv_heads, h // kv_heads, d).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, d)


def _unfold(x: Tensor, s: int, heads: int) -> Tensor:
    """Inverse of `_fold`: [1, kv_heads, n * s, d] -> [s, h, d]."""
    kv_heads, d = x.shape[1], x.shape[3]
    return x[0].view(kv_heads, heads // kv_heads, s, d).permute(2, 0, 1, 3).reshape(s, heads, d)


def _as_kv(x: Tensor, cross: Cross) -> Tensor:
    """[K, kv, d] -> [1, kv, n, d]: the keys that a cross sees."""
    parts = [x[start : start + length] for start, length in cross.keys]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1)[None]


class SharedPrefixAttention(torch.autograd.Function):
    """q [T, h, d], k and v [T, kv, d] -> [T, h, d], on CPU. The log-sum-exp stays fp32 whatever the dtype.

    far [K, 2, kv, d]: exchanged keys and values, which the crosses see; None: they see k and v.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, far: Tensor | None, plan: AttentionPlan, scale: float
    ) -> Tensor:
        repeat, heads = q.shape[1] // k.shape[1], q.shape[1]
        far_k, far_v = (k, v) if far is None else far.unbind(1)
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        for block in plan.blocks:
            o, part = _flash(_take(q, block), _take(k, block, repeat), _take(v, block, repeat), True, scale)
            out.index_copy_(0, block.tokens, _tokens(o, block))
            lse.index_copy_(0, block.tokens, _tokens(part, block))
        for cross in plan.crosses:
            here, size = slice(cross.first, cross.last), cross.last - cross.first
            o, part = _flash(
                _fold(q[here], k.shape[1]), _as_kv(far_k, cross), _as_kv(far_v, cross), False, scale
            )
            part = part[0].reshape(heads, size).T
            total = torch.logaddexp(part, lse[here])
            old, new = (lse[here] - total).exp()[..., None], (part - total).exp()[..., None]
            out[here] = (out[here] * old + _unfold(o, size, heads) * new).to(out.dtype)
            lse[here] = total
        ctx.save_for_backward(q, k, v, far, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:
        q, k, v, far, out, lse = ctx.saved_tensors
        plan, scale, grad = ctx.plan, ctx.scale, grads[0].contiguous()
        heads, kv_heads = q.shape[1], k.shape[1]
        repeat = heads // kv_heads
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dfar = None if far is None else torch.zeros_like(far)
        far_k, far_v = (k, v) if far is None else far.unbind(1)
        far_dk, far_dv = (dk, dv) if dfar is None else dfar.unbind(1)
        for block in plan.blocks:
            g, o, part = _padded(grad, block, 0.0), _take(out, block), _padded(lse, block, 1e30)
            kk, vv = _take(k, block, repeat), _take(v, block, repeat)
            gq, gk, gv = _flash_backward(g, _take(q, block), kk, vv, o, part, True, scale)
            dq.index_copy_(0, block.tokens, _tokens(gq, block))
            for target, value in ((dk, gk), (dv, gv)):
                summed = value.unflatten(1, (kv_heads, repeat)).sum(2)
                target.index_copy_(0, block.tokens, _tokens(summed, block))
        for cross in plan.crosses:
            here, size = slice(cross.first, cross.last), cross.last - cross.first
            part = lse[here].T.reshape(1, kv_heads, -1)
            g, qq, o = (_fold(x[here], kv_heads) for x in (grad, q, out))
            kk, vv = _as_kv(far_k, cross), _as_kv(far_v, cross)
            gq, gk, gv = _flash_backward(g, qq, kk, vv, o, part, False, scale)
            dq[here] += _unfold(gq, size, heads)
            lengths = [length for _, length in cross.keys]
            for target, value in ((far_dk, gk), (far_dv, gv)):
                for (start, length), summed in zip(cross.keys, value.split(lengths, 2), strict=True):
                    target[start : start + length] += summed[0].transpose(0, 1)
        return dq, dk, dv, dfar, None, None


def _padded(x: Tensor, block: Block, fill: float) -> Tensor:
    """`_take` of [T, h] or [T, h, d] with `fill` in the padding slots.

    Zero gradients and a huge log-sum-exp make padding rows contribute exactly nothing.
    """
    y = x.new_full((block.count * block.length, *x.shape[1:]), fill)
    y.index_copy_(0, block.slots, x.index_select(0, block.tokens))
    return y.view(block.count, block.length, *x.shape[1:]).transpose(1, 2)


def dense_mask(segments: Sequence[Segment], tokens: int) -> Tensor:
    """The definition: [T, T] bool, which query sees which key."""
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for s in segments:
        for start, length in ((s.start, s.length), *s.responses):
            mask[start : start + length, start : start + length] = True
        for start, length in s.responses:
            mask[start : start + length, s.start : s.start + s.length] = True
    return mask.tril()


def plan_mask(plan: AttentionPlan) -> Tensor:
    """The same as the plan has it: [T, T], or [T, T + K] with the exchanged keys behind the own ones."""
    tokens = sum(length for _, length in plan.spans)
    far = 0 if plan.exchange is None else tokens
    total = tokens if plan.exchange is None else tokens + len(plan.exchange.order)
    mask = torch.zeros(tokens, total, dtype=torch.bool)
    for start, length in plan.spans:
        mask[start : start + length, start : start + length] = True
    mask[:, :tokens].tril_()
    for cross in plan.crosses:
        for start, length in cross.keys:
            mask[cross.first : cross.last, far + start : far + start + length] = True
    return mask


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q [T, h, d], k and v [K, kv, d], mask [T, K]. Used for fp32 on CUDA and to test the others."""
    qq, kk, vv = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        qq, kk, vv, attn_mask=mask.to(q.device), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)


class SharedPrefixCoreAttention(torch.nn.Module):
    """Megatron's core-attention slot: [T, 1, h, d] in, [T, 1, h * d] out; needs a PackedRow."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale or (config.kv_channels or 0) ** -0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
    ) -> Tensor:
        assert isinstance(packed_seq_params, PackedRow) and packed_seq_params.plan is not None
        plan = packed_seq_params.plan
        q, k, v = query[:, 0], key[:, 0], value[:, 0]
        far = None if plan.exchange is None else context.gather_keys(k, v, plan.exchange)
        if plan.varlen is None:
            out = SharedPrefixAttention.apply(q, k, v, far, plan, self.scale)
        elif q.dtype == torch.float32:
            if far is not None:
                k, v = torch.cat([k, far[:, 0]]), torch.cat([v, far[:, 1]])
            out = dense_attention(q, k, v, plan_mask(plan), self.scale)
        else:
            out = VarlenSharedPrefixAttention.apply(q, k, v, far, plan.varlen, self.scale)
        return out.reshape(out.shape[0], 1, -1)
