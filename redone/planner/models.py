"""Sizes of a model as the planner needs them: exact parameter counts, and the models of the published
runs."""

from __future__ import annotations

from dataclasses import dataclass

from redone.layout import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """Counts are parameters; `kv_bytes` is one token's bf16 KV cache over all layers."""

    layers: int
    hidden: int
    vocab: int
    heads: int
    kv_shards: int  # over how many tensor-parallel ranks an engine can split the KV cache
    attention_width: int  # of q.k and p.v together, / 2: heads x head size
    dense: int  # everything but routed experts: embeddings, head, attention, norms, router
    expert: int  # all routed experts
    active: int  # multiplied for one token: without the input embedding, with the head
    experts: int = 0
    top_k: int = 0
    moe_layers: int = 0
    expert_ffn: int = 0
    kv_bytes: float = 0.0
    shape: ModelShape | None = None  # absent for models that redone cannot train

    @property
    def total(self) -> int:
        return self.dense + self.expert

    @property
    def active_with_embedding(self) -> int:
        """As model cards count: the input embedding's rows included."""
        tied = self.shape is not None and self.shape.tied_embeddings
        return self.active + (0 if tied else self.vocab * self.hidden)

    @property
    def active_expert(self) -> int:
        return self.moe_layers * 3 * self.hidden * self.expert_ffn * self.top_k

    def local(self, tensor: int, pipeline: int, expert: int, expert_tensor: int) -> float:
        """Mean parameters of one rank."""
        return self.dense / (tensor * pipeline) + self.expert / (expert * expert_tensor * pipeline)


def planned(shape: ModelShape) -> PlannedModel:
    """Exact counts of a model that redone trains; norms included."""
    h, d = shape.hidden, shape.head_dim
    attention = h * d * (2 * shape.heads + 2 * shape.kv_heads)
    norms = 2 * h + (2 * d if shape.qk_norm else 0)
    router = h * shape.num_experts
    mlp = 0 if shape.num_experts else 3 * h * shape.ffn
    layer = attention + norms + router + mlp
    head = shape.vocab * h
    one_expert = 3 * h * shape.moe_ffn
    dense = shape.num_layers * layer + h + head * (1 if shape.tied_embeddings else 2)
    return PlannedModel(
        layers=shape.num_layers,
        hidden=h,
        vocab=shape.vocab,
        heads=shape.heads,
        kv_shards=shape.kv_heads,
        attention_width=shape.heads * d,
        dense=dense,
        expert=shape.num_layers * shape.num_experts * one_expert,
        active=shape.num_layers * (layer + one_expert * shape.experts_per_token) + h + head,
        experts=shape.num_experts,
        top_k=shape.experts_per_token,
        moe_layers=shape.num_layers if shape.num_experts else 0,
        expert_ffn=shape.moe_ffn,
        kv_bytes=4.0 * shape.kv_heads * d * shape.num_layers,
        shape=shape,
    )


def _shape(
    family: str,
    layers: int,
    hidden: int,
    heads: int,
    kv: int,
    ffn: int,
    vocab: int,
    experts: int = 0,
    top_k: int = 0,
    moe_ffn: int = 0,
    tied: bool = False,
) -> ModelShape:
    return ModelShape(
        family=family,
        num_layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=kv,
        head_dim=128,
        vocab=vocab,
        max_positions=131072,
        rope_theta=1e6,
        norm_eps=1e-6,
        tied_embeddings=tied,
        qk_norm=family.startswith("qwen3"),
        num_experts=experts,
        experts_per_token=top_k,
        moe_ffn=moe_ffn,
    )


# DeepSeek-V3: latent attention (187 M per layer, 576 KV values), 3 dense layers, one shared expert. Hugging
# Face config.json of deepseek-ai/DeepSeek-V3; attention's effective head size is (192 + 128) / 2.
_V3_DENSE = 61 * 187_107_328 + 3 * 3 * 7168 * 18432 + 58 * (3 * 7168 * 2048 + 7168 * 256) + 2 * 7168 * 129280
_V3_ACTIVE = _V3_DENSE - 7168 * 129280 + 58 * 8 * 3 * 7168 * 2048
DEEPSEEK_V3 = PlannedModel(
    layers=61, hidden=7168, vocab=129280, heads=128, kv_shards=1, attention_width=128 * 160, dense=_V3_DENSE,
    expert=58 * 256 * 3 * 7168 * 2048, active=_V3_ACTIVE, experts=256, top_k=8, moe_layers=58,
    expert_ffn=2048, kv_bytes=576 * 2.0 * 61,
)  # fmt: skip

# By the names of the published points. Sizes from the models' config.json.
PUBLISHED = {
    "q30b": planned(_shape("qwen3_moe", 48, 2048, 32, 4, 6144, 151936, 128, 8, 768)),
    "q235b": planned(_shape("qwen3_moe", 94, 4096, 64, 4, 12288, 151936, 128, 8, 1536)),
    "q32b": planned(_shape("qwen3", 64, 5120, 64, 8, 25600, 151936)),
    "q8b": planned(_shape("qwen3", 36, 4096, 32, 8, 12288, 151936)),
    "q25_7b": planned(_shape("llama", 28, 3584, 28, 4, 18944, 152064)),
    "q25_3b": planned(_shape("llama", 36, 2048, 16, 2, 11008, 151936, tied=True)),
    "llama8b": planned(_shape("llama", 32, 4096, 32, 8, 14336, 128256)),
    "l70b": planned(_shape("llama", 80, 8192, 64, 8, 28672, 128256)),
    "l405b": planned(_shape("llama", 126, 16384, 128, 8, 53248, 128256)),
    "dsv3": DEEPSEEK_V3,
}
