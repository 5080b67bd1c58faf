"""Generate and score until the step has enough groups that teach something (DAPO's dynamic sampling).

The result depends on the completions only, never on the order in which they arrive; with
rollout.over_sampling it does: the groups that arrive first are taken, and the others aborted.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from redone.algo.select import refill_count, select_groups
from redone.api import EngineFleet
from redone.config.replay import replays_engine
from redone.config.schema import Config
from redone.data.stream import Drawn, sampling_seed
from redone.errors import EngineError, RedoneError
from redone.reward.pool import RewardPool
from redone.rollout.metrics import rollout_metrics
from redone.types import Completion, Group, Prompt, Rollout, Sampling, Score

log = logging.getLogger(__name__)

T = TypeVar("T")

MIN_GROUP = 2  # a single response has nothing to be compared with

Scored = Sequence[tuple[Completion, Score | None]]  # a prompt's completions; None: not scored


class Prompts(Protocol):
    """What is needed of data.stream.PromptStream."""

    def take(self, n: int) -> list[Drawn]: ...

    def give_back(self, drawn: Sequence[Drawn]) -> list[Drawn]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """A drawn prompt that is not trained on, for the ledger."""

    epoch: int
    prompt_id: str
    reason: str  # "uninformative" | "surplus" | "rollouts failed" | "aborted" | "stale"


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    groups: tuple[Group, ...]  # in draw order
    drops: tuple[Drop, ...]
    metrics: dict[str, float]


@dataclass(slots=True)
class Tally:
    """What happened so far in this step, rounds in order."""

    groups: list[Group] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)  # rollouts dropped, by reason
    aborted: list[Drawn] = field(default_factory=list)  # prompts
    rollouts: int = 0
    tail_s: float = 0.0
    drawn: int = 0
    rounds: int = 0
    first_failure: str = ""


def collect(
    stream: Prompts,
    engines: EngineFleet,
    rewards: RewardPool,
    cfg: Config,
    step: int,
    stop_token_ids: Sequence[int] = (),
) -> Collected:
    """Groups for rollout step `step`: the first train_batch_size informative ones in draw order.

    Without algorithm.filter_groups.enable, all groups of one round. Raises RedoneError when the share of
    failed scores exceeds rollout.max_failed_share, or when filter_groups.max_num_gen_batches rounds were
    not enough and on_exhausted=error. Errors of engines propagate.
    """
    return asyncio.run(collect_async(stream, engines, rewards, cfg, step, tuple(stop_token_ids)))


async def collect_async(
    stream: Prompts,
    engines: EngineFleet,
    rewards: RewardPool,
    cfg: Config,
    step: int,
    stop_token_ids: tuple[int, ...],
) -> Collected:
    """See collect. Cancelled, it aborts its requests in the engines."""
    filtering = cfg.algorithm.filter_groups
    wanted = cfg.algorithm.train_batch_size
    sampling = Sampling(
        temperature=cfg.rollout.temperature,
        top_p=cfg.rollout.top_p,
        top_k=cfg.rollout.top_k,
        max_tokens=cfg.data.max_response_length,
        stop_token_ids=stop_token_ids,
        routes=replays_engine(cfg),
    )
    tally = Tally()
    count, informative = wanted, 0
    while count > 0:
        drawn = stream.take(count + math.ceil(count * cfg.rollout.over_sampling))
        finished: list[float] = []
        works = [
            _timed(_run_prompt(epoch, prompt, engines, rewards, sampling, cfg), finished)
            for epoch, prompt in drawn
        ]
        results = await _round(works, wanted - informative, cfg)
        tally.tail_s += tail_seconds(finished)
        aborted = _add_round(tally, drawn, results)
        refused = stream.give_back(aborted)
        tally.drops += [Drop(epoch=e, prompt_id=p.id, reason="aborted") for e, p in refused]
        _check_failures(tally, cfg, step)
        if not filtering.enable or tally.rounds == filtering.max_num_gen_batches:
            break
        informative = sum(group.informative(filtering.eps) for group in tally.groups)
        count = refill_count(wanted, informative, tally.drawn)
    result = _result(tally, cfg, step)
    return replace(result, metrics=result.metrics | rewards.metrics())


async def _round(works: Sequence[Awaitable[Scored]], missing: int, cfg: Config) -> list[Scored | None]:
    """All results, in order; with over-sampling those that came until `missing` groups can be trained on."""
    if cfg.rollout.over_sampling == 0:
        # gather, not TaskGroup: an engine's error must reach the user as itself, not as an ExceptionGroup
        return list(await asyncio.gather(*works))
    return await first_enough(works, lambda scored: _trainable(scored, cfg), missing)


async def first_enough(
    works: Sequence[Awaitable[T]], counts: Callable[[T], bool], wanted: int
) -> list[T | None]:
    """Results in the order of `works` until `wanted` of them count; what is still at work then is cancelled,
    and None. The first error is raised, and everything cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    pending = set(tasks)
    try:
        while pending and wanted > 0:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            wanted -= sum(counts(task.result()) for task in done)
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    return [None if task in pending else task.result() for task in tasks]


