"""Parallel layout arithmetic: what a set of parallel sizes means, and whether it is legal.

Imports nothing of ours. Ranks are ordered as Megatron-core orders them: tensor fastest, context, data,
pipeline. Experts have groups of their own over the same ranks: expert_tensor fastest, expert, data, pipeline.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

FAMILIES = ("qwen3", "qwen3_moe", "llama")
NAMES = ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")


class ParallelSizes(Protocol):
    """Anything with these sizes, for instance config.schema.ParallelConfig."""

    @property
    def tensor(self) -> int: ...
    @property
    def pipeline(self) -> int: ...
    @property
    def expert(self) -> int: ...
    @property
    def expert_tensor(self) -> int: ...
    @property
    def virtual_pipeline(self) -> int: ...
    @property
    def context(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Parallel sizes that nobody configured: a proposal."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """rope_type "llama3": long wavelengths are divided by `factor`, middle ones by a mixture."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the layout, the name table and the planner need to know of a model."""

    family: str  # one of FAMILIES
    num_layers: int
    hidden: int
    ffn: int  # of a dense MLP
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int  # rows of the embedding in the model folder
    max_positions: int
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    qk_norm: bool
    num_experts: int = 0  # 0: dense
    experts_per_token: int = 0
    moe_ffn: int = 0
    norm_topk_prob: bool = True
    rope_scaling: Llama3Rope | None = None

    @staticmethod
    def from_hf(config: Mapping[str, Any]) -> ModelShape:
        """From the mapping in config.json. Raises ValueError on anything that we do not reproduce exactly."""
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"model_type={family!r} is not supported; use one of {', '.join(FAMILIES)}")
        _refuse_unsupported(config)
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        rope = config.get("rope_parameters") or {}
        moe = family == "qwen3_moe"
        experts = config.get("num_local_experts", config.get("num_experts", 0))
        return ModelShape(
            family=family,
            num_layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            ffn=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocab=int(config["vocab_size"]),
            max_positions=int(config["max_position_embeddings"]),
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            norm_eps=float(config["rms_norm_eps"]),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            qk_norm=family.startswith("qwen3"),
            num_experts=int(experts) if moe else 0,
            experts_per_token=int(config["num_experts_per_tok"]) if moe else 0,
            moe_ffn=int(config["moe_intermediate_size"]) if moe else 0,
            norm_topk_prob=bool(config.get("norm_topk_prob", False)) if moe else True,
            rope_scaling=_rope_scaling(config),
        )


def _rope_scaling(config: Mapping[str, Any]) -> Llama3Rope | None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_type={kind!r} is not supported; only default and llama3 are")
    return Llama3Rope(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=int(rope["original_max_position_embeddings"]),
    )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Options of the three families that would silently change the computation."""
    if config.get("use_sliding_window") or set(config.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError("sliding-window attention is not supported")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ValueError(f"{key}=true is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={config['hidden_act']!r} is not supported; only silu is")
    if config.get("model_type") == "qwen3_moe" and (
        config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1
    ):
        raise ValueError(
            "a mixture of dense and expert layers (mlp_only_layers, decoder_sparse_step) is not supported"
        )


def data_parallel_size(sizes: ParallelSizes, world_size: int) -> int:
    """Replicas of the dense part, which get different micro-batches."""
    return world_size // (sizes.tensor * sizes.context * sizes.pipeline)


def expert_data_parallel_size(sizes: ParallelSizes, world_size: int) -> int:
    """Replicas of one expert."""
    return world_size // (sizes.expert_tensor * sizes.expert * sizes.pipeline)


FP8_TOKENS = 16  # rows of an fp8 matrix product come in multiples of it


def padding_multiple(tensor: int, context: int, fp8: bool = False) -> int:
    """Packed rows are padded to a multiple of so many tokens: each context rank holds two equal chunks, and
    each tensor rank the same share of them."""
    own = tensor * (FP8_TOKENS if fp8 else 1)
    return own if context == 1 else 2 * context * own


def padded_vocab(vocab: int, tensor: int) -> int:
    """Embedding rows after padding to a multiple of the tensor parallel size."""
    return -(-vocab // tensor) * tensor


def layer_ranges(layers: int, pipeline: int, virtual: int) -> list[list[range]]:
    """ranges[stage][chunk]: the layers that each chunk of each pipeline stage holds, in Megatron's order."""
    count = layers // (pipeline * virtual)
    return [
        [range(first, first + count) for first in range(stage * count, layers, pipeline * count)]
        for stage in range(pipeline)
    ]


