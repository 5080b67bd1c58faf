"""One name table between Megatron-core and Hugging Face, used by import and by export.

Every rule is a bijection between one Megatron tensor (before tensor-parallel sharding) and one or more
Hugging Face tensors. Layouts: linear_qkv interleaves per key/value head [q_1 .. q_n | k | v]; linear_fc1
stacks [gate; up], and each tensor-parallel rank holds [gate_r; up_r]; embedding rows are padded to a
multiple of the tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from redone.layout import ModelShape, padded_vocab

Kind = Literal["copy", "qkv", "gate_up", "vocab"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One Megatron parameter and the Hugging Face tensors that it holds."""

    mcore: str  # name with global layer and expert numbers
    hf: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    kind: Kind = "copy"
    axis: int | None = None  # sharded dimension; None: replicated
    layer: int | None = None  # None: embedding, final norm, output layer
    expert: int | None = None
    last_stage: bool = False  # of the rules without a layer: on the last pipeline stage (else the first)
    alias: bool = False  # the last stage's copy of a tied embedding: imported, never exported


def rules(shape: ModelShape) -> tuple[Rule, ...]:
    """All parameters of the model, in export order."""
    h, v = shape.hidden, shape.vocab
    table = [
        Rule(
            mcore="embedding.word_embeddings.weight",
            hf=("model.embed_tokens.weight",),
            hf_shapes=((v, h),),
            kind="vocab",
            axis=0,
        )
    ]
    for layer in range(shape.num_layers):
        table += _attention_rules(shape, layer)
        table += _expert_rules(shape, layer) if shape.num_experts else _dense_rules(shape, layer)
    table.append(
        Rule(
            mcore="decoder.final_layernorm.weight",
            hf=("model.norm.weight",),
            hf_shapes=((h,),),
            last_stage=True,
        )
    )
    output = "model.embed_tokens.weight" if shape.tied_embeddings else "lm_head.weight"
    table.append(
        Rule(
            mcore="output_layer.weight",
            hf=(output,),
            hf_shapes=((v, h),),
            kind="vocab",
            axis=0,
            last_stage=True,
            alias=shape.tied_embeddings,
        )
    )
    return tuple(table)


def _attention_rules(shape: ModelShape, layer: int) -> list[Rule]:
    ours, theirs = f"decoder.layers.{layer}.self_attention.", f"model.layers.{layer}.self_attn."
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    table = [
        Rule(
            mcore=ours + "linear_qkv.layer_norm_weight",
            hf=(f"model.layers.{layer}.input_layernorm.weight",),
            hf_shapes=((h,),),
            layer=layer,
        ),
        Rule(
            mcore=ours + "linear_qkv.weight",
            hf=tuple(f"{theirs}{name}_proj.weight" for name in "qkv"),
            hf_shapes=((q, h), (kv, h), (kv, h)),
            kind="qkv",
            axis=0,
            layer=layer,
        ),
        Rule(
            mcore=ours + "linear_proj.weight",
            hf=(theirs + "o_proj.weight",),
            hf_shapes=((h, q),),
            axis=1,
            layer=layer,
        ),
    ]
    if shape.qk_norm:
        table += [
            Rule(
                mcore=f"{ours}{x}_layernorm.weight",
                hf=(f"{theirs}{x}_norm.weight",),
                hf_shapes=((shape.head_dim,),),
                layer=layer,
            )
            for x in "qk"
        ]
    return table


def _mlp_pair(
    ours: tuple[str, str], theirs: str, h: int, f: int, layer: int, expert: int | None
) -> list[Rule]:
    return [
        Rule(
            mcore=ours[0],
            hf=(theirs + "gate_proj.weight", theirs + "up_proj.weight"),
            hf_shapes=((f, h), (f, h)),
            kind="gate_up",
            axis=0,
            layer=layer,
            expert=expert,
        ),
        Rule(
            mcore=ours[1],
            hf=(theirs + "down_proj.weight",),
            hf_shapes=((h, f),),
            axis=1,
            layer=layer,
            expert=expert,
        ),
    ]


def _dense_rules(shape: ModelShape, layer: int) -> list[Rule]:
    ours, theirs = f"decoder.layers.{layer}.mlp.", f"model.layers.{layer}."
    norm = Rule(
        mcore=ours + "linear_fc1.layer_norm_weight",
        hf=(theirs + "post_attention_layernorm.weight",),
        hf_shapes=((shape.hidden,),),
        layer=layer,
    )
    names = (ours + "linear_fc1.weight", ours + "linear_fc2.weight")
    return [norm, *_mlp_pair(names, theirs + "mlp.", shape.hidden, shape.ffn, layer, None)]