def _trainable(scored: Scored, cfg: Config) -> bool:
    """Whether the group of these completions would be trained on."""
    raw = [score.raw for _, score in scored if score is not None and score.status == "ok"]
    filtering = cfg.algorithm.filter_groups
    return len(raw) >= MIN_GROUP and (not filtering.enable or max(raw) - min(raw) > filtering.eps)


async def _run_prompt(
    epoch: int, prompt: Prompt, engines: EngineFleet, rewards: RewardPool, sampling: Sampling, cfg: Config
) -> Scored:
    """The n completions of one prompt and their scores (None: aborted, not scored)."""
    seeds = [sampling_seed(cfg.run.seed, epoch, prompt.id, index) for index in range(cfg.rollout.n)]
    sampling = sampling.within(prompt.max_tokens)
    if cfg.rollout.forced_lengths:
        sampling = force_lengths(sampling, cfg.rollout.forced_lengths, seeds)
    completions = await engines.generate(prompt.token_ids.tolist(), sampling, seeds)
    if len(completions) != len(seeds):
        raise EngineError(f"the engine returned {len(completions)} completions for {len(seeds)} seeds")

    ended = [c.finish != "abort" and len(c.token_ids) > 0 for c in completions]
    whole = list(itertools.compress(completions, ended))
    for c in whole:
        if len(c.logprobs) != len(c.token_ids):
            raise EngineError(
                f"the engine returned {len(c.logprobs)} log-probabilities for {len(c.token_ids)} tokens"
            )
    scores = iter(await rewards.score_group(prompt, whole))
    return [(c, next(scores) if is_ended else None) for c, is_ended in zip(completions, ended, strict=True)]


async def _timed(work: Awaitable[T], finished: list[float]) -> T:
    """`work`'s result; the time of its end is appended to `finished`."""
    done = await work
    finished.append(time.perf_counter())
    return done


def tail_seconds(finished: Sequence[float]) -> float:
    """Seconds of a generation round in which at most a tenth of its groups was still running."""
    ordered = sorted(finished)
    return ordered[-1] - ordered[math.ceil(0.9 * len(ordered)) - 1] if ordered else 0.0


def force_lengths(sampling: Sampling, lengths: Sequence[int], seeds: Sequence[int]) -> Sampling:
    """Every seed gets one of `lengths`, in turn from a place that the first seed decides: groups of
    len(lengths) responses all have the same total, whatever the order of prompts."""
    chosen = tuple(lengths[(seeds[0] + i) % len(lengths)] for i in range(len(seeds)))
    return replace(sampling, lengths=chosen, max_tokens=max(chosen), ignore_eos=True, stop_token_ids=())


