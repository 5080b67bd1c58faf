"""Model FLOPs per token from a Hugging Face configuration: matrix products only, as MFU is usually counted.

A multiply-add counts 2; a training step costs 3 forwards (backward = 2 forwards; recomputation is not useful
work and not counted). Dense and MoE models with grouped-query attention (Qwen3, Qwen3-MoE, Llama families).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from redone.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlops:
    """Forward FLOPs per token: `matmul` is constant, attention scores grow with the context."""

    matmul: float  # projections, active experts, router
    head: float  # language-model head, where it is computed
    per_context: float  # times the number of attended tokens: q.k and p.v over all layers

    def forward(self, context: float, *, head: bool = True) -> float:
        """FLOPs of one token that attends to `context` tokens (itself included)."""
        return self.matmul + (self.head if head else 0.0) + self.per_context * context

    def sequence(self, prompt: int, response: int) -> float:
        """Forward FLOPs of one causal sequence; the head runs on the response's rows only."""
        length = prompt + response
        return self.matmul * length + self.head * response + self.per_context * length * (length + 1) / 2


def model_flops(hf: Mapping[str, Any]) -> ModelFlops:
    """From config.json's values. Raises ModelError when a size is missing."""
    hidden, layers = _need(hf, "hidden_size"), _need(hf, "num_hidden_layers")
    heads = _need(hf, "num_attention_heads")
    kv_heads = int(hf.get("num_key_value_heads") or heads)
    head_dim = int(hf.get("head_dim") or hidden // heads)
    attention = 2 * hidden * head_dim * (2 * heads + 2 * kv_heads)  # q and o; k and v
    dense = 6 * hidden * _need(hf, "intermediate_size")  # gate, up, down
    moe_layers = _moe_layers(hf, layers)
    expert = 0
    if moe_layers:
        expert = 6 * hidden * _need(hf, "moe_intermediate_size") * _need(hf, "num_experts_per_tok")
        expert += 2 * hidden * _experts(hf)  # router
    return ModelFlops(
        matmul=float(layers * attention + (layers - moe_layers) * dense + moe_layers * expert),
        head=float(2 * hidden * _need(hf, "vocab_size")),
        per_context=float(layers * 4 * heads * head_dim),
    )


def parameter_count(hf: Mapping[str, Any], *, active: bool = False) -> int:
    """Parameters, norms left out (< 0.1 %); `active`: those one token uses."""
    hidden, layers = _need(hf, "hidden_size"), _need(hf, "num_hidden_layers")
    flops = model_flops(hf)
    count = flops.matmul / 2
    if not active and (moe_layers := _moe_layers(hf, layers)):
        idle = _experts(hf) - _need(hf, "num_experts_per_tok")
        count += moe_layers * idle * 3 * hidden * _need(hf, "moe_intermediate_size")
    embeddings = 1 if hf.get("tie_word_embeddings") else 2
    return int(count) + embeddings * hidden * _need(hf, "vocab_size")


def _experts(hf: Mapping[str, Any]) -> int:
    return int(hf.get("num_experts") or hf.get("num_local_experts") or 0)


def _moe_layers(hf: Mapping[str, Any], layers: int) -> int:
    if not _experts(hf):
        return 0
    every, dense = int(hf.get("decoder_sparse_step") or 1), set(hf.get("mlp_only_layers") or ())
    return sum((i + 1) % every == 0 and i not in dense for i in range(layers))


def _need(hf: Mapping[str, Any], key: str) -> int:
    value = hf.get(key)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json: {key}={value!r}; a positive integer is needed to count FLOPs")
    return value
