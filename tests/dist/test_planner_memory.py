"""The planner's memory model against torch's profiler on real trainer ranks: small models, 14 layouts and
options."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from ranks import Group, run_cases

from redone.data.tiny import make_tiny_model
from redone.layout import ModelShape
from redone.planner.memory import TrainerRanks, rank_memory

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("memory_worker.py")
PROMPT, CHUNK = 32, 128  # as the worker makes them
SIZES = dict(
    hidden_size=128, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    vocab_size=1024, max_position_embeddings=2048,
)  # fmt: skip
MODELS = {"dense": "qwen3", "moe": "qwen3_moe", "llama": "llama"}
ONE = (1, 1, 1, 1)
BF16, FULL = {"dtype": "bfloat16"}, {"recompute": "full"}
# name -> ranks, model, (tensor, pipeline, expert, expert tensor), tokens of a micro-batch, options
CASES: dict[str, tuple[int, str, tuple[int, int, int, int], int, dict[str, Any]]] = {
    "dense": (1, "dense", ONE, 512, {}),
    "dense bf16, 1,024 tokens": (1, "dense", ONE, 1024, BF16),
    "dense recomputed": (1, "dense", ONE, 512, FULL),
    "dense, whole logits": (1, "dense", ONE, 512, FULL | {"head": "reference"}),
    "MoE": (1, "moe", ONE, 512, {}),
    "MoE recomputed, 1,024 tokens": (1, "moe", ONE, 1024, FULL),
    "MoE bf16 recomputed": (1, "moe", ONE, 1024, BF16 | FULL),
    "Llama bf16 recomputed": (1, "llama", ONE, 512, BF16 | FULL),
    "dense TP2": (2, "dense", (2, 1, 1, 1), 512, {}),
    "dense PP2": (2, "dense", (1, 2, 1, 1), 512, {}),
    "MoE EP2": (2, "moe", (1, 1, 2, 1), 512, {}),
    "MoE PP2, 4 micro-batches": (2, "moe", (1, 2, 1, 1), 512, {"microbatches": 4}),
    "MoE TP2 ETP2": (2, "moe", (2, 1, 1, 2), 512, {}),
    "MoE EP2 bf16 recomputed": (2, "moe", (1, 1, 2, 1), 1024, BF16 | FULL),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    for kind, family in MODELS.items():
        moe = {"moe_intermediate_size": 96} if kind == "moe" else {}
        make_tiny_model(root / kind, family, **SIZES, **moe)  # type: ignore[arg-type]
    return root


@pytest.fixture(scope="module")
def measured(folder: Path) -> dict[int, Group]:
    """One start of ranks per world size."""
    groups = {}
    for world in (1, 2):
        cases = [
            (name, "measure", dict(path=str(folder / kind), layout=list(layout), tokens=tokens, **options))
            for name, (size, kind, layout, tokens, options) in CASES.items()
            if size == world
        ]
        groups[world] = run_cases(world, cases, folder / f"world{world}", timeout_s=540, worker=WORKER)
    return groups


def described(folder: Path, name: str) -> TrainerRanks:
    world, kind, (tensor, pipeline, expert, expert_tensor), tokens, options = CASES[name]
    return TrainerRanks(
        shape=ModelShape.from_hf(json.loads((folder / kind / "config.json").read_text())),
        world=world,
        tokens=tokens,
        tensor=tensor,
        pipeline=pipeline,
        expert=expert,
        expert_tensor=expert_tensor,
        modules="torch",
        bytes_per_value=2 if options.get("dtype") == "bfloat16" else 4,
        recompute=options.get("recompute") == "full",
        microbatches=options.get("microbatches", 2),
        loss_share=1 - PROMPT / tokens,
        head_chunk=None if options.get("head") == "reference" else CHUNK,
        device=False,
    )


@pytest.mark.parametrize("name", CASES)
def test_memory_of_a_rank(folder: Path, measured: dict[int, Group], name: str) -> None:
    world, _, (tensor, _, _, expert_tensor), tokens, _ = CASES[name]
    ranks = described(folder, name)
    for rank in measured[world][name]:
        # A random router is uneven; the planner's figure is for this rank's measured share.
        share = rank["routed"] * tensor / (tokens * expert_tensor) if rank["routed"] else 1.0
        memory = rank_memory(dataclasses.replace(ranks, routed=share), rank["pp_rank"])
        assert memory.weights == ranks.bytes_per_value * rank["parameters"]
        states = rank["built"] + rank["moments"]
        assert memory.states == pytest.approx(states, rel=0.02), "weights, gradients, optimizer"
        activations = memory.activations + memory.head
        assert 0.90 <= activations / rank["peak"] <= 1.10, "activations"
        assert 0.95 <= memory.update / (states + rank["peak"]) <= 1.10, "all"
