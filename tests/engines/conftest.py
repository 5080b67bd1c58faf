"""One engine per mode for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

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


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A mixture of experts on two trainer ranks (TP 2 with sequence parallelism, EP 2) and one engine."""
    work = tmp_path_factory.mktemp("cluster")
    model = make_tiny_model(work / "model", "qwen3_moe")
    with planted_cluster(model, work, LAYOUT) as started:
        yield started


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
