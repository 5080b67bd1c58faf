"""A cancelled prompt leaves the engine: nothing is computed for it any more, and the engine goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from redone.cluster.cluster import RayCluster
from redone.data.tiny import make_tiny_model
from redone.types import Sampling
from tests.engines.plants import plant, planted_cluster

PROMPT = [3, 20, 50, 7]

pytestmark = pytest.mark.slow


async def unfinished(engine: Any) -> bool:
    core = engine._core
    if engine.cfg.rollout.engine.in_process:
        return bool(core._loop._waiting) or bool(await core._loop.call("has_unfinished_requests"))
    return bool(core.llm.output_processor.has_unfinished_requests())


def cancel_one_of_two(cluster: RayCluster) -> None:
    """Paused, no request can end by itself."""
    fleet = cluster.engines()
    peer = fleet.peers[0]
    sampling = Sampling(max_tokens=20, ignore_eos=True)

    async def run() -> tuple[list[Any], list[Any]]:
        expected = await fleet.generate(PROMPT, sampling, [7, 8])
        fleet._call("pause")
        kept = asyncio.ensure_future(fleet.generate(PROMPT, sampling, [7, 8]))
        doomed = asyncio.ensure_future(fleet.generate([*PROMPT, 9], sampling, range(8)))
        while fleet.in_flight[0] < 10 or not plant(peer, unfinished):
            await asyncio.sleep(0.05)
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        assert fleet.in_flight[0] == 2
        fleet._call("resume")
        return expected, await kept

    expected, kept = asyncio.run(run())
    assert [c.token_ids.tolist() for c in kept] == [c.token_ids.tolist() for c in expected]
    assert fleet.in_flight == [0]
    assert not plant(peer, unfinished), "the engine still works for the cancelled prompt"


def test_cancelled_prompts_leave_the_engine(cluster: RayCluster) -> None:
    cancel_one_of_two(cluster)


@pytest.mark.usefixtures("alone")
def test_the_same_with_processes_of_its_own(tmp_path: Path) -> None:
    """AsyncLLM."""
    model = make_tiny_model(tmp_path / "model", "qwen3")
    with planted_cluster(model, tmp_path / "run", {"rollout": {"engine": {"in_process": False}}}) as cluster:
        cancel_one_of_two(cluster)
