"""One engine per mode for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from redone.data.tiny import make_tiny_model
from tests.engines.harness import LiveEngine, engine_config


@pytest.fixture(scope="session", params=["in_process_moe", "async_dense"])
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveEngine]:
    work = tmp_path_factory.mktemp(request.param)
    kind = "qwen3_moe" if request.param == "in_process_moe" else "qwen3"
    folder = make_tiny_model(work / "model", kind, dtype=torch.float32)
    engine = LiveEngine(engine_config(folder, request.param == "in_process_moe"), folder, work)
    yield engine
    engine.process.stop()
    engine.writer.close()
