"""Which layouts there are, which of them fit, which are near to a given one, and which are fastest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from redone.layout import violations
from redone.planner.hardware import DEFAULT, Constants
from redone.planner.job import Job, Layout
from redone.planner.phases import PhaseMemory, Sizes, cache_margin, gpu_phases, host_memory
from redone.planner.throughput import Phases, predict

MAX_PIPELINE = 8  # the deepest published RL layout of the Qwen3-MoE line
MARGIN = 1.3  # KV capacity / need below which a rollout cannot be predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layout, its memory, and its predicted seconds."""

    job: Job
    sizes: Sizes
    memory: tuple[PhaseMemory, ...]
    seconds: Phases

    @property
    def fits(self) -> bool:
        return all(phase.colour != "red" for phase in self.memory)


def sized(job: Job, sizes: Sizes) -> Sizes:
    """`sizes` for the job's layout."""
    lay = job.layout
    ranks = replace(
        sizes.ranks,
        world=lay.train_gpus,
        tokens=lay.budget,
        tensor=lay.tensor,
        pipeline=lay.pipeline,
        context=lay.context,
        expert=lay.expert,
        expert_tensor=lay.expert_tensor,
        recompute=lay.recompute,
        cpu_optimizer=lay.cpu_optimizer,
    )
    return replace(sizes, ranks=ranks)


def assess(job: Job, sizes: Sizes, c: Constants = DEFAULT) -> Candidate:
    """Memory of all phases and predicted seconds of one job."""
    own = sized(job, sizes)
    memory = (*gpu_phases(job, own, c), host_memory(job, own, c))
    return Candidate(job=job, sizes=own, memory=memory, seconds=predict(job, c))


def legal_layouts(job: Job, *, longest: int, offload: bool = False) -> Iterator[Layout]:
    """Layouts on the same GPUs that redone accepts; `longest`: tokens of the longest prompt + response.

    `offload`: also with the optimizer on the host. Expert tensor parallelism only where it is forced.
    """
    shape = job.model.shape
    assert shape is not None
    base = job.layout
    powers = [2**i for i in range(8)]
    hosts = (base.cpu_optimizer,) if not offload else (False, True)
    for tensor in (t for t in powers if t <= base.gpu.per_node):
        for pipeline in (p for p in powers if p <= min(MAX_PIPELINE, shape.num_layers)):
            for expert in (e for e in powers if e <= max(1, shape.num_experts)):
                etp = tensor if shape.num_experts and expert == 1 else 1
                sizes = replace(
                    base,
                    tensor=tensor,
                    pipeline=pipeline,
                    expert=expert,
                    expert_tensor=etp,
                    virtual=1,
                    context=1,
                )
                if tensor * pipeline > base.train_gpus or violations(sizes, base.train_gpus, shape):
                    continue
                for host in hosts:
                    yield from _variants(replace(sizes, cpu_optimizer=host), longest, shape.kv_heads)


def _variants(layout: Layout, longest: int, kv_heads: int) -> Iterator[Layout]:
    """The same parallel sizes with other token budgets, recomputation and engines."""
    budgets = {layout.budget, max(longest, layout.budget // 2), max(longest, layout.budget // 4)}
    for engine in (
        t for t in (1, 2, 4, 8) if t <= max(layout.gpu.per_node, 1) and layout.rollout_gpus % t == 0
    ):
        for budget in sorted(budgets):
            for recompute in (False, True):
                yield replace(layout, rollout_tensor=engine, budget=budget, recompute=recompute)


def distance(a: Layout, b: Layout) -> float:
    """Doublings between two layouts; recomputation and the optimizer's place count as one each."""
    pairs = [
        (a.tensor, b.tensor), (a.pipeline, b.pipeline), (a.expert, b.expert),
        (a.rollout_tensor, b.rollout_tensor), (a.budget, b.budget),
    ]  # fmt: skip
    changed = sum(abs(math.log2(x / y)) for x, y in pairs)
    return changed + (a.recompute != b.recompute) + (a.cpu_optimizer != b.cpu_optimizer)


def fitting(job: Job, sizes: Sizes, layouts: Iterable[Layout], c: Constants = DEFAULT) -> list[Candidate]:
    """Candidates whose memory fits and whose rollout can be predicted."""
    found = []
    for layout in layouts:
        other = replace(job, layout=layout)
        own = sized(other, sizes)
        memory = (*gpu_phases(other, own, c), host_memory(other, own, c))
        if all(phase.colour != "red" for phase in memory) and cache_margin(other, c) >= MARGIN:
            found.append(Candidate(job=other, sizes=own, memory=memory, seconds=predict(other, c)))
    return found


def nearest(candidates: Iterable[Candidate], layout: Layout, count: int = 3) -> list[Candidate]:
    """The least changed ones; the faster of equally near ones first."""
    return sorted(candidates, key=lambda x: (distance(x.job.layout, layout), x.seconds.step))[:count]


def fastest(candidates: Iterable[Candidate], count: int = 3) -> list[Candidate]:
    """The shortest predicted steps with different parallel sizes."""
    found: dict[tuple[int, ...], Candidate] = {}
    for x in sorted(candidates, key=lambda x: x.seconds.step):
        lay = x.job.layout
        found.setdefault((lay.tensor, lay.pipeline, lay.expert, lay.expert_tensor), x)
    return list(found.values())[:count]
