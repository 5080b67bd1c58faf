"""Tiny models, what Hugging Face computes with them, and one start of 1, 2 and 4 ranks for all cases."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import reference
from ranks import Group, run_cases

from redone.data.tiny import make_tiny_model

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("qwen3", {}),
    "moe": ("qwen3_moe", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "odd": ("qwen3", {"vocab_size": 127}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one model per kind and `<kind>.pkl`, its reference values."""
    root = tmp_path_factory.mktemp("dist")
    for kind, (family, overrides) in MODELS.items():
        path = make_tiny_model(root / kind, family, seed=3, **overrides)
        model = reference.load_model(path)
        vocab = overrides.get("vocab_size", 128)
        raw = [reference.make_batch(seed, vocab) for seed in (1, 2, 3)]
        batches = [reference.with_old_logprobs(model, b, seed) for seed, b in enumerate(raw)]
        values: dict[str, Any] = {
            "batches": batches,
            "logprobs": reference.all_logprobs(model, raw[0]),
            "logprobs_cold": reference.all_logprobs(model, raw[0], temperature=0.7),
            "initial": reference.folder_tensors(dict(model.named_parameters())),
        }
        values["loss"], values["gradients"] = reference.gradients(model, batches[0])
        values["history"] = reference.train(model, batches)
        values["trained"] = reference.folder_tensors(dict(model.named_parameters()))
        (root / f"{kind}.pkl").write_bytes(pickle.dumps(values))
    return root


def _start(models: Path, ranks: str) -> Group:
    from cases import CASES

    return run_cases(
        int(ranks[0]), CASES[ranks], models / f"world{ranks}", timeout_s=900 if "_" in ranks else 420
    )


def _world(ranks: str) -> Any:
    @pytest.fixture(scope="session", name=f"world{ranks}")
    def start(models: Path) -> Group:
        return _start(models, ranks)

    return start


world1, world2, world4, world4_long, world2_slow, world4_slow = map(
    _world, ("1", "2", "4", "4_long", "2_slow", "4_slow")
)


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Group:
    """The group of ranks that the test is parametrized with."""
    result: Group = request.getfixturevalue(f"world{request.param}")
    return result