def _expert_rules(shape: ModelShape, layer: int) -> list[Rule]:
    ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    table = [
        Rule(
            mcore=ours + "pre_mlp_layernorm.weight",
            hf=(theirs + "post_attention_layernorm.weight",),
            hf_shapes=((shape.hidden,),),
            layer=layer,
        ),
        Rule(
            mcore=ours + "mlp.router.weight",
            hf=(theirs + "mlp.gate.weight",),
            hf_shapes=((shape.num_experts, shape.hidden),),
            layer=layer,
        ),
    ]
    for e in range(shape.num_experts):
        names = (f"{ours}mlp.experts.linear_fc1.weight{e}", f"{ours}mlp.experts.linear_fc2.weight{e}")
        table += _mlp_pair(names, f"{theirs}mlp.experts.{e}.", shape.hidden, shape.moe_ffn, layer, e)
    return table


def local_name(rule: Rule, first_layer: int, first_expert: int) -> str:
    """The parameter's name inside the module of one rank, which counts layers and experts from 0."""
    name = rule.mcore
    if rule.layer is not None:
        name = name.replace(f"layers.{rule.layer}.", f"layers.{rule.layer - first_layer}.", 1)
    if rule.expert is not None:
        stem = name[: len(name) - len(str(rule.expert))]
        name = f"{stem}{rule.expert - first_expert}"
    return name


def shard_shape(rule: Rule, shape: ModelShape, tp: int) -> tuple[int, ...]:
    """Shape of one rank's part of the Megatron tensor."""
    size = list(rule.hf_shapes[0])
    if rule.kind in ("qkv", "gate_up"):
        size[0] = sum(s[0] for s in rule.hf_shapes)
    elif rule.kind == "vocab":
        size[0] = padded_vocab(shape.vocab, tp)
    if rule.axis is not None:
        size[rule.axis] //= tp
    return tuple(size)


def to_shard(rule: Rule, shape: ModelShape, tensors: Sequence[Tensor], tp: int, rank: int) -> Tensor:
    """Hugging Face tensors -> what tensor-parallel rank `rank` of `tp` holds of the Megatron tensor."""
    if rule.kind == "gate_up":
        return torch.cat([t.chunk(tp, 0)[rank] for t in tensors])
    full = tensors[0]
    if rule.kind == "qkv":
        parts = [t.view(shape.kv_heads, -1, shape.hidden) for t in tensors]
        full = torch.cat(parts, 1).reshape(-1, shape.hidden)
    elif rule.kind == "vocab":
        padding = padded_vocab(shape.vocab, tp) - shape.vocab
        full = torch.nn.functional.pad(full, (0, 0, 0, padding)) if padding else full
    return full if rule.axis is None else full.chunk(tp, rule.axis)[rank]


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """One Hugging Face tensor, still in its Megatron tensor's shards (all, in tensor-parallel order)."""

    rule: Rule
    shape: ModelShape
    shards: Sequence[Tensor]
    index: int  # which of the rule's Hugging Face tensors

    def tensor(self) -> Tensor:
        """A view of the one shard where that is the tensor, else a new one."""
        if len(self.shards) == 1 and self.rule.kind != "qkv":
            return self._part(self.shards[0])
        new = self.shards[0].new_empty(self.rule.hf_shapes[self.index])
        self.write(new)
        return new

    def write(self, out: Tensor) -> None:
        """Copy into `out`, of the tensor's shape and any dtype: every byte once, from where it lies."""
        if self.shards[0].device != out.device:  # one transfer of a contiguous tensor
            out.copy_(self.tensor())
            return
        rule = self.rule
        if rule.kind == "qkv":
            out = out.view(self.shape.kv_heads, -1, self.shape.hidden)
        if rule.kind == "vocab":  # the last parts may be padding, whole or in part
            rows = self.shards[0].shape[0]
            parts: Sequence[Tensor] = [out[rows * i : rows * (i + 1)] for i in range(len(self.shards))]
        else:
            parts = (out,) if len(self.shards) == 1 else out.chunk(len(self.shards), rule.axis or 0)
        for part, shard in zip(parts, self.shards, strict=True):
            mine = self._part(shard)
            part.copy_(mine[: part.shape[0]] if rule.kind == "vocab" else mine)

    def _part(self, shard: Tensor) -> Tensor:
        """This tensor's share of one shard, a view; of qkv [heads, rows of a head, hidden]."""
        if self.rule.kind == "gate_up":
            return shard.chunk(2, 0)[self.index]
        if self.rule.kind == "qkv":
            per_head = [s[0] // self.shape.kv_heads for s in self.rule.hf_shapes]
            return shard.view(-1, sum(per_head), self.shape.hidden).split(per_head, 1)[self.index]
        return shard[: self.shape.vocab] if self.rule.kind == "vocab" else shard


def from_shards(rule: Rule, shape: ModelShape, shards: Sequence[Tensor]) -> list[Joined]:
    """The inverse of `to_shard`: all parts in tensor-parallel order -> the Hugging Face tensors."""
    return [Joined(rule, shape, shards, i) for i in range(len(rule.hf))]


def hf_tensors(shape: ModelShape) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of an exported model, in export order."""
    return [
        pair for rule in rules(shape) if not rule.alias for pair in zip(rule.hf, rule.hf_shapes, strict=True)
    ]
