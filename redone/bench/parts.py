"""The benchmarks themselves. Every one drives the code that a run drives, through the same interfaces."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from redone.api import EngineFleet, TrainerGroup
from redone.bench.measure import Figure, Repeats, duration, rate
from redone.bench.roofline import Roofline
from redone.bench.work import (
    WorkOptions,
    amounts,
    batch_amounts,
    group_lengths,
    synthetic_prompts,
    training_batch,
    weight_bytes,
)
from redone.config.replay import replays_engine
from redone.config.schema import Config
from redone.data.pack import build_shards, plan_step
from redone.data.stream import PromptStream, sampling_seed
from redone.layout import data_parallel_size, padding_multiple
from redone.pipeline.step import num_tokens, rl_step, updates_per_batch
from redone.record.timing import Timings
from redone.reward.pool import RewardPool
from redone.rollout.source import InTurn
from redone.types import Batch, Completion, Prompt, Sampling

PARTS = ("pack", "reward", "rollout", "train", "sync", "e2e")
WITHOUT_CLUSTER = ("pack", "reward")


@dataclass(slots=True, kw_only=True)
class Bench:
    """What the benchmarks of one call share. `trainer` and `engines` are None for parts that need neither."""

    cfg: Config
    hf: Mapping[str, Any]  # the model's config.json
    options: WorkOptions
    repeats: Repeats
    roof: Roofline  # of all devices together
    data: Sequence[Prompt]  # the training files' prompts
    stop_token_ids: tuple[int, ...]
    rewards: RewardPool
    trainer: TrainerGroup | None = None
    engines: EngineFleet | None = None
    version: int = 0  # of the engines' weights
    _taken: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def vocab(self) -> int:
        return int(self.hf["vocab_size"])

    def prompts(self) -> list[Prompt]:
        """The next train_batch_size prompts: new ones each time, so that no prefix cache helps."""
        count, number = self.cfg.algorithm.train_batch_size, next(self._taken)
        if self.options.prompts == "synthetic":
            return synthetic_prompts(self.cfg, self.options, self.vocab, count, number)
        return self.real(count, number * count)

    def real(self, count: int, start: int = 0) -> list[Prompt]:
        """Prompts of the training files, around again at their end."""
        return [self.data[(start + i) % len(self.data)] for i in range(count)]

    def batch(self) -> Batch:
        lengths = group_lengths(self.cfg, self.options)
        return training_batch(self.cfg, self.prompts(), lengths, self.vocab)

    def flop_seconds(self, flops: float) -> float:
        return flops / self.roof.matmul_flops


def run_part(name: str, bench: Bench) -> list[Figure]:
    return TABLE[name](bench)


def pack(bench: Bench) -> list[Figure]:
    """The driver's planning and packing of one rollout batch."""
    batch, trainer, cluster = bench.batch(), bench.cfg.trainer, bench.cfg.cluster
    dp = max(1, data_parallel_size(trainer.parallel, cluster.world_size))
    sizes = trainer.parallel
    multiple = padding_multiple(sizes.tensor, sizes.context, trainer.fp8 != "off")

    def work(_: int) -> None:
        plan = plan_step(batch, dp, trainer.max_token_len_per_rank, trainer.prefix_sharing)
        build_shards(batch, plan, pad_multiple=multiple)

    seconds = bench.repeats.seconds(work)
    return [
        duration("pack/seconds", seconds),
        rate("pack/rate", "tokens/s", batch_amounts(batch, bench.hf).tokens, seconds),
    ]


def reward(bench: Bench) -> list[Figure]:
    """The reward pool on answers that equal the reference: every rollout of one step."""
    prompts, n = bench.real(bench.cfg.algorithm.train_batch_size), bench.cfg.rollout.n

    async def score_all() -> None:
        await asyncio.gather(*(bench.rewards.score_group(p, [_answer(p)] * n) for p in prompts))

    seconds = bench.repeats.seconds(lambda _: asyncio.run(score_all()))
    return [
        duration("reward/seconds", seconds),
        rate("reward/rate", "scores/s", float(len(prompts) * n), seconds),
    ]


def _answer(prompt: Prompt) -> Completion:
    return Completion(
        token_ids=np.zeros(1, np.int32),
        text=str(prompt.reference),
        logprobs=np.zeros(1, np.float32),
        finish="stop",
        versions=(),
    )


