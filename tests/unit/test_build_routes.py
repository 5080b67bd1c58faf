"""The engine's expert choices reach the batch (routing replay R3)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redone.config.cluster import ClusterConfig
from redone.config.replay import replays_engine, without_replay
from redone.config.schema import Config, RolloutConfig, SglangEngine
from redone.data.tiny import make_tiny_model
from redone.engine import engine_env
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
            prompt_experts=np.broadcast_to(given[:3], (3, 2, 1)) if routes else None,
            routed_experts=np.broadcast_to(given[3:], (length - 1, 2, 1)) if routes else None,
        )
        return Rollout(
            prompt=prompt, completion=completion, score=Score(raw=float(i), value=float(i), correct=bool(i))
        )

    return Group(prompt=prompt, epoch=0, rollouts=tuple(rollout(i, r) for i, r in enumerate(with_routes)))


def config(replay: str, model: Path = Path("m")) -> Config:
    values: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {"train": ["t"]},
        "rewards": {},
        "trainer": {"moe": {"routing_replay": replay}},
    }
    return Config.model_validate(values)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("mixture"), "qwen3_moe")


@pytest.mark.parametrize("replay", ["auto", "engine"])
def test_routes_are_cut_into_prompt_and_responses(replay: str, mixture: Path) -> None:
    group = build_batch([make_group((True, True))], config(replay, mixture)).groups[0]
    assert group.prompt_routes[:, 0, 0].tolist() == [0, 1, 2]  # of the first rollout
    assert group.trajectories[0].routes[:, 0, 0].tolist() == [3, 3]  # the last token was never routed
    assert group.trajectories[1].routes[:, 1, 0].tolist() == [103, 104, 104]


@pytest.mark.parametrize("replay", ["trainer", "off"])
def test_no_routes_where_they_are_not_wanted(replay: str, mixture: Path) -> None:
    group = build_batch([make_group((True, True))], config(replay, mixture)).groups[0]
    assert group.prompt_routes is None and all(t.routes is None for t in group.trajectories)


def test_routes_of_another_length_are_refused() -> None:
    group = make_group((True, True))
    completion = group.rollouts[1].completion
    short = dataclasses.replace(completion, routed_experts=completion.routed_experts[:-1])
    cut = (group.rollouts[0], dataclasses.replace(group.rollouts[1], completion=short))
    with pytest.raises(RedoneError, match=r"p: the engine gave expert choices of 4 of 5 tokens"):
        build_batch([dataclasses.replace(group, rollouts=cut)], config("engine"))


@pytest.mark.parametrize("replay", ["auto", "engine"])
def test_missing_routes_are_refused_where_they_are_required(replay: str, mixture: Path) -> None:
    with pytest.raises(RedoneError, match=r"a response to p .*routing_replay=trainer"):
        build_batch([make_group((True, False))], config(replay, mixture))


def test_auto_is_the_engines_choices_where_they_can_be_had(mixture: Path, tmp_path: Path) -> None:
    assert replays_engine(config("auto", mixture)) and replays_engine(config("engine", mixture))
    assert not any(replays_engine(config(replay, mixture)) for replay in ("trainer", "off"))
    sglang = config("auto", mixture).model_copy(update={"rollout": RolloutConfig(engine=SglangEngine())})
    assert not replays_engine(sglang)
    assert not replays_engine(config("auto", make_tiny_model(tmp_path / "dense", "qwen3")))
    assert not replays_engine(config("auto", tmp_path / "nothing"))
    assert not replays_engine(without_replay(config("auto", mixture)))
    assert without_replay(config("engine", mixture)).trainer.moe.routing_replay == "off"


def test_on_cuda_vllms_second_model_runner_is_asked_for(mixture: Path) -> None:
    """The only one that returns choices."""
    cuda = {"cluster": ClusterConfig(device="cuda")}
    names = [engine_env(config(r, mixture).model_copy(update=cuda)) for r in ("auto", "trainer")]
    assert names[0]["VLLM_USE_V2_MODEL_RUNNER"] == "1" and "VLLM_USE_V2_MODEL_RUNNER" not in names[1]
