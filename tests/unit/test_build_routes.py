"""The engine's expert choices reach the batch (routing replay R3)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from redone.config.schema import Config
from redone.errors import RedoneError
from redone.rollout.build import build_batch
from redone.types import Completion, Group, Prompt, Rollout, Score


def make_group(with_routes: tuple[bool, ...]) -> Group:
    prompt = Prompt(
        id="p", task="t", domain="general", data_source="d", messages=(),
        token_ids=np.arange(3, dtype=np.int32), reference=None, reward="default",
    )  # fmt: skip

    def rollout(i: int, routes: bool) -> Rollout:
        length = 2 + i
        given = np.arange(3 + length - 1, dtype=np.int16)[:, None, None] + 100 * i
        completion = Completion(
            token_ids=np.arange(length, dtype=np.int32),
            text="",
            logprobs=np.zeros(length, np.float32),
            finish="stop",
            versions=(),
            routed_experts=np.broadcast_to(given, (3 + length - 1, 2, 1)) if routes else None,
        )
        return Rollout(
            prompt=prompt, completion=completion, score=Score(raw=float(i), value=float(i), correct=bool(i))
        )

    return Group(prompt=prompt, epoch=0, rollouts=tuple(rollout(i, r) for i, r in enumerate(with_routes)))


def config(replay: str) -> Config:
    values: dict[str, Any] = {
        "model": {"path": "m"},
        "data": {"train": ["t"]},
        "rewards": {},
        "trainer": {"moe": {"routing_replay": replay}},
    }
    return Config.model_validate(values)


@pytest.mark.parametrize("replay", ["auto", "engine"])
def test_routes_are_cut_into_prompt_and_responses(replay: str) -> None:
    group = build_batch([make_group((True, True))], config(replay)).groups[0]
    assert group.prompt_routes[:, 0, 0].tolist() == [0, 1, 2]  # of the first rollout
    assert group.trajectories[0].routes[:, 0, 0].tolist() == [3, 3]  # the last token was never routed
    assert group.trajectories[1].routes[:, 1, 0].tolist() == [103, 104, 104]


@pytest.mark.parametrize(
    ("replay", "given"), [("auto", (True, False)), ("trainer", (True, True)), ("off", (True, True))]
)
def test_no_routes_where_they_are_not_complete_or_not_wanted(replay: str, given: tuple[bool, ...]) -> None:
    group = build_batch([make_group(given)], config(replay)).groups[0]
    assert group.prompt_routes is None and all(t.routes is None for t in group.trajectories)


def test_routes_of_another_length_are_refused() -> None:
    group = make_group((True, True))
    completion = group.rollouts[1].completion
    short = dataclasses.replace(completion, routed_experts=completion.routed_experts[:-1])
    cut = (group.rollouts[0], dataclasses.replace(group.rollouts[1], completion=short))
    with pytest.raises(RedoneError, match=r"p: the engine gave expert choices of 4 of 5 tokens"):
        build_batch([dataclasses.replace(group, rollouts=cut)], config("engine"))


def test_missing_routes_are_refused_where_they_are_required() -> None:
    with pytest.raises(RedoneError, match=r"1 of 2 responses to p .*routing_replay=engine.*trainer"):
        build_batch([make_group((True, False))], config("engine"))
