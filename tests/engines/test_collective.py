"""weights.channel=collective with real engines: every rank receives the trainer's broadcast."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from redone.data.tiny import make_tiny_model
from redone.weights.collective import CollectiveWriter, bucket_span
from tests.engines.harness import LiveEngine
from tests.engines.plants import planted_cluster, push_random
from tests.engines.test_faults import assert_replaced, doomed, generate, tokens


def test_an_engine_loads_what_is_broadcast(live: LiveEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by shared memory: the engine then computes with exactly these weights. A flipped bit is named."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    shm, path = live.writer, str(live.work / "broadcast")
    writer = CollectiveWriter(
        path, live.plan.total_bytes, host="127.0.0.1", size=2, backend="gloo", timeout_s=60
    )
    live.writer = writer
    try:
        for damage in (True, False):
            address = writer.begin()
            new, buckets = live.next_weights()
            buckets = tuple(dataclasses.replace(b, location=address) for b in buckets)
            if damage:
                tensor = live.plan.tensors[-1]
                writer.view(tensor.offset, tensor.nbytes)[5] ^= 4
            for index in range(len(live.plan.buckets)):
                writer.announce(*bucket_span(live.plan, index))
            ending = threading.Thread(target=writer.finish)
            ending.start()
            if damage:
                with pytest.raises(Exception, match=tensor.name.replace(".", r"\.")):
                    live.push(buckets, new)
            else:
                live.push(buckets, new)
            ending.join()
    finally:
        live.writer = shm
        writer.close()
    (completion,) = live.generate([5, 6, 7, 8], [11])
    assert {s.version for s in completion.versions} == {live.version}
    expected = live.held.logprobs([5, 6, 7, 8], completion.token_ids.tolist())
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("engine_ranks", [pytest.param(1, marks=pytest.mark.extra), 2])
def test_updates_and_kills(tmp_path: Path, engine_ranks: int) -> None:
    """Random updates on all engines; one killed while idle, one killed in the middle of an update."""
    model = make_tiny_model(tmp_path / "model", "qwen3_moe", dtype=torch.float32)
    over: dict[str, Any] = {
        "cluster": {"gpus_per_node": 2},
        "trainer": {"parallel": {"tensor": 2, "expert": 2}, "timeout_s": 80},
        "rollout": {
            "engine": {"in_process": engine_ranks == 1},
            "tensor_model_parallel_size": engine_ranks,
            "replicas": 2 if engine_ranks == 1 else 1,
        },
        "weights": {"channel": "collective"},
    }
    with planted_cluster(model, tmp_path / "run", over) as cluster:
        for version in (1, 2, 3):
            metrics = push_random(cluster, version)
            assert metrics["sync/canary_max_abs_diff"] <= 1e-4
            assert metrics["sync/bytes_ratio"] == 1.0
        if engine_ranks > 1:
            return
        expected = tokens(generate(cluster))
        old = doomed(cluster, "generate", 0.05)
        assert tokens(generate(cluster)) == expected  # by the other engine, while the new one starts
        cluster.engines()._settle()
        assert_replaced(cluster, old, 1)
        old = doomed(cluster, "load")
        assert push_random(cluster, 4)["sync/canary_max_abs_diff"] <= 1e-4
        assert_replaced(cluster, old, 2)
        versions = {s.version for group in generate(cluster) for c in group for s in c.versions}
        assert versions == {4}
        old = doomed(cluster, "begin_update")
        assert push_random(cluster, 5)["sync/canary_max_abs_diff"] <= 1e-4
        assert_replaced(cluster, old, 3)