def check_layout(sizes: ParallelSizes, world_size: int, model: ModelShape) -> list[str]:
    """Every reason why `model` cannot be trained on `world_size` ranks with these sizes; empty when it can.

    Each message names the key, the value and a remedy; the last one proposes the nearest legal layout.
    """
    errors = violations(sizes, world_size, model)
    if errors and (near := nearest_layout(sizes, world_size, model)):
        errors.append(f"trainer.parallel: the nearest legal layout is {describe(near)}")
    return errors


def describe(sizes: ParallelSizes) -> str:
    """The sizes that are not 1, as in the configuration."""
    named = {name: getattr(sizes, name) for name in NAMES}
    return "{" + ", ".join(f"{n}: {v}" for n, v in named.items() if v != 1 or n == "tensor") + "}"


def nearest_layout(sizes: ParallelSizes, world_size: int, model: ModelShape) -> Sizes | None:
    """The legal layout on as many ranks that takes the fewest doublings (those that keep tensor first)."""
    best: tuple[float, int, Sizes] | None = None
    wanted = [getattr(sizes, name) for name in NAMES]
    options = [_divisors_of(world_size) for _ in range(2)]
    virtual = _divisors_of(model.num_layers)
    experts = _divisors_of(model.num_experts) if model.num_experts else [1]
    contexts = [c for c in options[0] if c <= max(1, sizes.context)]
    for tensor, pipeline, context in itertools.product(*options, contexts):
        for chunks, expert, inner in itertools.product(
            [v for v in virtual if v <= max(1, sizes.virtual_pipeline)], experts, {1, tensor}
        ):
            found = Sizes(
                tensor=tensor, pipeline=pipeline, virtual_pipeline=chunks, context=context, expert=expert,
                expert_tensor=inner,
            )  # fmt: skip
            values = [getattr(found, name) for name in NAMES]
            away = sum(abs(math.log2(a / b)) for a, b in zip(values, wanted, strict=True))
            key = (away, abs(tensor - sizes.tensor))
            if (best is None or key < best[:2]) and not violations(found, world_size, model):
                best = (*key, found)
    return best[2] if best else None


def violations(sizes: ParallelSizes, world_size: int, model: ModelShape) -> list[str]:
    """`check_layout` without the proposal."""
    key = "trainer.parallel"
    errors = _check_world(sizes, world_size)
    for name, value, what, total in (
        ("tensor", sizes.tensor, "attention heads", model.heads),
        ("tensor", sizes.tensor, "key/value heads", model.kv_heads),
        ("tensor", sizes.tensor, "the MLP width", model.ffn if not model.num_experts else sizes.tensor),
        ("tensor", sizes.tensor, "the hidden size", model.hidden),
        ("pipeline", sizes.pipeline, "layers", model.num_layers),
    ):
        if total % value:
            errors.append(f"{key}.{name}={value} does not divide {what} ({total}); use {_divisors(total)}")
    errors += _check_chunks(sizes, model)
    return errors + (_check_experts(sizes, model) if model.num_experts else _check_dense(sizes))


