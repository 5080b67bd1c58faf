"""The planner's memory against exact counts and the published fit / no-fit cases of Qwen3-30B-A3B."""

from __future__ import annotations

import dataclasses

import pytest

from redone.planner.hardware import Constants, constant_rows, gpu
from redone.planner.memory import TrainerRanks, parameters, rank_memory
from redone.planner.models import PUBLISHED
from redone.planner.phases import published_host
from redone.record.flops import parameter_count

GB, GIB = 1e9, 2**30
MODEL = PUBLISHED["q30b"]
SHAPE = MODEL.shape
assert SHAPE is not None
# As the stacks that published these figures run: fused activation and permutation, whole logits.
PEER = TrainerRanks(shape=SHAPE, world=8, tokens=4096, modules="fused", head_chunk=None, logit_bytes=10.0)


def test_parameters_are_exact() -> None:
    assert MODEL.total == 30_532_122_624
    assert round(MODEL.active / 1e9, 2) == 3.04
    assert round(MODEL.active_with_embedding / 1e9, 2) == 3.35
    # The recorder's count leaves norms out.
    hf = dict(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        intermediate_size=6144, vocab_size=151936, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768,
    )  # fmt: skip
    norms = 48 * (2 * 2048 + 2 * 128) + 2048
    assert parameter_count(hf) + norms == MODEL.total
    assert {"q32b": 32_762_123_264, "llama8b": 8_030_261_248}.items() <= {
        k: m.total for k, m in PUBLISHED.items()
    }.items()


@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize(("tensor", "expert"), [(1, 8), (2, 4), (4, 8)])
def test_the_ranks_together_hold_the_model(tensor: int, expert: int, pipeline: int) -> None:
    ranks = dataclasses.replace(PEER, world=64, tensor=tensor, pipeline=pipeline, expert=expert)
    parts = [parameters(ranks, stage) for stage in range(pipeline)]
    replicated = 48 * (2 * 2048 + 2 * 128 + 2048 * 128) + 2048  # norms and routers, on every tensor rank
    dense = sum(d for d, _ in parts) * tensor - (tensor - 1) * replicated
    assert dense + sum(e for _, e in parts) * expert == MODEL.total


def test_at_most_25_constants_each_with_meaning_and_source() -> None:
    rows = constant_rows()
    assert len(rows) == len(dataclasses.fields(Constants)) <= 25
    assert all(unit and len(meaning) > 10 and source for _, _, unit, meaning, source in rows)


def peak(name: str = "h100", residue: float = 0.0, **changes: object) -> float:
    """Share of the GPU's memory that the fullest stage needs in an update."""
    ranks = dataclasses.replace(PEER, **changes)  # type: ignore[arg-type]
    need = max(rank_memory(ranks, stage).update for stage in range(ranks.pipeline))
    return (need + residue) / gpu(name).memory


def test_states_of_the_published_layouts() -> None:
    """notes/megatron.md, section 7: GiB per GPU with fp32 gradients and sharded fp32 master weights and
    moments."""
    for world, tensor, expert, gib in (
        (8, 4, 8, 65.1),
        (8, 1, 8, 71.5),
        (16, 2, 8, 45.9),
        (16, 1, 16, 40.1),
        (32, 2, 8, 35.2),
    ):
        ranks = dataclasses.replace(PEER, world=world, tensor=tensor, expert=expert)
        assert rank_memory(ranks, 0).states / GIB == pytest.approx(gib, rel=0.01)
    offloaded = dataclasses.replace(PEER, world=8, tensor=4, expert=8, cpu_optimizer=True)
    assert rank_memory(offloaded, 0).states / GIB == pytest.approx(22.4, rel=0.01)


def test_megatron_bridge_measured_62_gib() -> None:
    """What torch had allocated, so without a context; fused cross-entropy (Bridge's default): 4 bytes per
    logit."""
    ranks = dataclasses.replace(PEER, world=16, expert=16, logit_bytes=4.0, device=False)
    need = rank_memory(ranks, 0).update
    assert need / GIB == pytest.approx(62.17, rel=0.10)


def test_eight_80_gb_gpus_need_the_optimizer_on_the_host() -> None:
    slime = dict(world=8, tensor=4, expert=8, tokens=20480, recompute=True)
    engine_asleep = 3.5 * GB
    assert peak(residue=engine_asleep, **slime) > 1.0
    assert peak(residue=engine_asleep, cpu_optimizer=True, **slime) < 0.7  # slime runs so
    without = dict(slime, tensor=1)
    assert peak(residue=engine_asleep, **without) > 1.0


RUNS = {
    "NeMo RL 32 H100 TP1 EP8 4k, no recomputation": ("h100", dict(world=32, expert=8)),
    "slime 8 H100 TP4 EP8 20k, CPU Adam": (
        "h100", dict(world=8, tensor=4, expert=8, tokens=20480, recompute=True, cpu_optimizer=True),
    ),
    "verl 8 H20 TP1 EP8 10k, CPU Adam": (
        "h20", dict(world=8, expert=8, tokens=10240, recompute=True, cpu_optimizer=True, logit_bytes=14.0),
    ),
    "verl#2935 with the fix, full recomputation": (
        "a100", dict(world=32, tensor=4, expert=32, tokens=34816, recompute=True, logit_bytes=14.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_published_runs_fit(case: str) -> None:
    name, layout = RUNS[case]
    assert peak(name, **layout) <= 1.0


def test_published_out_of_memory_cases_do_not_fit() -> None:
    verl_2935 = dict(world=32, tensor=4, expert=32, tokens=34816, logit_bytes=14.0)
    assert peak("a100", **verl_2935) > 1.0
    # verl#3659 (96 GB, share 0.9): the engine's share, a bf16 shard of FSDP and a context
    h20 = gpu("h20").memory
    assert 0.9 * h20 + 2 * MODEL.total / 8 + 3.5 * GB > h20
    # verl#1649 (80 GB, share 0.9): trainer weights of TP1 EP8 and its context stay when the engine wakes
    resident = rank_memory(dataclasses.replace(PEER, world=32, expert=8), 0)
    assert 0.9 * gpu("h100").memory + resident.weights + resident.reserve > gpu("h100").memory


@pytest.mark.parametrize(
    ("model", "tensor", "pipeline", "expert", "gpus", "published"),
    [("q30b", 4, 1, 8, 8, 820e9), ("dsv3", 8, 12, 8, 96, 1500e9), ("q235b", 4, 8, 4, 32, 1600e9)],
)
def test_host_memory_is_within_10_percent_of_published(
    model: str, tensor: int, pipeline: int, expert: int, gpus: int, published: float
) -> None:
    m = PUBLISHED[model]
    need = published_host(m.total, m.local(tensor, pipeline, expert, 1), gpus // 8, 8)
    assert need == pytest.approx(published, rel=0.10)


def test_pipeline_stages_keep_what_is_in_flight() -> None:
    ranks = dataclasses.replace(PEER, world=32, pipeline=4, expert=8)
    first, last = rank_memory(ranks, 0), rank_memory(ranks, 3)
    assert first.activations > 3 * last.activations and last.head > first.head == 0
    few = dataclasses.replace(ranks, microbatches=1)
    assert rank_memory(few, 0).activations < first.activations / 3