def rollout(bench: Bench) -> list[Figure]:
    """All responses of one step from the engines, without rewards. Ceiling: the slower of the FLOPs at the
    matmul rate, and all weights read once per decode step at the copy rate."""
    cfg, engines = bench.cfg, bench.engines
    assert engines is not None
    lengths = group_lengths(cfg, bench.options)
    sampling = Sampling(
        temperature=cfg.rollout.temperature,
        top_p=cfg.rollout.top_p,
        top_k=cfg.rollout.top_k,
        max_tokens=max(lengths),
        lengths=lengths,
        ignore_eos=True,
        routes=replays_engine(cfg),
    )

    async def generate_all(prompts: Sequence[Prompt], step: int) -> None:
        await asyncio.gather(
            *(
                engines.generate(
                    p.token_ids.tolist(),
                    sampling,
                    [sampling_seed(cfg.run.seed, step, p.id, i) for i in range(cfg.rollout.n)],
                )
                for p in prompts
            )
        )

    batches = [bench.prompts() for _ in range(bench.repeats.warmup + bench.repeats.timed)]
    with engines.awake():
        seconds = bench.repeats.seconds(lambda i: asyncio.run(generate_all(batches[i], i)))
    work = amounts([len(p.token_ids) for p in batches[-1]], [lengths] * len(batches[-1]), bench.hf)
    slots = cfg.rollout.engine.max_num_seqs * cfg.rollout.replicas
    waves = -(-len(batches[-1]) * cfg.rollout.n // slots)
    longest = max(lengths) * waves
    weights = weight_bytes(bench.hf, cfg.model.dtype) * cfg.rollout.replicas
    reading = longest * weights / bench.roof.copy_bytes_s
    ceiling = max(bench.flop_seconds(work.forward_flops), reading)
    bound = "FLOPs" if ceiling > reading else "weights read per decode step"
    return [
        duration("rollout/seconds", seconds, ceiling=ceiling, ceiling_of=bound),
        rate(
            "rollout/rate",
            "response tokens/s",
            float(work.responses),
            seconds,
            ceiling=work.responses / ceiling,
            ceiling_of=bound,
        ),
    ]


def train(bench: Bench) -> list[Figure]:
    """All optimizer updates of one rollout batch, and one log-probability pass over it."""
    cfg, trainer = bench.cfg, bench.trainer
    assert trainer is not None
    batch = bench.batch()
    parts = batch.split(updates_per_batch(cfg, len(batch.groups)))
    work = batch_amounts(batch, bench.hf)

    def updates(_: int) -> None:
        for part in parts:
            trainer.update(part, cfg.algorithm, 1)

    forward = bench.flop_seconds(work.forward_flops)
    with trainer.awake():
        scored = bench.repeats.seconds(lambda _: trainer.logprobs(batch))
        updated = bench.repeats.seconds(updates)
    note = "useful FLOPs, prompts once per group"
    passes = cfg.algorithm.ppo_epochs
    return [
        duration("train/logprobs", scored, ceiling=forward, ceiling_of=note),
        duration("train/update", updated, ceiling=3 * forward * passes, ceiling_of=note),
        rate(
            "train/rate",
            "tokens/s/rank",
            work.tokens / cfg.cluster.world_size,
            updated,
            ceiling=work.tokens / cfg.cluster.world_size / (3 * forward * passes),
            ceiling_of=note,
        ),
    ]


def sync(bench: Bench) -> list[Figure]:
    """Weights from the trainer into every engine: gather, digest, verify, load, commit; then the canary.

    Ceiling: the weight space written once by the trainer and once by each engine at the copy rate.
    """
    trainer, engines = bench.trainer, bench.engines
    assert trainer is not None and engines is not None
    moved = 0.0

    def push(_: int) -> None:
        nonlocal moved
        bench.version += 1
        with trainer.awake("weights"), engines.awake("weights"):
            moved = trainer.push(engines, version=bench.version)["sync/bytes_written"]

    def check(_: int) -> None:
        with trainer.awake("weights"), engines.awake("weights"):
            trainer.check_canary(engines, bench.version)

    pushed = bench.repeats.seconds(push)
    checked = bench.repeats.seconds(check)
    least = 2 * moved * (1 + bench.cfg.rollout.replicas) / bench.roof.copy_bytes_s
    note = "every byte copied once into the channel, once into each engine"
    return [
        duration("sync/push", pushed, ceiling=least, ceiling_of=note),
        rate("sync/rate", "weight bytes/s", moved, pushed, ceiling=moved / least, ceiling_of=note),
        duration("sync/canary", checked),
    ]


def e2e(bench: Bench) -> list[Figure]:
    """Whole steps on the training files' prompts, with rewards; dynamic sampling off, lengths fixed."""
    cfg, trainer, engines = bench.cfg, bench.trainer, bench.engines
    assert trainer is not None and engines is not None
    stream = PromptStream(bench.data, cfg.run.seed, cfg.data.shuffle)
    source = InTurn(stream, engines, bench.rewards, cfg, bench.stop_token_ids)
    phases: list[dict[str, float]] = []
    tokens: list[int] = []

    def step(_: int) -> None:
        timings = Timings()
        bench.version += 1
        done = rl_step(
            bench.version,
            source,
            trainer,
            engines,
            cfg,
            timings.timing,
        )
        tokens.append(num_tokens(done.batch))
        phases.append(timings.drain())

    seconds = bench.repeats.seconds(step)
    kept, counted = phases[bench.repeats.warmup :], tokens[bench.repeats.warmup :]
    ranks = cfg.cluster.world_size
    rates = tuple(n / s / ranks for n, s in zip(counted, seconds, strict=True))
    figures = [
        duration("e2e/step", seconds),
        Figure(name="e2e/rate", unit="tokens/s/rank", better="higher", values=rates),
    ]
    for name in sorted(set().union(*kept) - {"timing_s/step"}):
        values = tuple(found.get(name, 0.0) for found in kept)
        figures.append(duration(name.replace("timing_s/", "e2e/"), values))
    return figures


TABLE: Mapping[str, Callable[[Bench], list[Figure]]] = {
    "pack": pack,
    "reward": reward,
    "rollout": rollout,
    "train": train,
    "sync": sync,
    "e2e": e2e,
}
