"""The engine's expert choices in the trainer (routing replay R3), through real actors."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from redone.cluster.cluster import RayCluster
from redone.data.tiny import Kind, make_tiny_model
from redone.rollout.build import build_batch
from redone.types import Batch, FloatArray, Group, Prompt, Rollout, Sampling, Score
from tests.engines.plants import planted_cluster
from tests.engines.test_layers import with_other_experts


def rolled_out(cluster: RayCluster, prompts: int, samples: int, tokens: int, routes: bool = True) -> Batch:
    """What a step would train on."""
    rng, sampling = np.random.default_rng(5), Sampling(max_tokens=tokens, ignore_eos=True, routes=routes)

    async def group(index: int) -> Group:
        ids = rng.integers(3, 100, 20 + index).astype(np.int32)
        prompt = Prompt(
            id=str(index), task="t", domain="general", data_source="d", messages=(), token_ids=ids,
            reference=None, reward="default",
        )  # fmt: skip
        seeds = [100 * index + i for i in range(samples)]
        completions = await cluster.engines().generate(ids.tolist(), sampling, seeds)
        scores = [Score(raw=i % 2, value=i % 2, correct=bool(i % 2)) for i in range(samples)]
        rollouts = tuple(
            Rollout(prompt=prompt, completion=c, score=s) for c, s in zip(completions, scores, strict=True)
        )
        return Group(prompt=prompt, epoch=0, rollouts=rollouts)

    async def everyone() -> list[Group]:
        return await asyncio.gather(*(group(i) for i in range(prompts)))

    return build_batch(asyncio.run(everyone()), cluster.trainers().cfg)


def differences(batch: Batch, scored: list[list[FloatArray]]) -> FloatArray:
    """|engine - trainer| of every response token."""
    pairs = zip(batch.groups, scored, strict=True)
    return np.concatenate(
        [
            np.abs(trajectory.engine_logprobs - ours)
            for group, rows in pairs
            for trajectory, ours in zip(group.trajectories, rows, strict=True)
        ]
    )


def test_the_trainer_repeats_the_engines_choices(cluster: RayCluster) -> None:
    """fp32, tensor-, sequence- and expert-parallel: the same choices, the same log-probabilities."""
    trainers, batch = cluster.trainers(), rolled_out(cluster, prompts=3, samples=3, tokens=10)
    assert batch.has_routes
    assert differences(batch, trainers.logprobs(batch, temperature=1.0)).max() <= 1e-5
    scored = trainers.score_old(batch)
    for old, new in zip(batch.groups, scored.groups, strict=True):
        assert new.prompt_routes is old.prompt_routes and new.trajectories[0].old_logprobs is not None
    moved = dataclasses.replace(batch, groups=tuple(map(with_other_experts, batch.groups)))
    assert differences(moved, trainers.logprobs(moved, temperature=1.0)).mean() > 1e-3


def mismatch(work: Path, kind: Kind, router_fp32: bool = True) -> dict[str, tuple[float, float]]:
    """(mean, max) of |engine - trainer| in bfloat16, with the engine's choices and without."""
    model = make_tiny_model(work / "model", kind, dtype=torch.bfloat16)
    mixture = kind == "qwen3_moe"
    over = {
        "model": {"path": str(model), "dtype": "bfloat16"},
        "trainer": {"moe": {"routing_replay": "engine" if mixture else "auto", "router_fp32": router_fp32}},
    }
    with planted_cluster(model, work / "run", over) as cluster:
        batch = rolled_out(cluster, prompts=16, samples=4, tokens=48, routes=mixture)
        found = {}
        for name, one in {"replayed": batch, "free": batch.without_routes()}.items():
            apart = differences(batch, cluster.trainers().logprobs(one, temperature=1.0))
            found[name] = (float(apart.mean()), float(apart.max()))
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_in_bf16_replay_brings_the_mixture_to_the_dense_level(tmp_path: Path) -> None:
    dense, mixture = mismatch(tmp_path / "dense", "qwen3"), mismatch(tmp_path / "moe", "qwen3_moe")
    print(f"dense {dense['free']}, mixture {mixture}")
    assert mixture["free"][1] > 2 * dense["free"][1]
    assert mixture["replayed"][0] <= 1.1 * dense["free"][0]
    assert mixture["replayed"][1] <= 1.5 * dense["free"][1]
