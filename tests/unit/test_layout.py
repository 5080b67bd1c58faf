"""Layout arithmetic and the reasons for refusing one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from redone.config.schema import ParallelConfig
from redone.layout import (
    Llama3Rope,
    ModelShape,
    check_layout,
    data_parallel_size,
    expert_data_parallel_size,
    layer_ranges,
    nearest_layout,
    padded_vocab,
    padding_multiple,
    token_costs,
    violations,
)

DENSE_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
MOE_CONFIG: dict[str, Any] = {
    **DENSE_CONFIG,
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "rope_scaling": None,
}
DENSE, MOE = ModelShape.from_hf(DENSE_CONFIG), ModelShape.from_hf(MOE_CONFIG)


def sizes(tensor: int = 1, pipeline: int = 1, expert: int = 1, expert_tensor: int = 1) -> ParallelConfig:
    return ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert, expert_tensor=expert_tensor)


def test_shape_from_hugging_face() -> None:
    assert (DENSE.head_dim, DENSE.rope_theta, DENSE.qk_norm, DENSE.num_experts) == (64, 100000.0, False, 0)
    assert (MOE.head_dim, MOE.rope_theta, MOE.qk_norm, MOE.num_experts) == (128, 1e6, True, 128)
    # transformers 5 writes the count under another name
    renamed = {**{k: v for k, v in MOE_CONFIG.items() if k != "num_experts"}, "num_local_experts": 128}
    assert ModelShape.from_hf(renamed) == MOE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "yarn"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"use_sliding_window": True}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers"),
    ],
)
def test_what_we_cannot_reproduce_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelShape.from_hf({**DENSE_CONFIG, **change})


def test_llama3_positions_are_read() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    found = ModelShape.from_hf({**DENSE_CONFIG, "rope_scaling": rope})
    assert found.rope_scaling == Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )


def test_sizes() -> None:
    assert data_parallel_size(sizes(2, 2), 16) == 4
    assert expert_data_parallel_size(sizes(2, 2, 4), 16) == 2
    both = ParallelConfig(tensor=2, context=2, expert=4)
    assert data_parallel_size(both, 8) == 2 and expert_data_parallel_size(both, 8) == 2
    assert padding_multiple(2, 1) == 2 and padding_multiple(2, 4) == 16
    assert padded_vocab(49152, 2) == 49152 and padded_vocab(127, 4) == 128


@pytest.mark.parametrize(
    ("layout", "world", "model"),
    [
        (sizes(), 1, DENSE),
        (sizes(3), 3, DENSE),
        (sizes(1, 2), 4, DENSE),
        (sizes(4, 1, 8), 8, MOE),
        (sizes(1, 1, 8), 16, MOE),
        (sizes(2, 1, 1, 2), 2, MOE),
        (sizes(2, 2, 4), 16, MOE),
        (ParallelConfig(tensor=2, context=2, expert=4), 4, MOE),  # experts over tensor and context ranks
        (ParallelConfig(context=4, pipeline=2), 8, DENSE),
    ],
)
def test_legal_layouts(layout: ParallelConfig, world: int, model: ModelShape) -> None:
    assert check_layout(layout, world, model) == []


@pytest.mark.parametrize(
    ("layout", "world", "model", "words"),
    [
        (sizes(2), 2, DENSE, ("tensor=2", "attention heads (9)", "use 1, 3, 9")),
        (sizes(9), 9, DENSE, ("tensor=9", "key/value heads (3)", "use 1, 3")),
        (sizes(1, 4), 4, DENSE, ("pipeline=4", "layers (30)", "use 1, 2, 3, 5")),
        (sizes(3), 4, DENSE, ("3 x 1 = 3", "world size 4", "use a world size of 3, 6")),
        (sizes(expert=2), 2, DENSE, ("expert=2", "dense", "set it to 1")),
        (sizes(expert=6), 6, MOE, ("expert=6", "model.num_experts=128", "use 1, 2, 4, 8, 16")),
        (sizes(expert=8), 4, MOE, ("expert", "= 8", "world size 4")),
        (sizes(tensor=2), 2, MOE, ("tensor=2", "expert=1", "gradients", "expert_tensor=2")),
        (sizes(4, 1, 2, 5), 40, MOE, ("expert_tensor=5", "768", "use 1, 2, 3, 4")),
    ],
)
def test_illegal_layouts_name_key_value_and_remedy(
    layout: ParallelConfig, world: int, model: ModelShape, words: tuple[str, ...]
) -> None:
    messages = check_layout(layout, world, model)
    assert any(all(word in message for word in words) for message in messages), messages


def test_every_violation_is_reported() -> None:
    broken = dataclasses.replace(MOE, num_layers=47)
    assert len(check_layout(sizes(3, 2, 5), 30, broken)) >= 4


def test_layers_of_chunks_follow_megatrons_order() -> None:
    assert layer_ranges(8, 2, 1) == [[range(0, 4)], [range(4, 8)]]
    assert layer_ranges(8, 2, 2) == [[range(0, 2), range(4, 6)], [range(2, 4), range(6, 8)]]


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (ParallelConfig(context=3), ("tensor x context x pipeline = 1 x 3 x 1", "world size 8", "3, 6")),
        (ParallelConfig(virtual_pipeline=2), ("virtual_pipeline=2", "pipeline > 1")),
        (
            ParallelConfig(pipeline=2, virtual_pipeline=5, expert=4),
            ("2 x 5", "layers (48)", "1, 2, 3, 4, 6, 8"),
        ),
    ],
)
def test_chunks_and_context(layout: ParallelConfig, words: tuple[str, ...]) -> None:
    messages = check_layout(layout, 8, MOE)
    assert any(all(word in message for word in words) for message in messages), messages


@pytest.mark.parametrize(
    ("layout", "world", "model", "nearest"),
    [
        (sizes(8, 1, 8), 8, MOE, "{tensor: 4, expert: 8}"),  # 4 key/value heads
        (sizes(2), 2, MOE, "{tensor: 2, expert_tensor: 2}"),
        (sizes(2), 4, DENSE, "{tensor: 1}"),  # 9 heads, 3 key/value heads: no tensor parallelism on 4 ranks
        (sizes(1, 4), 6, DENSE, "{tensor: 1, pipeline: 3}"),
        (ParallelConfig(context=3, tensor=2, expert=4), 8, MOE, "{tensor: 2, context: 2, expert: 4}"),
    ],
)
def test_the_nearest_legal_layout_is_proposed(
    layout: ParallelConfig, world: int, model: ModelShape, nearest: str
) -> None:
    assert check_layout(layout, world, model)[-1].endswith(f"nearest legal layout is {nearest}")
    found = nearest_layout(layout, world, model)
    assert found is not None and violations(found, world, model) == []


def test_token_costs_of_the_flagship() -> None:
    row, pair = token_costs(MOE)
    assert pair == pytest.approx(1.68e-4, rel=0.01)
    assert row == pytest.approx(2 * 49152 * 2048 / (2 * 48 * 56_885_248), rel=0.01)