def _add_round(tally: Tally, drawn: Sequence[Drawn], results: Sequence[Scored | None]) -> list[Drawn]:
    """Book one round, in draw order: usable rollouts into groups, everything else into the counters.

    Returns the prompts that were aborted (their result is None).
    """
    tally.rounds += 1
    tally.drawn += len(drawn)
    aborted: list[Drawn] = []
    for (epoch, prompt), scored in zip(drawn, results, strict=True):
        if scored is None:
            aborted.append((epoch, prompt))
            continue
        rollouts = []
        for completion, score in scored:
            tally.rollouts += 1
            if score is None:
                tally.lost["aborted"] += 1
            elif score.status != "ok":
                tally.lost["failed"] += 1
                tally.first_failure = tally.first_failure or f"{score.status}: {score.detail}"
            else:
                rollouts.append(Rollout(prompt=prompt, completion=completion, score=score))
        if len(rollouts) < MIN_GROUP:
            tally.drops.append(Drop(epoch=epoch, prompt_id=prompt.id, reason="rollouts failed"))
        else:
            tally.groups.append(Group(prompt=prompt, epoch=epoch, rollouts=tuple(rollouts)))
    tally.aborted += aborted
    return aborted


def _check_failures(tally: Tally, cfg: Config, step: int) -> None:
    share = tally.lost["failed"] / max(1, tally.rollouts)
    if share > cfg.rollout.max_failed_share:
        raise RedoneError(
            f"step {step}: the reward failed on {tally.lost['failed']} of {tally.rollouts} rollouts, over "
            f"rollout.max_failed_share={cfg.rollout.max_failed_share}; first failure: {tally.first_failure}. "
            "Remedy: mend the reward (its traceback is in the log), or raise the limit"
        )


def _result(tally: Tally, cfg: Config, step: int) -> Collected:
    filtering = cfg.algorithm.filter_groups
    wanted = cfg.algorithm.train_batch_size
    selection = select_groups(tally.groups, wanted, filtering.eps)
    kept = tuple(tally.groups[:wanted])
    drops = list(tally.drops)
    if not filtering.enable:
        drops += [_drop(group, "surplus") for group in tally.groups[wanted:]]
    else:
        kept = selection.kept
        drops += [_drop(group, "uninformative") for group in selection.uninformative]
        drops += [_drop(group, "surplus") for group in selection.surplus]
        if len(kept) < wanted:
            message = (
                f"step {step}: {len(kept)} of {wanted} informative groups after {tally.rounds} generation "
                f"rounds ({tally.drawn} prompts)"
            )
            if filtering.on_exhausted == "error":
                raise RedoneError(
                    f"{message}. Remedy: algorithm.filter_groups.on_exhausted=short trains on what there is; "
                    "max_num_gen_batches allows more rounds"
                )
            log.warning("%s; training on those", message)
    informative = len(selection.kept) + len(selection.surplus)
    metrics = rollout_metrics(tally.groups, kept, cfg) | {
        "rollout/prompts": float(tally.drawn),
        "rollout/gen_rounds": float(tally.rounds),
        "perf/gen_tail_s": tally.tail_s,
        "rollout/informative_share": informative / max(1, len(tally.groups)),
        "rollout/surplus_groups": float(len(selection.surplus) if filtering.enable else 0),
        "rollout/failed": float(tally.lost["failed"]),
        "rollout/aborted": float(tally.lost["aborted"]),
        "rollout/failed_share": tally.lost["failed"] / max(1, tally.rollouts),
        "rollout/dropped_groups": float(len(drops)),
        "train/num_gen_batches": float(tally.rounds),
    }
    if cfg.rollout.over_sampling:
        metrics["rollout/aborted_groups"] = float(len(tally.aborted))
        metrics["rollout/aborted_twice"] = float(sum(drop.reason == "aborted" for drop in drops))
    return Collected(groups=kept, drops=tuple(drops), metrics=metrics)


def _drop(group: Group, reason: str) -> Drop:
    return Drop(epoch=group.epoch, prompt_id=group.prompt.id, reason=reason)
