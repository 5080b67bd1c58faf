"""Faults planted inside real actors, and the cluster that carries them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle

import redone.cluster.cluster as cluster_module
from redone.cluster.actors import EngineActor, TrainerActor
from redone.cluster.cluster import RayCluster
from redone.config.schema import Config

BASE: dict[str, Any] = {
    "data": {"train": ["unused"], "max_prompt_length": 64, "max_response_length": 64},
    "rewards": {"default": {"family": "exact"}},
    "algorithm": {"train_batch_size": 4, "ppo_mini_batch_size": 4, "total_steps": 10},
    "rollout": {"engine": {"type": "vllm", "in_process": True, "kv_cache_mb": 64, "max_num_seqs": 64}},
    "trainer": {"optim": {"lr": 3e-3, "weight_decay": 0.0}, "max_token_len_per_rank": 4096, "timeout_s": 120},
    "weights": {"bucket_bytes": 100_000},
}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {k: merged(base[k], v) if isinstance(v, dict) and k in base else v for k, v in over.items()}
    return {**base, **both}


class PlantedEngine(EngineActor):
    """An engine actor of which a test can change the inside."""

    async def plant(self, what: Callable[..., Any], *args: Any) -> Any:
        return await what(self.engine, *args)


class PlantedTrainer(TrainerActor):
    def plant(self, what: Callable[..., Any], *args: Any) -> Any:
        return what(self.trainer, *args)


@contextmanager
def planted_cluster(model: Path, work: Path, over: dict[str, Any]) -> Iterator[RayCluster]:
    """A RayCluster of real trainers and engines on the model folder."""
    values = merged(BASE, {"model": {"path": str(model), "dtype": "float32"}, **over})
    cfg = Config.model_validate(values)
    (work / "logs").mkdir(parents=True)
    cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["_"]))
    patch = pytest.MonkeyPatch()
    patch.setattr(cluster_module, "EngineActor", PlantedEngine)
    patch.setattr(cluster_module, "TrainerActor", PlantedTrainer)
    try:
        cluster = RayCluster(cfg, work / "logs")
        try:
            yield cluster
        finally:
            cluster.close(graceful=True)
    finally:
        patch.undo()


def plant(peer: Any, what: Callable[..., Any], *args: Any) -> Any:
    """Run `what(engine or trainer, *args)` in the actor (a coroutine function for engines)."""
    return ray.get(peer.handle.plant.remote(what, *args), timeout=60)


def push_random(cluster: RayCluster, version: int, scale: float = 0.01, only: str = "") -> dict[str, float]:
    """A random update of every weight (or those with `only` in their name), pushed; the push's metrics."""
    for peer in cluster.trainers().peers:
        plant(peer, perturb, version, scale, only)
    return cluster.trainers().push(cluster.engines(), version)


async def die_in(engine: Any, method: str, after_s: float = 0.0) -> None:
    """kill -9 of the engine's process at (or `after_s` into) its next call of `method`."""
    import asyncio
    import os
    import signal

    whole = getattr(engine, method)

    async def dying(*args: Any) -> Any:
        running = asyncio.ensure_future(whole(*args)) if after_s else None
        await asyncio.sleep(after_s)
        os.kill(os.getpid(), signal.SIGKILL)
        return running

    setattr(engine, method, dying)


async def hang(engine: Any) -> None:
    """From now on the engine's loop computes nothing, while its process and its threads run."""
    import asyncio
    import time

    running = asyncio.ensure_future(engine._core.rpc(lambda worker: time.sleep(600)))
    engine._hung = running  # kept: else it is collected


async def norm_epsilon(engine: Any, layer: int, value: float) -> float:
    """Set the epsilon of a layer's input norm; returns the old one."""

    def change(worker: Any) -> float:
        norm = worker.get_model().model.layers[layer].input_layernorm
        old, norm.variance_epsilon = norm.variance_epsilon, value
        return old

    return (await engine._core.rpc(change))[0]


def trainer_mlp_epsilon(trainer: Any, layer: int, value: float) -> float | None:
    """The same for the norm before a trainer's MLP, on the rank that has the layer."""
    for one in (layer for module in trainer.modules for layer in module.decoder.layers):
        if one.layer_number - 1 == layer:
            old, one.pre_mlp_layernorm.eps = one.pre_mlp_layernorm.eps, value
            return old
    return None


def trainer_tie(trainer: Any, layer: int) -> None:
    """The router's second row becomes its first one, a little larger."""
    rows = trainer.exporter.parameters[f"decoder.layers.{layer}.mlp.router.weight"].data
    rows[1] = rows[0] * (1 + 1e-6)


async def engine_tie(engine: Any, layer: int, on: bool) -> None:
    """The same on the engine, a little smaller; in the logits, as the rows are packed away."""

    def change(worker: Any) -> None:
        def smaller(gate: Any, args: Any, output: Any) -> None:
            output[0][:, 1] = output[0][:, 0] * (1 - 1e-6)

        gate = worker.get_model().model.layers[layer].mlp.gate
        if on:
            gate.planted = gate.register_forward_hook(smaller)
        else:
            gate.planted.remove()

    await engine._core.rpc(change)


async def flip_expert(engine: Any, layer: int) -> None:
    """Change the sign of what one expert's down projection computes with, after loading."""

    def change(worker: Any) -> None:
        experts = next(m for m in worker.get_model().model.layers[layer].modules() if hasattr(m, "w2_weight"))
        experts.w2_weight.data[3].neg_()

    await engine._core.rpc(change)


async def keep_packing(engine: Any, on: bool) -> None:
    """Leave out the CPU re-packing after a reload: vLLM 0.32's own bug."""
    import redone.engine.vllm as adapter

    if on:
        adapter._packing, adapter.refresh_cpu_packing = (
            adapter.refresh_cpu_packing,
            lambda model, loaded: None,
        )
    else:
        adapter.refresh_cpu_packing = adapter._packing


async def keep_caches(engine: Any, on: bool) -> None:
    """Commit without dropping the KV and prefix caches."""

    async def nothing() -> None: ...

    if on:
        engine._core.drop_caches = nothing
    else:
        del engine._core.drop_caches


def perturb(trainer: Any, seed: int, scale: float, only: str = "") -> None:
    """A random update of every parameter (or those with `only` in their Megatron name).

    The same on all ranks that share it: also replicated norms, whose copies must not drift apart.
    """
    import zlib

    import torch

    with torch.no_grad():
        for name, p in trainer.exporter.parameters.items():
            if only not in name:
                continue
            if name.startswith("output_layer") and trainer.shape.tied_embeddings:
                name = "embedding.word_embeddings.weight"  # the last stage's copy of it
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            noise = torch.randn(p.shape, generator=generator)
            p.add_(noise.to(p.device, p.dtype), alpha=scale)
