"""What is planned: the work of one step, and the layout that does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from redone.planner.hardware import Constants, Gpu
from redone.planner.lengths import Lengths
from redone.planner.models import PlannedModel

Mode = Literal["sync", "async"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One rollout step."""

    prompts: int  # 0 for training alone
    samples: int  # per prompt
    update_sequences: int  # responses per optimizer step
    updates: int  # optimizer steps, all epochs together
    prompt_tokens: float
    lengths: Lengths  # responses
    forward_passes: int  # log-probabilities of the actor and of a reference
    ahead: int = 1  # steps that asynchronous engines may be ahead: batches of prompts in flight

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples

    @property
    def tokens(self) -> float:
        """Prompt and response tokens of a step, every prompt counted with every response."""
        return self.sequences * (self.prompt_tokens + sum(self.lengths) / len(self.lengths))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where it runs. In mode "async" trainer and engines have disjoint GPUs."""

    gpu: Gpu
    train_gpus: int
    rollout_gpus: int
    mode: Mode = "sync"
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1
    rollout_tensor: int = 1
    budget: int = 16384  # tokens of a micro-batch
    logprob_batches: float = 1.0  # micro-batches that one forward-only pass joins
    recompute: bool = False
    fp8: bool = False
    shared_prefix: bool = False
    utilization: float = 0.7  # share of GPU memory of an engine
    max_sequences: int = 1024  # that an engine decodes at once
    stack: str = "redone"
    cpu_optimizer: bool = False

    @property
    def virtual_pipeline(self) -> int:
        """As trainer.parallel names it."""
        return self.virtual

    trainer_sleeps: bool = False  # its states leave the GPU while the engine runs

    @property
    def gpus(self) -> int:
        return self.train_gpus if self.mode == "sync" else self.train_gpus + self.rollout_gpus

    @property
    def nodes(self) -> int:
        return max(1, -(-self.gpus // self.gpu.per_node))

    @property
    def data(self) -> int:
        """Replicas of the trainer."""
        return max(1, self.train_gpus // (self.tensor * self.pipeline * self.context))

    def name(self) -> str:
        """TP1 PP1 EP8, engines TP2."""
        etp = f" ETP{self.expert_tensor}" if self.expert_tensor > 1 else ""
        recompute = ", full recomputation" if self.recompute else ""
        host = ", optimizer on the host" if self.cpu_optimizer else ""
        split = "" if self.mode == "sync" else f", {self.train_gpus}+{self.rollout_gpus} GPUs"
        return (
            f"TP{self.tensor} PP{self.pipeline} EP{self.expert}{etp}, engines TP{self.rollout_tensor},"
            f" {self.budget} tokens{recompute}{host}{split}"
        )


def stack_factor(layout: Layout, constants: Constants) -> float:
    """Trainer seconds against Megatron-Bridge; redone has not been measured on a GPU and takes NeMo RL's."""
    return {
        "bridge": 1.0,
        "tuned": constants.stack_tuned,
        "verl": constants.stack_verl,
        "skyrl": constants.stack_skyrl,
    }.get(layout.stack, constants.stack_nemo)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One thing to predict."""

    model: PlannedModel
    work: Workload
    layout: Layout
