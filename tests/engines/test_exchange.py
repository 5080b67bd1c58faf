"""Random weights, many times, through the whole path: trainer ranks, channel, engine ranks, canary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from redone.cluster.cluster import RayCluster
from redone.data.tiny import make_tiny_model
from tests.engines.plants import planted_cluster, push_random

TOLERANCE = 1e-4


def assert_exact(cluster: RayCluster, updates: int) -> None:
    """Every push compares fixed prompts on trainer and engine; the weights really change."""
    first = cluster.engines().canary([[5, 6, 7, 8]], [9, 10])[0].scores[0]
    for version in range(100, 100 + updates):
        metrics = push_random(cluster, version, scale=0.02)
        assert 0 < metrics["sync/canary_max_abs_diff"] <= TOLERANCE, version
    last = cluster.engines().canary([[5, 6, 7, 8]], [9, 10])[0].scores[0]
    assert abs(first - last).max() > 100 * TOLERANCE


def test_random_updates_are_exact(cluster: RayCluster) -> None:
    assert_exact(cluster, updates=5)


def test_delta_sends_the_layers_that_changed(cluster: RayCluster) -> None:
    whole = push_random(cluster, 201)
    total = sum(t.nbytes for t in cluster.trainers().plan.tensors)
    assert whole["sync/bytes_needed"] == whole["sync/bytes_written"] == total
    assert 0 < whole["sync/bytes_gathered"] < total  # rank 0 has its own shards
    layer = push_random(cluster, 202, only="decoder.layers.1.")
    expected = sum(t.nbytes for t in cluster.trainers().plan.tensors if ".layers.1." in t.name)
    assert layer["sync/bytes_needed"] == layer["sync/bytes_written"] == expected
    assert 0 < layer["sync/canary_max_abs_diff"] <= TOLERANCE
    nothing = push_random(cluster, 203, only="no such parameter")
    assert nothing["sync/bytes_written"] == nothing["sync/bytes_gathered"] == 0
    assert nothing["sync/canary_max_abs_diff"] == layer["sync/canary_max_abs_diff"]
    assert push_random(cluster, 204)["sync/canary_max_abs_diff"] <= TOLERANCE


CASES: dict[str, tuple[str, int, dict[str, int], int]] = {
    # model, trainer ranks, their layout, tensor-parallel size of the engine
    "moe TP2xEP2 to TP2": ("qwen3_moe", 4, {"tensor": 2, "expert": 2}, 2),
    "moe PP2 to TP1": ("qwen3_moe", 2, {"pipeline": 2}, 1),
    "dense PP2 to TP2": ("llama", 2, {"pipeline": 2}, 2),
    "dense TP2 to TP1": ("qwen3", 2, {"tensor": 2}, 1),
}


@pytest.mark.slow
@pytest.mark.extra  # four clusters, fifty updates each
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("case", CASES)
def test_fifty_random_updates_are_exact(tmp_path: Path, case: str) -> None:
    kind, ranks, layout, engine_ranks = CASES[case]
    model = make_tiny_model(tmp_path / "model", kind, tie_word_embeddings=kind == "llama")  # type: ignore[arg-type]
    over: dict[str, Any] = {
        "cluster": {"gpus_per_node": ranks},
        "trainer": {"parallel": layout},
        "rollout": {
            "engine": {"in_process": engine_ranks == 1},
            "tensor_model_parallel_size": engine_ranks,
        },
    }
    with planted_cluster(model, tmp_path / "run", over) as cluster:
        assert_exact(cluster, updates=50)
