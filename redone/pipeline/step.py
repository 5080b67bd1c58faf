"""One rollout step of DAPO: generate, build the batch, update, hand the new weights to the engines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from redone.algo.stats import mismatch_metrics
from redone.api import EngineFleet, TrainerGroup
from redone.config.schema import AlgorithmConfig, Config
from redone.rollout.build import build_batch
from redone.rollout.collect import Collected
from redone.rollout.source import Source
from redone.types import Batch, UpdateReport

Phase = Callable[[str], AbstractContextManager[None]]
Keep = Callable[[Batch, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    collected: Collected
    batch: Batch
    reports: tuple[UpdateReport, ...]
    metrics: dict[str, float]


def updates_per_batch(cfg: Config, num_groups: int) -> int:
    """Optimizer updates that one pass over `num_groups` prompts makes."""
    return max(1, round(num_groups / cfg.algorithm.ppo_mini_batch_size))


def rl_step(
    step: int,
    source: Source,
    trainer: TrainerGroup,
    engines: EngineFleet,
    cfg: Config,
    phase: Phase,
    keep: Keep | None = None,
) -> StepResult:
    """Rollout step `step` (1-based): engines hold version step - 1 before it and version step after it.

    A synchronous source generates in it; an asynchronous one (rollout.max_staleness) has done so before, and
    works for later steps all the while: the weights arrive in mid-generation.
    `phase(name)` times what runs inside it and tells the user what is going on; `keep(batch, parts)` sees the
    batch before the weights change.
    """
    algorithm = cfg.algorithm
    with engines.awake(), phase("gen"):
        collected = source.take(step)  # dynamic sampling: groups that teach nothing are replaced
    batch = build_batch(collected.groups, cfg)
    parts = updates_per_batch(cfg, len(batch.groups))
    with trainer.awake():
        # With a single update the policy IS the old policy: the ratio is 1 and the pass would only repeat it.
        if parts * algorithm.ppo_epochs > 1 or algorithm.importance.level != "off":
            with phase("old_log_prob"):
                batch = trainer.score_old(batch)
        if algorithm.kl.coef > 0:
            with phase("ref"):
                batch = batch.with_logprobs("ref_logprobs", trainer.logprobs(batch, policy="reference"))
        if keep is not None:
            keep(batch, parts)
        with phase("update_actor"):
            reports = run_updates(step, batch, parts, trainer, algorithm)
        with phase("update_weights"), trainer.awake("weights"), engines.awake("weights"):
            sync = trainer.push(engines, version=step)  # in place, digest-checked, all engines or none
            source.pushed(step)
    metrics = {**collected.metrics, **mismatch_metrics(batch), **merge_reports(reports), **sync}
    metrics["perf/total_num_tokens"] = float(num_tokens(batch))
    return StepResult(collected=collected, batch=batch, reports=tuple(reports), metrics=metrics)


def run_updates(
    step: int, batch: Batch, parts: int, trainer: TrainerGroup, algorithm: AlgorithmConfig
) -> list[UpdateReport]:
    """The optimizer updates of one step: every epoch passes over the batch in `parts` parts."""
    return [
        trainer.update(part, algorithm, step)
        for _ in range(algorithm.ppo_epochs)
        for part in batch.split(parts)
    ]


def num_tokens(batch: Batch) -> int:
    """Prompt and response tokens of every sample, as if nothing were shared: what verl counts."""
    return sum(len(g.prompt_ids) + len(t.token_ids) for g in batch.groups for t in g.trajectories)


def merge_reports(reports: list[UpdateReport]) -> dict[str, float]:
    """Means over the step's optimizer updates; maxima where the name says so."""
    names = sorted({name for r in reports for name in r.metrics})
    merged = {}
    for name in names:
        values = [r.metrics[name] for r in reports if name in r.metrics]
        merged[name] = max(values) if name.endswith("_max") else sum(values) / len(values)
    merged["actor/updates"] = float(len(reports))
    merged["actor/grad_norm"] = sum(r.grad_norm for r in reports) / len(reports)
    merged["actor/lr"] = reports[-1].lr
    return merged
