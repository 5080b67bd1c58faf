"""The step's order and what it passes on, with fakes of our own interfaces only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

from redone.api import Awake, EngineFleet
from redone.config.schema import (
    AlgorithmConfig,
    Config,
    DataConfig,
    ExactReward,
    KlConfig,
    ModelSection,
    RolloutConfig,
)
from redone.data.stream import PromptStream
from redone.pipeline.step import rl_step, updates_per_batch
from redone.reward.pool import build_rewards
from redone.rollout.source import InTurn
from redone.types import (
    Batch,
    Completion,
    FloatArray,
    Message,
    Policy,
    Prompt,
    Sampling,
    UpdateReport,
    VersionSpan,
)


class Story:
    """What happened, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self.events.append(f"{name} begins")
        yield
        self.events.append(f"{name} ends")


class Fleet:
    def __init__(self, story: Story) -> None:
        self.story = story

    def awake(self, what: Awake = "all"):  # type: ignore[no-untyped-def]
        return self.story.span(f"engines {what}")

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Completion]:
        return [
            Completion(
                token_ids=np.array([7, 2], np.int32),
                text="yes" if i % 2 else "no",
                logprobs=np.array([-1.0, -0.5], np.float32),
                finish="stop",
                versions=(VersionSpan(version=0, start=0, end=2),),
            )
            for i, _ in enumerate(seeds)
        ]


class Group:
    def __init__(self, story: Story) -> None:
        self.story = story
        self.parts: list[Batch] = []

    def awake(self, what: Awake = "all"):  # type: ignore[no-untyped-def]
        return self.story.span(f"trainer {what}")

    def logprobs(
        self, batch: Batch, policy: Policy = "actor", temperature: float | None = None
    ) -> list[list[FloatArray]]:
        self.story.events.append(f"logprobs {policy}")
        return [[np.full(len(t.token_ids), -0.7, np.float32) for t in g.trajectories] for g in batch.groups]

    def score_old(self, batch: Batch) -> Batch:
        return batch.with_logprobs("old_logprobs", self.logprobs(batch))

    def update(self, part: Batch, algorithm: AlgorithmConfig, step: int) -> UpdateReport:
        self.story.events.append(f"update {len(part.groups)} in step {step}")
        self.parts.append(part)
        return UpdateReport(loss=0.1, grad_norm=2.0, lr=1e-3, skipped=False, metrics={"actor/pg_loss": 0.1})

    def push(self, engines: EngineFleet, version: int) -> dict[str, float]:
        self.story.events.append(f"push {version}")
        return {"sync/version": float(version)}


def config(**algorithm: object) -> Config:
    return Config(
        model=ModelSection(path="m"),
        data=DataConfig(train=("t",), max_response_length=4),
        rewards={"default": ExactReward()},
        rollout=RolloutConfig(n=4),
        algorithm=AlgorithmConfig(train_batch_size=4, **algorithm),  # type: ignore[arg-type]
    )


def run(cfg: Config, keep: bool = False) -> tuple[Story, Group, dict[str, float]]:
    prompts = [
        Prompt(
            id=str(i), task="t", domain="sns", data_source="d", messages=(Message(role="user", content="?"),),
            token_ids=np.array([5, i], np.int32), reference="yes", reward="default",
        )
        for i in range(8)
    ]  # fmt: skip
    story = Story()
    group, fleet = Group(story), Fleet(story)
    result = rl_step(
        3,
        InTurn(PromptStream(prompts, seed=0), fleet, build_rewards(cfg.rewards), cfg, (2,)),
        group,
        fleet,
        cfg,
        story.span,
        (lambda batch, parts: story.events.append(f"keep {len(batch.groups)} in {parts}")) if keep else None,
    )
    return story, group, result.metrics


def test_one_update_needs_no_old_logprobs() -> None:
    story, group, metrics = run(config(ppo_mini_batch_size=4))
    assert story.events == [
        "engines all begins", "gen begins", "gen ends", "engines all ends",
        "trainer all begins", "update_actor begins", "update 4 in step 3", "update_actor ends",
        "update_weights begins", "trainer weights begins", "engines weights begins", "push 3",
        "engines weights ends", "trainer weights ends", "update_weights ends",
        "trainer all ends",
    ]  # fmt: skip
    assert group.parts[0].groups[0].trajectories[0].old_logprobs is None
    assert metrics["sync/version"] == 3 and metrics["actor/grad_norm"] == 2.0
    assert metrics["perf/total_num_tokens"] == 4 * 4 * (2 + 2)


def test_several_updates_share_one_set_of_old_logprobs() -> None:
    story, group, metrics = run(config(ppo_mini_batch_size=2, ppo_epochs=2))
    assert story.events.count("logprobs actor") == 1
    assert [e for e in story.events if e.startswith("update 2")] == ["update 2 in step 3"] * 4
    for part in group.parts:
        for trajectory in part.groups[0].trajectories:
            assert trajectory.old_logprobs is not None and (trajectory.old_logprobs == np.float32(-0.7)).all()
    assert metrics["actor/updates"] == 4


def test_a_kept_batch_is_seen_after_the_scores_and_before_the_updates() -> None:
    story, _, _ = run(config(ppo_mini_batch_size=2), keep=True)
    at = story.events.index("keep 4 in 2")
    assert "logprobs actor" in story.events[:at]
    assert not [e for e in story.events[:at] if e.startswith("update 2")]
    assert len([e for e in story.events[at:] if e.startswith("update 2")]) == 2


def test_kl_asks_for_the_reference_policy() -> None:
    story, group, _ = run(config(ppo_mini_batch_size=4, kl=KlConfig(coef=0.1)))
    assert story.events.count("logprobs reference") == 1
    assert group.parts[0].groups[0].trajectories[0].ref_logprobs is not None


@pytest.mark.parametrize(
    ("groups", "mini", "updates"), [(4, 4, 1), (4, 2, 2), (3, 2, 2), (1, 4, 1), (5, 2, 2)]
)
def test_updates_per_batch(groups: int, mini: int, updates: int) -> None:
    assert updates_per_batch(config(ppo_mini_batch_size=mini), groups) == updates
