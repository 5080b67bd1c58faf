"""One engine per mode for the whole session."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from redone.cluster.cluster import RayCluster
from redone.data.tiny import make_tiny_model
from tests.engines.harness import LiveEngine, engine_config
from tests.engines.plants import planted_cluster

LAYOUT = {
    "cluster": {"gpus_per_node": 2},
    "trainer": {"parallel": {"tensor": 2, "expert": 2}},
    "weights": {"delta": True},
}


class SharedCluster:
    """One cluster for many tests; a process can have only one, so a test that starts its own ends it."""

    def __init__(self, work: Path) -> None:
        self._work, self._stack, self._starts = work, ExitStack(), 0
        self._cluster: RayCluster | None = None

    def get(self) -> RayCluster:
        if self._cluster is None:
            self._starts += 1
            work = self._work / str(self._starts)
            model = make_tiny_model(work / "model", "qwen3_moe")
            self._cluster = self._stack.enter_context(planted_cluster(model, work, LAYOUT))
        return self._cluster

    def end(self) -> None:
        self._stack.close()
        self._cluster = None


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedCluster]:
    shared = SharedCluster(tmp_path_factory.mktemp("cluster"))
    yield shared
    shared.end()


@pytest.fixture
def cluster(shared_cluster: SharedCluster) -> RayCluster:
    """A mixture of experts on two trainer ranks (TP 2 with sequence parallelism, EP 2) and one engine."""
    return shared_cluster.get()


@pytest.fixture
def alone(shared_cluster: SharedCluster) -> None:
    """For a test that starts a cluster of its own."""
    shared_cluster.end()


@pytest.fixture(scope="session", params=["in_process_moe", "async_dense_tied"])
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveEngine]:
    work = tmp_path_factory.mktemp(request.param)
    in_process = request.param == "in_process_moe"
    # vLLM's CPU build packs experts and the head of tied embeddings apart from their parameters
    kind, tied = ("qwen3_moe", False) if in_process else ("llama", True)
    folder = make_tiny_model(work / "model", kind, dtype=torch.float32, tie_word_embeddings=tied)
    engine = LiveEngine(engine_config(folder, in_process), folder, work)
    yield engine
    engine.process.stop()
    engine.writer.close()
