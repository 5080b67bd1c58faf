"""The name table is a bijection between Megatron's sharded tensors and the tensors of a model folder."""

from __future__ import annotations

import pytest
import torch

from redone.layout import ModelShape
from redone.trainer.megatron.names import (
    from_shards,
    hf_tensors,
    local_name,
    rules,
    shard_shape,
    to_shard,
)


def make_shape(**changes: object) -> ModelShape:
    values: dict[str, object] = dict(
        family="qwen3", num_layers=2, hidden=24, ffn=20, heads=8, kv_heads=4, head_dim=6, vocab=101,
        max_positions=64, rope_theta=1e4, norm_eps=1e-6, tied_embeddings=False, qk_norm=True,
    )  # fmt: skip
    return ModelShape(**{**values, **changes})  # type: ignore[arg-type]


SHAPES = {
    "dense": make_shape(),
    "tied llama": make_shape(family="llama", tied_embeddings=True, qk_norm=False),
    "one kv head per query": make_shape(kv_heads=8),
    "moe": make_shape(family="qwen3_moe", num_experts=3, experts_per_token=2, moe_ffn=12),
}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_split_and_join_are_inverse(shape: ModelShape, tp: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for rule in rules(shape):
        tensors = [torch.randn(size, generator=generator) for size in rule.hf_shapes]
        shards = [to_shard(rule, shape, tensors, tp, rank) for rank in range(tp)]
        assert {tuple(s.shape) for s in shards} == {shard_shape(rule, shape, tp)}
        joined = from_shards(rule, shape, shards if rule.axis is not None else shards[:1])
        assert all(torch.equal(a.tensor(), b) for a, b in zip(joined, tensors, strict=True)), rule.mcore
        for one, whole in zip(joined, tensors, strict=True):
            one.write(out := torch.full(whole.shape, torch.nan))
            assert torch.equal(out, whole), rule.mcore


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_names_are_unique_on_both_sides(shape: ModelShape) -> None:
    table = rules(shape)
    assert len({r.mcore for r in table}) == len(table)
    names = [name for name, _ in hf_tensors(shape)]
    assert len(set(names)) == len(names)
    assert ("lm_head.weight" in names) is not shape.tied_embeddings


def test_qkv_interleaves_per_key_value_head() -> None:
    """[q_1 .. q_n | k | v] for each head, so a tensor-parallel shard holds whole groups."""
    shape = make_shape()
    rule = next(r for r in rules(shape) if r.kind == "qkv")
    q, k, v = (torch.arange(s[0]).float()[:, None].expand(s).contiguous() for s in rule.hf_shapes)
    shard = to_shard(rule, shape, [q, k + 1000, v + 2000], tp=4, rank=1)
    per = shape.head_dim
    expected = [
        *range(2 * per, 4 * per),
        *range(1000 + per, 1000 + 2 * per),
        *range(2000 + per, 2000 + 2 * per),
    ]
    assert shard[:, 0].tolist() == expected


def test_gate_and_up_stay_paired_on_every_rank() -> None:
    shape = make_shape()
    rule = next(r for r in rules(shape) if r.kind == "gate_up")
    gate, up = torch.zeros(rule.hf_shapes[0]), torch.ones(rule.hf_shapes[1])
    shard = to_shard(rule, shape, [gate, up], tp=2, rank=1)
    assert shard[:, 0].tolist() == [0.0] * 10 + [1.0] * 10


def test_local_names_count_from_zero() -> None:
    shape = make_shape(family="qwen3_moe", num_layers=12, num_experts=16, experts_per_token=2, moe_ffn=12)
    rule = next(r for r in rules(shape) if r.layer == 11 and r.expert == 13)
    assert rule.mcore == "decoder.layers.11.mlp.experts.linear_fc1.weight13"
    assert local_name(rule, 6, 8) == "decoder.layers.5.mlp.experts.linear_fc1.weight5"
