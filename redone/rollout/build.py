"""Groups of scored rollouts -> the batch that the trainer gets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from redone.algo.advantage import group_advantages, overlong_penalty
from redone.config.replay import replays_engine
from redone.config.schema import Config
from redone.errors import RedoneError
from redone.types import Batch, Group, Rollout, RouteArray, TrainGroup, Trajectory


def build_batch(groups: Sequence[Group], cfg: Config) -> Batch:
    """Advantages of the shaped rewards, every response token in the loss (the stop token included).

    With algorithm.filter_groups.enable, groups whose raw rewards do not differ are left out. Raises
    RedoneError when nothing is left.
    """
    filtering = cfg.algorithm.filter_groups
    kept = [group for group in groups if not filtering.enable or group.informative(filtering.eps)]
    if not kept:
        raise RedoneError(
            "no group of this step can train the model: each one's responses all got the same reward. "
            "Remedy: look at the rollouts; raise rollout.n or algorithm.filter_groups.max_num_gen_batches, "
            "choose tasks that it sometimes solves, or end here (algorithm.total_steps) if it solves all"
        )
    replay = replays_engine(cfg)
    return Batch.of([_train_group(group, cfg, replay) for group in kept])


def shaped_value(rollout: Rollout, cfg: Config) -> float:
    """The reward that the advantage sees: scaled, plus the soft overlong punishment."""
    length = len(rollout.completion.token_ids)
    penalty = overlong_penalty(length, cfg.data.max_response_length, cfg.algorithm.overlong_buffer)
    return rollout.score.value + penalty


def _train_group(group: Group, cfg: Config, replay: bool) -> TrainGroup:
    values = [shaped_value(rollout, cfg) for rollout in group.rollouts]
    advantages = group_advantages(values, cfg.algorithm.adv_estimator)
    routes = _routes(group) if replay else None
    return TrainGroup(
        prompt_id=group.prompt.id,
        prompt_ids=group.prompt.token_ids,
        prompt_routes=None if routes is None else group.rollouts[0].completion.prompt_experts,
        trajectories=tuple(
            _trajectory(rollout, float(advantage), None if routes is None else routes[i])
            for i, (rollout, advantage) in enumerate(zip(group.rollouts, advantages, strict=True))
        ),
    )


def _routes(group: Group) -> list[RouteArray]:
    """[R, L, K] expert choices of every response (replay R3). The last token was never routed; nothing
    depends on its choice: it repeats the one before.
    """
    found = []
    prompt = len(group.prompt.token_ids)
    for completion in (rollout.completion for rollout in group.rollouts):
        before, rows = completion.prompt_experts, completion.routed_experts
        if before is None or rows is None:
            raise RedoneError(
                f"a response to {group.prompt.id} carries no expert choices, which the trainer is to repeat;"
                " set trainer.moe.routing_replay=trainer"
            )
        length = len(completion.token_ids)
        if (len(before), len(rows)) != (prompt, length - 1):
            raise RedoneError(
                f"{group.prompt.id}: the engine gave expert choices of {len(before) + len(rows)} of"
                f" {prompt + length - 1} tokens"
            )
        found.append(np.concatenate([rows, (rows if length > 1 else before)[-1:]]))
    return found


def _trajectory(rollout: Rollout, advantage: float, routes: RouteArray | None) -> Trajectory:
    completion = rollout.completion
    length = len(completion.token_ids)
    return Trajectory(
        token_ids=np.asarray(completion.token_ids, dtype=np.int32),
        loss_mask=np.ones(length, dtype=np.bool_),
        advantages=np.full(length, advantage, dtype=np.float32),
        engine_logprobs=np.asarray(completion.logprobs, dtype=np.float32),
        routes=routes,
        version=min((span.version for span in completion.versions), default=0),
    )
