"""Engines that die by kill -9, at every point of a step: they come back with the weights that all hold."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import psutil
import pytest

from redone.cluster.cluster import RayCluster
from redone.data.tiny import make_tiny_model
from redone.errors import EngineError
from redone.types import Completion, Sampling
from tests.engines import plants
from tests.engines.plants import plant, planted_cluster, push_random

PROMPTS = [[3 + i, 20 + i, 50, 7] for i in range(6)]


def generate(cluster: RayCluster) -> list[list[Completion]]:
    async def run() -> list[list[Completion]]:
        fleet, sampling = cluster.engines(), Sampling(max_tokens=40, ignore_eos=True)
        return await asyncio.gather(*(fleet.generate(p, sampling, [1, 2]) for p in PROMPTS))

    return asyncio.run(run())


def tokens(groups: list[list[Completion]]) -> list[list[int]]:
    return [c.token_ids.tolist() for group in groups for c in group]


def doomed(cluster: RayCluster, *arguments: Any) -> list[psutil.Process]:
    """Plant the death of engine 0; its process and everything below it."""
    peer = cluster.engines().peers[0]
    pids = cluster._pids[peer.name]
    plant(peer, plants.die_in, *arguments)
    return [psutil.Process(pid) for pid in pids]


def assert_replaced(cluster: RayCluster, old: list[psutil.Process], restarts: int) -> None:
    assert cluster.engines().restarts == restarts
    assert not [p for p in old if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert all(psutil.pid_exists(pid) for pid in cluster._pids["engine 0"])


def test_killed_during_a_weight_update(cluster: RayCluster) -> None:
    """The third bucket never arrives; the update still ends with every engine at the new version."""
    before = cluster.engines().restarts
    push_random(cluster, 1)
    old = doomed(cluster, "load")
    assert push_random(cluster, 2)["sync/canary_max_abs_diff"] <= 1e-4
    assert_replaced(cluster, old, before + 1)
    completions = [c for group in generate(cluster) for c in group]
    assert {s.version for c in completions for s in c.versions} == {2}
    assert push_random(cluster, 3)["sync/canary_max_abs_diff"] <= 1e-4


@pytest.mark.slow
@pytest.mark.extra  # five minutes
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("in_process", [True, False], ids=["in-process", "async"])
def test_killed_at_every_other_point(tmp_path: Path, in_process: bool) -> None:
    """During generation, wake-up, sleep: the same tokens as undisturbed; then the restarts are used up."""
    model = make_tiny_model(tmp_path / "model", "qwen3")
    over = {"rollout": {"engine": {"in_process": in_process}, "max_engine_restarts": 3}}
    with planted_cluster(model, tmp_path / "run", over) as cluster:
        push_random(cluster, 1)
        expected = tokens(generate(cluster))
        old = doomed(cluster, "generate", 0.05)
        assert tokens(generate(cluster)) == expected
        assert_replaced(cluster, old, 1)
        old = doomed(cluster, "wake")
        with cluster.engines().awake():
            assert tokens(generate(cluster)) == expected
        assert_replaced(cluster, old, 2)
        old = doomed(cluster, "sleep")
        with cluster.engines().awake():
            pass
        with cluster.engines().awake("weights"):
            assert push_random(cluster, 2)["sync/canary_max_abs_diff"] <= 1e-4
        assert_replaced(cluster, old, 3)
        doomed(cluster, "generate")
        with pytest.raises(EngineError, match=r"engine 0 died, and rollout.max_engine_restarts=3"):
            generate(cluster)


@pytest.mark.slow
@pytest.mark.extra  # a minute; tests/unit/test_health.py has the detection
@pytest.mark.usefixtures("alone")
def test_an_engine_that_hangs_is_replaced(tmp_path: Path) -> None:
    """Every process runs and shows it; the loop does not. A new engine gives the same tokens."""
    model = make_tiny_model(tmp_path / "model", "qwen3")
    with planted_cluster(model, tmp_path / "run", {"cluster": {"stall_timeout_s": 5}}) as cluster:
        expected = tokens(generate(cluster))
        peer = cluster.engines().peers[0]
        old = [psutil.Process(pid) for pid in cluster._pids[peer.name]]
        plant(peer, plants.hang)
        assert tokens(generate(cluster)) == expected
        assert_replaced(cluster, old, 1)
        (verdict,) = peer.verdict
        assert "engine 0 has ended no step of its loop for" in verdict and "stall_timeout_s=5" in verdict


@pytest.mark.slow
@pytest.mark.extra  # two and a half minutes
@pytest.mark.usefixtures("alone")
def test_an_engines_own_process_is_killed(tmp_path: Path) -> None:
    """vLLM's EngineCore dies, the actor around it lives: as good as dead."""
    model = make_tiny_model(tmp_path / "model", "qwen3")
    over = {"rollout": {"engine": {"in_process": False}}}
    with planted_cluster(model, tmp_path / "run", over) as cluster:
        expected = tokens(generate(cluster))
        pids = cluster._pids["engine 0"]
        old = [psutil.Process(pid) for pid in pids]
        next(p for p in old[1:] if p.children()).kill()
        assert tokens(generate(cluster)) == expected
        assert_replaced(cluster, old, 1)
