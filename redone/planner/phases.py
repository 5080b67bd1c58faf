"""Memory of every phase of a step, for each kind of rank, on the GPU and in the node's RAM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from redone.planner.hardware import DEFAULT, Constants
from redone.planner.job import Job
from redone.planner.memory import RankMemory, TrainerRanks, rank_memory
from redone.planner.throughput import kv_need, kv_tokens

UNSURE = 0.20  # share by which activations and logits may be wrong on a GPU (notes/planner.md, verdict)
Colour = Literal["green", "amber", "red"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseMemory:
    """Bytes that one kind of rank needs in one phase; `parts` sum to `total`."""

    phase: str
    rank: str
    parts: tuple[tuple[str, float], ...]
    limit: float

    @property
    def total(self) -> float:
        return sum(size for _, size in self.parts)

    @property
    def binds(self) -> str:
        """The largest part."""
        return max(self.parts, key=lambda part: part[1])[0]

    @property
    def colour(self) -> Colour:
        """red: it does not fit. amber: it would not if activations and logits were 20 % larger."""
        if self.total > self.limit:
            return "red"
        unsure = sum(size for name, size in self.parts if name in ("activations", "log-probabilities"))
        return "amber" if self.total + UNSURE * unsure > self.limit else "green"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What memory depends on beside the job."""

    ranks: TrainerRanks
    bucket_bytes: float = 64 * 2**20
    keeps_reference: bool = False  # a copy of the weights for the KL term, in host memory
    host_memory: float = 0.0  # bytes per node; 0: as the GPU's table says


def gpu_phases(job: Job, sizes: Sizes, c: Constants = DEFAULT) -> list[PhaseMemory]:
    """Every phase of every kind of rank; first, a middle and the last pipeline stage are kinds of their
    own."""
    found = []
    stages = sorted({0, sizes.ranks.pipeline // 2, sizes.ranks.pipeline - 1})
    for stage in stages:
        name = "trainer" if sizes.ranks.pipeline == 1 else f"trainer, stage {stage}"
        found += _trainer_phases(job, sizes, name, rank_memory(sizes.ranks, stage, c), c)
    if job.layout.mode == "async":
        found.append(_engine_phase(job, (), "engine", c))
    return found


def _trainer_phases(job: Job, sizes: Sizes, name: str, memory: RankMemory, c: Constants) -> list[PhaseMemory]:
    lay, limit = job.layout, job.layout.gpu.memory
    colocated = lay.mode == "sync" and lay.rollout_gpus > 0
    context = ("contexts and fragmentation", (2 if colocated else 1) * c.reserve * 1e9)
    states = (
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
    )
    held = () if lay.trainer_sleeps else states
    bucket = max(sizes.bucket_bytes, 2.0 * job.model.hidden * job.model.vocab)
    buffers = ("exchange buffers", 2 * bucket)
    engine = ((f"engine weights (TP{lay.rollout_tensor})", _engine_weights(job)),) if colocated else ()
    head = (("log-probabilities", memory.head),) if memory.head else ()

    def phase(title: str, *parts: tuple[str, float]) -> PhaseMemory:
        return PhaseMemory(phase=title, rank=name, parts=(*parts, context), limit=limit)

    found = [
        phase("log-probabilities", *states, ("activations", memory.forward)),
        phase("update", *states, ("activations", memory.activations), *head),
        phase("weight update", *(states[:1] if lay.trainer_sleeps else states), buffers, *engine),
        phase("save", *states, buffers),
    ]
    if colocated:
        found = [_engine_phase(job, held, name, c), phase("wake", *held, *engine), *found]
    return found


def _engine_weights(job: Job) -> float:
    return 2.0 * job.model.total / job.layout.rollout_tensor * (0.5 if job.layout.fp8 else 1.0)


def _engine_phase(job: Job, held: tuple[tuple[str, float], ...], name: str, c: Constants) -> PhaseMemory:
    """The engine takes its share of the GPU whatever it needs; the trainer's states and context come on
    top."""
    lay = job.layout
    weights = _engine_weights(job)
    cache = lay.utilization * lay.gpu.memory - weights - c.reserve * 1e9
    parts: list[tuple[str, float]] = [
        (f"engine weights (TP{lay.rollout_tensor})", weights),
        ("KV cache", max(cache, 0.0)),
    ]
    if held or lay.mode == "sync":
        parts += [(f"trainer {part}", size) for part, size in held]
    contexts = 2 if lay.mode == "sync" else 1
    parts.append(("contexts and fragmentation", contexts * c.reserve * 1e9))
    limit = lay.gpu.memory if cache > 0 else min(lay.gpu.memory, weights)
    return PhaseMemory(phase="rollout", rank=name, parts=tuple(parts), limit=limit)


def host_memory(job: Job, sizes: Sizes, c: Constants = DEFAULT) -> PhaseMemory:
    """The fullest node's RAM: processes, what is offloaded, the weight channel and the reference policy."""
    lay, ranks = job.layout, sizes.ranks
    per_node = min(lay.gpu.per_node, lay.train_gpus)
    nodes = max(1, lay.train_gpus // lay.gpu.per_node)
    local = job.model.local(lay.tensor, lay.pipeline, lay.expert, lay.expert_tensor)
    engines = per_node if lay.mode == "sync" and lay.rollout_gpus else 0
    parts = [
        ("processes", (per_node + engines) * c.reserve * 1e9),
        ("weight channel", 2.0 * job.model.total),
    ]
    if sizes.keeps_reference:
        parts.append(("reference policy", float(ranks.bytes_per_value * local * per_node)))
    shard = 12.0 * job.model.total / nodes
    if lay.cpu_optimizer:
        parts += [("optimizer", shard), ("gradients for it", 4.0 * job.model.total / nodes)]
    if lay.trainer_sleeps:
        parts.append(("trainer weights and gradients, asleep", (2 + ranks.gradient_bytes) * local * per_node))
        if not lay.cpu_optimizer:
            parts.append(("optimizer, asleep", shard))
    return PhaseMemory(
        phase="all",
        rank="node RAM",
        parts=tuple(parts),
        limit=sizes.host_memory or lay.gpu.host_memory,
    )


def published_host(
    model_total: int, local: float, nodes: int, per_node: int, *, copies: int = 2, c: Constants = DEFAULT
) -> float:
    """Bytes per node as slime and verl use them: Adam and its gradients on the host (fp32), swapped weights
    and
    gradients, `copies` bf16 backups (actor and reference), one process per GPU."""
    return 16 * model_total / nodes + (6 + 2 * copies) * local * per_node + per_node * c.reserve * 1e9


def cache_margin(job: Job, c: Constants = DEFAULT) -> float:
    """KV capacity of an engine / what its concurrent sequences want."""
    need, per_sequence = kv_need(job, c)
    wanted = min(need, job.layout.max_sequences * per_sequence)
    return kv_tokens(job, c) / wanted if wanted else float("inf")