def _check_chunks(sizes: ParallelSizes, model: ModelShape) -> list[str]:
    errors = []
    virtual, pipeline = sizes.virtual_pipeline, sizes.pipeline
    if virtual > 1 and pipeline == 1:
        errors.append(
            f"trainer.parallel.virtual_pipeline={virtual} needs trainer.parallel.pipeline > 1; set it to 1"
        )
    elif virtual > 1 and model.num_layers % (pipeline * virtual):
        per_stage = model.num_layers // pipeline
        errors.append(
            f"trainer.parallel.pipeline x virtual_pipeline = {pipeline} x {virtual} does not divide layers"
            f" ({model.num_layers}); use virtual_pipeline {_divisors(per_stage)}"
        )
    return errors


def _check_world(sizes: ParallelSizes, world_size: int) -> list[str]:
    world = f"the world size {world_size} (cluster.nodes x cluster.gpus_per_node)"
    dense = sizes.tensor * sizes.context * sizes.pipeline
    if world_size % dense:
        names, values = "tensor x pipeline", f"{sizes.tensor} x {sizes.pipeline}"
        if sizes.context > 1:
            names, values = (
                "tensor x context x pipeline",
                f"{sizes.tensor} x {sizes.context} x {sizes.pipeline}",
            )
        return [
            f"trainer.parallel.{names} = {values} = {dense}"
            f" does not divide {world}; use a world size of {dense}, {2 * dense}, ..."
        ]
    experts = sizes.expert_tensor * sizes.expert * sizes.pipeline
    if world_size % experts:
        return [
            f"trainer.parallel.expert_tensor x expert x pipeline = {sizes.expert_tensor} x {sizes.expert}"
            f" x {sizes.pipeline} = {experts} does not divide {world}; lower trainer.parallel.expert"
            f" or use a world size of {experts}, {2 * experts}, ..."
        ]
    return []


def _check_dense(sizes: ParallelSizes) -> list[str]:
    return [
        f"trainer.parallel.{name}={value} needs a mixture-of-experts model; this model is dense: set it to 1"
        for name, value in (("expert", sizes.expert), ("expert_tensor", sizes.expert_tensor))
        if value != 1
    ]


def _check_experts(sizes: ParallelSizes, model: ModelShape) -> list[str]:
    errors = []
    if model.num_experts % sizes.expert:
        errors.append(
            f"trainer.parallel.expert={sizes.expert} does not divide model.num_experts={model.num_experts};"
            f" use {_divisors(model.num_experts)}"
        )
    if model.moe_ffn % sizes.expert_tensor:
        errors.append(
            f"trainer.parallel.expert_tensor={sizes.expert_tensor} does not divide the expert width"
            f" ({model.moe_ffn}); use {_divisors(model.moe_ffn)}"
        )
    if sizes.expert == 1 and sizes.expert_tensor != sizes.tensor:
        errors.append(
            f"trainer.parallel.tensor={sizes.tensor} with expert=1 and expert_tensor={sizes.expert_tensor}:"
            " Megatron-core does not reduce the experts' gradients over the ranks that hold the other part"
            " of the sequence, so they would be wrong;"
            f" set trainer.parallel.expert_tensor={sizes.tensor}, or trainer.parallel.expert > 1"
        )
    return errors


def _divisors_of(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _divisors(n: int, limit: int = 8) -> str:
    """ "1, 2, 4, ..." of n, at most `limit` of them."""
    found = _divisors_of(n)
    return ", ".join(map(str, found[:limit])) + (", ..." if len(found) > limit else "")


def token_costs(model: ModelShape) -> tuple[float, float]:
    """(row, pair) for data.balance.Cost: what a projected token and a query-key pair cost.

    In units of one token's matrix products in all layers; a pair costs 4 heads x head_dim FLOP per layer
    forward (and 7/6 more in proportion backward, as flash kernels recompute the scores).
    """
    attention = model.hidden * model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    if model.num_experts:
        mlp = 3 * model.hidden * model.moe_ffn * model.experts_per_token + model.hidden * model.num_experts
    else:
        mlp = 3 * model.hidden * model.ffn
    linear = 2 * model.num_layers * (attention + mlp)
    pair = 4 * model.num_layers * model.heads * model.head_dim * 7 / 6
    return 2 * model.vocab * model.hidden / linear, pair / linear
