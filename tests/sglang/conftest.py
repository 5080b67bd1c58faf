"""One real SGLang engine on the CPU per model for the whole session (`make test-sglang`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from redone.config.schema import Config, DataConfig, ExactReward, ModelSection, RolloutConfig, SglangEngine
from redone.data.tiny import make_tiny_model
from tests.engines.harness import LiveEngine


def sglang_config(path: Path, **rollout: Any) -> Config:
    return Config(
        model=ModelSection(path=str(path), dtype="float32"),
        data=DataConfig(train=("unused",), max_prompt_length=128, max_response_length=384),
        rewards={"default": ExactReward()},
        rollout=RolloutConfig(engine=SglangEngine(max_num_seqs=64, max_total_tokens=8192), **rollout),
    )


@pytest.fixture(scope="session", params=["qwen3", "qwen3_tied"])
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveEngine]:
    work = tmp_path_factory.mktemp(request.param)
    folder = make_tiny_model(work / "model", "qwen3", tie_word_embeddings=request.param == "qwen3_tied")
    engine = LiveEngine(sglang_config(folder), folder, work)
    yield engine
    engine.process.stop()
    engine.writer.close()
