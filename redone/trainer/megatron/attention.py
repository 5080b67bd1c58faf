"""Attention over a packed row in which every response attends to its prompt and to itself.

Each prompt is stored and computed once. Three steps per layer: (1) every segment (prompt, response,
padding) attends causally to itself; (2) the queries of all responses of a piece attend to their prompt's
keys; (3) both are merged through their log-sum-exp. The backward runs the same kernels with the MERGED
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

from redone.trainer.megatron.attention_varlen import Varlen, VarlenSharedPrefixAttention, make_varlen
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
class Cross:
    """Responses at [first, last) attend to the prompt at [start, start + length)."""

    start: int
    length: int
    first: int
    last: int


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPlan:
    """Index arithmetic of one micro-batch, shared by all layers."""

    segments: tuple[Segment, ...]
    blocks: tuple[Block, ...]
    crosses: tuple[Cross, ...]
    varlen: Varlen | None  # on CUDA only


@dataclass(eq=False)
class PackedRow(PackedSeqParams):
    """What the model needs to know of a packed row; travels as Megatron's `packed_seq_params`.

    qkv_format is 'sbhd', with which Megatron applies the rotary table row by row.
    """

    plan: AttentionPlan | None = None
    positions: Tensor | None = None  # [T] int64
    rows: Tensor | None = None  # [N] int64, rows whose hidden state predicts a target
    targets: Tensor | None = None  # [N] int64
    temperature: float = 1.0
    entropy: Literal["none", "value", "grad"] = "none"
    loss: LossRows | None = None  # where the head may make the loss's gradient itself
    token_weight: Tensor | None = None  # [T] fp32, multiplicity in the unshared batch
    routes: Tensor | None = None  # [T, L, K] int16, expert choices to repeat
    record: bool = False  # keep the router's choices


def make_plan(segments: Sequence[Segment], device: torch.device) -> AttentionPlan:
    """Plan the attention calls of one packed row."""
    spans = [span for s in segments for span in ((s.start, s.length), *s.responses)]
    crosses = tuple(
        Cross(s.start, s.length, s.responses[0][0], s.responses[-1][0] + s.responses[-1][1])
        for s in segments
        if s.responses
    )
    if device.type == "cuda":
        return AttentionPlan(tuple(segments), (), crosses, make_varlen(spans, crosses, device))
    blocks = tuple(_block(group) for group in _group_by_length(spans))
    return AttentionPlan(tuple(segments), blocks, crosses, None)


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
    return x[cross.start : cross.start + cross.length].transpose(0, 1)[None]


class SharedPrefixAttention(torch.autograd.Function):
    """q [T, h, d], k and v [T, kv, d] -> [T, h, d], on CPU. The log-sum-exp stays fp32 whatever the dtype."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        repeat, heads = q.shape[1] // k.shape[1], q.shape[1]
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        for block in plan.blocks:
            o, part = _flash(_take(q, block), _take(k, block, repeat), _take(v, block, repeat), True, scale)
            out.index_copy_(0, block.tokens, _tokens(o, block))
            lse.index_copy_(0, block.tokens, _tokens(part, block))
        for cross in plan.crosses:
            here, size = slice(cross.first, cross.last), cross.last - cross.first
            o, part = _flash(_fold(q[here], k.shape[1]), _as_kv(k, cross), _as_kv(v, cross), False, scale)
            part = part[0].reshape(heads, size).T
            total = torch.logaddexp(part, lse[here])
            old, new = (lse[here] - total).exp()[..., None], (part - total).exp()[..., None]
            out[here] = (out[here] * old + _unfold(o, size, heads) * new).to(out.dtype)
            lse[here] = total
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, scale, grad = ctx.plan, ctx.scale, grads[0].contiguous()
        heads, kv_heads = q.shape[1], k.shape[1]
        repeat = heads // kv_heads
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
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
            gq, gk, gv = _flash_backward(g, qq, _as_kv(k, cross), _as_kv(v, cross), o, part, False, scale)
            dq[here] += _unfold(gq, size, heads)
            dk[cross.start : cross.start + cross.length] += gk[0].transpose(0, 1)
            dv[cross.start : cross.start + cross.length] += gv[0].transpose(0, 1)
        return dq, dk, dv, None, None


def _padded(x: Tensor, block: Block, fill: float) -> Tensor:
    """`_take` of [T, h] or [T, h, d] with `fill` in the padding slots.

    Zero gradients and a huge log-sum-exp make padding rows contribute exactly nothing.
    """
    y = x.new_full((block.count * block.length, *x.shape[1:]), fill)
    y.index_copy_(0, block.slots, x.index_select(0, block.tokens))
    return y.view(block.count, block.length, *x.shape[1:]).transpose(1, 2)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], scale: float) -> Tensor:
    """The definition: one [T, T] mask. Used for fp32 on CUDA and to test the others."""
    mask = torch.zeros(q.shape[0], q.shape[0], dtype=torch.bool, device=q.device)
    for s in segments:
        for start, length in ((s.start, s.length), *s.responses):
            mask[start : start + length, start : start + length] = True
        for start, length in s.responses:
            mask[start : start + length, s.start : s.start + s.length] = True
    qq, kk, vv = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        qq, kk, vv, attn_mask=mask.tril(), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
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
        if plan.varlen is None:
            out = SharedPrefixAttention.apply(q, k, v, plan, self.scale)
        elif q.dtype == torch.float32:
            out = dense_attention(q, k, v, plan.segments, self.scale)
        else:
            out = VarlenSharedPrefixAttention.apply(q, k, v, plan.varlen, self.scale)
        return out.reshape(out.shape[0], 1, -1)
