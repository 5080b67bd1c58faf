"""Bytes of one trainer rank, counted from what Megatron's modules, autograd and our head keep.

Weights, gradients and optimizer are exact up to buffer padding. Activations are counted tensor by tensor
for the torch modules of the CPU environment (tests/dist compares them with torch's profiler) and, with the
same structure, for TransformerEngine's modules; those have not been measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from redone.layout import ModelShape, padded_vocab
from redone.planner.hardware import DEFAULT, Constants

Modules = Literal["torch", "te", "fused"]
FP32 = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerRanks:
    """A trainer's layout as far as memory depends on it."""

    shape: ModelShape
    world: int
    tokens: int  # of the largest micro-batch, prompt and padding included
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1
    modules: Modules = (
        "te"  # torch: CPU stand-ins; te: redone on CUDA; fused: with fused activation and permutation
    )
    bytes_per_value: int = 2
    gradient_bytes: int = FP32
    recompute: bool = False
    microbatches: int = 1 << 30  # of one update; fewer than the pipeline's stages keep less in flight
    loss_share: float = 1.0  # of the tokens that predict a response token
    head_chunk: int | None = 1024  # rows; None: whole logits at once
    logit_bytes: float = 21.0  # per logit without chunks: five fp32 copies and a mask in our reference head
    routed: float = 1.0  # tokens that reach this rank's experts against an even share, mean over layers
    cpu_optimizer: bool = False
    device: bool = True  # CUDA context and fragmentation exist

    @property
    def data(self) -> int:
        return max(1, self.world // (self.tensor * self.pipeline * self.context))

    @property
    def expert_data(self) -> int:
        return max(1, self.world // (self.expert * self.expert_tensor * self.pipeline))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes on one rank of pipeline stage `stage`. `activations` and `head` exist during an update only."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    activations: float  # kept for backward, and the layer that is being computed
    head: float  # log-probabilities and their gradient
    forward: float  # all activations of a forward-only pass, head included
    reserve: float

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def update(self) -> float:
        """Peak of an update."""
        return self.states + self.activations + self.head + self.reserve


def parameters(ranks: TrainerRanks, stage: int) -> tuple[int, int]:
    """(dense, expert) parameters of one rank of a stage."""
    s, t = ranks.shape, ranks.tensor
    layers = s.num_layers // ranks.pipeline
    attention = s.hidden * s.head_dim * (2 * s.heads + 2 * s.kv_heads) // t
    norms = 2 * s.hidden + (2 * s.head_dim if s.qk_norm else 0)
    mlp = s.hidden * s.num_experts if s.num_experts else 3 * s.hidden * s.ffn // t
    dense = layers * (attention + norms + mlp)
    table = padded_vocab(s.vocab, t) // t * s.hidden
    last = stage == ranks.pipeline - 1
    if stage == 0:
        dense += table
    if last:
        dense += s.hidden + (0 if s.tied_embeddings and ranks.pipeline == 1 else table)
    expert = layers * s.num_experts // ranks.expert * 3 * s.hidden * s.moe_ffn // ranks.expert_tensor
    return dense, expert


def layer_bytes(ranks: TrainerRanks, imbalance: float = 1.0) -> float:
    """Bytes per token that one layer keeps for its backward pass, without recomputation."""
    s, t, b = ranks.shape, ranks.tensor, ranks.bytes_per_value
    q, kv = s.heads * s.head_dim / t, s.kv_heads * s.head_dim / t
    torch_norms = ranks.modules == "torch"
    # Plain norms keep their input and the normalised value in fp32, and the output; TE's keep input and
    # output.
    norms = 2 * s.hidden / t * ((2 * FP32 if torch_norms else b) + b)
    if s.qk_norm and torch_norms:
        norms += q * 2 * FP32 + kv * FP32 * (1 if b == FP32 else 2)
    elif s.qk_norm:
        norms += (q + kv) * b
    rotary = 0 if ranks.modules == "fused" else 4 * s.head_dim * b
    attention = (q + 2 * kv) * b + (q + kv) * b + q * b + FP32 * s.heads / t + rotary
    return norms + attention + _mlp_bytes(ranks, imbalance * ranks.routed)


def _mlp_bytes(ranks: TrainerRanks, imbalance: float) -> float:
    s, b = ranks.shape, ranks.bytes_per_value
    if not s.num_experts:
        return (3 if ranks.modules == "fused" else 5) * s.ffn / ranks.tensor * b
    # Sequence parallel ranks dispatch their own share of the tokens; expert_tensor ranks see all of their
    # group's.
    copies = s.experts_per_token * imbalance * ranks.expert_tensor / ranks.tensor
    ffn = (3 if ranks.modules == "fused" else 6) * s.moe_ffn / ranks.expert_tensor
    # The all-to-all keeps one more copy of what it received (measured; HybridEP and DeepEP do not).
    inputs = s.hidden * (2 if ranks.expert > 1 and ranks.modules != "fused" else 1)
    return copies * (inputs + ffn) * b + FP32 * s.num_experts / ranks.tensor


def transient_bytes(ranks: TrainerRanks) -> float:
    """Bytes per token of gradients that live while one layer's MLP is differentiated."""
    s, b = ranks.shape, ranks.bytes_per_value
    hidden = s.hidden / ranks.tensor * (b + (2 * FP32 if ranks.modules == "torch" and b < FP32 else 0))
    if s.num_experts:
        copies = s.experts_per_token * ranks.routed * ranks.expert_tensor / ranks.tensor
        return 6 * copies * s.moe_ffn / ranks.expert_tensor * b + hidden
    return 2.5 * s.ffn / ranks.tensor * b + hidden


def head_bytes(ranks: TrainerRanks) -> float:
    """Peak of the last stage's final norm, log-probabilities and their backward pass."""
    s, t, b = ranks.shape, ranks.tensor, ranks.bytes_per_value
    tokens = ranks.tokens / ranks.context
    vocab = padded_vocab(s.vocab, t) / t
    rows = tokens * ranks.loss_share
    norm = tokens * s.hidden / t * ((2 * FP32 if ranks.modules == "torch" else b) + b)
    gathered = tokens * s.hidden * b if t > 1 else 0.0
    kept = norm + gathered + 2 * rows * s.hidden * b
    if ranks.head_chunk is None:
        return kept + rows * vocab * ranks.logit_bytes
    # Logits and two copies in the reference; the row kernels write a low-precision gradient beside them. The
    # weight's gradient is added to Megatron's fp32 buffer as it is made.
    values = 3 * FP32 if ranks.modules == "torch" else FP32 + (b if b < FP32 else 0)
    return kept + min(rows, ranks.head_chunk) * vocab * values


def rank_memory(ranks: TrainerRanks, stage: int, c: Constants = DEFAULT) -> RankMemory:
    """Peak bytes of one rank. 1F1B keeps as many micro-batches in flight as stages follow, this one
    included."""
    dense, expert = parameters(ranks, stage)
    b, layers = ranks.bytes_per_value, ranks.shape.num_layers / ranks.pipeline
    per_shard = FP32 * (2 if b == FP32 else 3)  # both moments, and master weights beside low-precision ones
    optimizer = 0.0 if ranks.cpu_optimizer else per_shard * (dense / ranks.data + expert / ranks.expert_data)
    tokens = ranks.tokens / ranks.context
    flight = min(ranks.pipeline - stage, ranks.microbatches)
    boundary = tokens * ranks.shape.hidden / ranks.tensor * b
    last = stage == ranks.pipeline - 1
    head = head_bytes(ranks) if last else 0.0
    transient = tokens * transient_bytes(ranks)
    if ranks.recompute:
        # fp32 norms keep the layer's input itself, which the checkpoint holds already.
        layer = tokens * layer_bytes(ranks, c.imbalance if ranks.device else 1.0)
        shared = boundary if ranks.modules == "torch" and b == FP32 else 0.0
        kept = flight * layers * boundary
        peak = max(layer + transient - shared, head)
        head_part = max(0.0, head - (layer + transient - shared))
    else:
        kept = flight * layers * tokens * layer_bytes(ranks)
        peak = max(transient, head)
        head_part = head if head >= transient else 0.0
    received = stage > 0 and not (ranks.modules == "torch" and b == FP32 and not ranks.recompute)
    pipe = flight * boundary * (received + (not last))  # what the stages sent each other
    activations = kept + pipe + peak - head_part
    if ranks.modules == "torch":  # gloo clones a gradient buffer to reduce it
        buffer = FP32 * max(dense, expert) if ranks.expert > 1 else FP32 * (dense + expert)
        activations = max(activations + head_part, buffer) - head_part
    return RankMemory(
        stage=stage,
        weights=float(b * (dense + expert)),
        gradients=float(ranks.gradient_bytes * (dense + expert)),
        optimizer=optimizer,
        activations=activations,
        head=head_part,
        forward=_forward_bytes(ranks, head),
        reserve=c.reserve * 1e9 if ranks.device else 0.0,
    )


def _forward_bytes(ranks: TrainerRanks, head: float) -> float:
    """A pass without gradients holds one layer's working set: about half of what its backward would keep."""
    tokens = ranks.tokens / ranks.context
    return max(tokens * layer_bytes(ranks) / 2, head)
