"""The engine's expert choices in the trainer (routing replay R3), through real actors."""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from redone.cluster.cluster import RayCluster
from redone.config.schema import Config
from redone.data.pack import build_shards, plan_step, scatter_rows
from redone.data.tiny import Kind, make_tiny_model
from redone.rollout.build import build_batch
from redone.trainer import build_trainer
from redone.types import Batch, Completion, FloatArray, Group, Prompt, Rollout, Sampling, Score
from tests.engines.engine_process import EngineProcess
from tests.engines.plants import BASE
from tests.engines.test_layers import with_other_experts

Generate = Callable[[list[int], Sampling, list[int]], Awaitable[list[Completion]]]


def rolled_out(generate: Generate, cfg: Config, prompts: int, samples: int, sampling: Sampling) -> Batch:
    """What a step would train on."""
    rng = np.random.default_rng(5)

    async def group(index: int) -> Group:
        ids = rng.integers(3, 100, 20 + index).astype(np.int32)
        prompt = Prompt(
            id=str(index), task="t", domain="general", data_source="d", messages=(), token_ids=ids,
            reference=None, reward="default",
        )  # fmt: skip
        seeds = [100 * index + i for i in range(samples)]
        completions = await generate(ids.tolist(), sampling, seeds)
        scores = [Score(raw=i % 2, value=i % 2, correct=bool(i % 2)) for i in range(samples)]
        rollouts = tuple(
            Rollout(prompt=prompt, completion=c, score=s) for c, s in zip(completions, scores, strict=True)
        )
        return Group(prompt=prompt, epoch=0, rollouts=rollouts)

    async def everyone() -> list[Group]:
        return await asyncio.gather(*(group(i) for i in range(prompts)))

    return build_batch(asyncio.run(everyone()), cfg)


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


@pytest.mark.slow
def test_the_trainer_repeats_the_engines_choices(cluster: RayCluster) -> None:
    """fp32, tensor-, sequence- and expert-parallel: the same choices, the same log-probabilities."""
    trainers, sampling = cluster.trainers(), Sampling(max_tokens=10, ignore_eos=True, routes=True)
    batch = rolled_out(cluster.engines().generate, trainers.cfg, 3, 3, sampling)
    assert batch.has_routes
    assert differences(batch, trainers.logprobs(batch, temperature=1.0)).max() <= 1e-5
    scored = trainers.score_old(batch)
    for old, new in zip(batch.groups, scored.groups, strict=True):
        assert new.prompt_routes is old.prompt_routes and new.trajectories[0].old_logprobs is not None
    moved = dataclasses.replace(batch, groups=tuple(map(with_other_experts, batch.groups)))
    assert differences(moved, trainers.logprobs(moved, temperature=1.0)).mean() > 1e-3


def scored(cfg: Config, batches: list[Batch], folder: str) -> list[list[list[FloatArray]]]:
    """One trainer rank's log-probabilities of each batch; to be called in a process of its own."""
    trainer = build_trainer(cfg, 0, 1, f"file://{folder}/rendezvous")
    found = []
    for batch in batches:
        plan = plan_step(batch, 1, cfg.trainer.max_token_len_per_rank, cfg.trainer.prefix_sharing)
        rows = trainer.logprobs(build_shards(batch, plan, 1)[0], "actor", 1.0)
        assert rows is not None
        found.append(scatter_rows(batch, plan, [rows]))
    return found


def mismatch(work: Path, kind: Kind) -> dict[str, tuple[float, float]]:
    """(mean, largest) |engine - trainer| in bfloat16, with the engine's choices and without."""
    model, mixture = make_tiny_model(work, kind, dtype=torch.bfloat16), kind == "qwen3_moe"
    cfg = Config.model_validate(
        {
            **BASE,
            "model": {"path": str(model), "dtype": "bfloat16"},
        }
    )
    with EngineProcess(cfg) as engine:
        engine.call("start")
        batch = rolled_out(
            lambda *args: asyncio.wrap_future(engine.submit("generate", *args)),
            cfg,
            prompts=16,
            samples=4,
            sampling=Sampling(max_tokens=48, ignore_eos=True, routes=mixture),
        )
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        runs = process.submit(scored, cfg, [batch, batch.without_routes()], str(work)).result(timeout=400)
    apart = [differences(batch, run) for run in runs]
    return {n: (float(a.mean()), float(a.max())) for n, a in zip(("replay", "free"), apart, strict=True)}


@pytest.mark.slow
def test_in_bf16_replay_brings_the_mixture_to_the_dense_level(tmp_path: Path) -> None:
    dense = mismatch(tmp_path / "dense", "qwen3")["free"]
    print(f"dense {dense}", flush=True)
    mixture = mismatch(tmp_path / "moe", "qwen3_moe")
    print(f"mixture {mixture}", flush=True)
    assert mixture["free"][1] > 2 * dense[1]
    assert mixture["replay"][0] <= 1.1 * dense[0]
    assert mixture["replay"][1] <= 1.5 * dense[1]
