"""Metrics of one step's rollouts, under verl's names where verl has one."""

from __future__ import annotations

from collections.abc import Sequence

from redone.algo.stats import answer_entropy, common_share
from redone.config.schema import Config
from redone.rollout.build import shaped_value
from redone.types import Group, Rollout


def rollout_metrics(generated: Sequence[Group], kept: Sequence[Group], cfg: Config) -> dict[str, float]:
    """`generated`: every group with enough usable rollouts; `kept`: those that go to the trainer.

    reward/*, response_length/*, prompt_length/* and rollout/* describe what the policy does (all generated
    groups); critic/* describes what it is trained on (the kept ones), as verl's do.
    """
    rollouts = [rollout for group in generated for rollout in group.rollouts]
    if not rollouts:
        return {}
    lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
    limits = [r.prompt.max_tokens or cfg.data.max_response_length for r in rollouts]
    metrics = {
        "reward/mean": _mean([r.score.raw for r in rollouts]),
        "reward/correct": _mean([float(r.score.correct) for r in rollouts]),
        "response_length/clip_ratio": _mean(
            [float(length >= limit) for length, limit in zip(lengths, limits, strict=True)]
        ),
        "rollout/stop_share": _mean([float(r.completion.finish == "stop") for r in rollouts]),
        **_spread("response_length", lengths),
        **_spread("prompt_length", [len(group.prompt.token_ids) for group in generated]),
        **_per_task(rollouts),
    }
    trained = [rollout for group in kept for rollout in group.rollouts]
    if trained:
        metrics |= _spread("critic/score", [r.score.raw for r in trained])
        metrics |= _spread("critic/rewards", [shaped_value(r, cfg) for r in trained])
    return metrics


def _per_task(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Mean raw reward, and two signs of collapse: entropy of the answers and share of the commonest one."""
    by_task: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        by_task.setdefault(rollout.prompt.task, []).append(rollout)
    metrics = {}
    for task, members in sorted(by_task.items()):
        answers = [rollout.completion.text.strip().casefold() for rollout in members]
        metrics[f"reward/{task}/mean"] = _mean([r.score.raw for r in members])
        metrics[f"rollout/{task}/answer_entropy"] = answer_entropy(answers)
        metrics[f"rollout/{task}/common_answer_share"] = common_share(answers)
    return metrics


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {
        f"{name}/mean": _mean(values),
        f"{name}/max": float(max(values)),
        f"{name}/min": float(min(values)),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
