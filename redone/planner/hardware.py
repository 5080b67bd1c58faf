"""What the planner knows of machines: data-sheet figures per GPU, and the table of its constants.

GPU figures are facts of the product (dense bf16 rate, bandwidths, memory as nvidia-smi reports it).
Everything that was fitted or guessed is a field of `Constants`, at most 25 of them, each with unit, meaning
and source.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from redone.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU and its place in a node. Rates per second, sizes in bytes (10^9 = 1 GB)."""

    name: str
    memory: float  # bytes, as nvidia-smi reports
    flops: float  # dense bf16 FLOP/s of the data sheet
    hbm: float  # bytes/s of the data sheet
    link: float  # NVLink bytes/s that large collectives reach: taken as 0.55 of the data sheet
    domain: int  # GPUs that reach each other over NVLink
    per_node: int
    host_memory: float  # bytes of RAM of a usual node of this kind; overridable


GPUS = {
    g.name: g
    for g in (
        Gpu(
            name="a100", memory=85.9e9, flops=312e12, hbm=2.04e12, link=165e9,
            domain=8, per_node=8, host_memory=2e12,
        ),
        Gpu(
            name="h100", memory=85.5e9, flops=989e12, hbm=3.35e12, link=250e9,
            domain=8, per_node=8, host_memory=2e12,
        ),
        Gpu(
            name="h200", memory=150.7e9, flops=989e12, hbm=4.8e12, link=250e9,
            domain=8, per_node=8, host_memory=2e12,
        ),
        Gpu(
            name="h20", memory=102.6e9, flops=148e12, hbm=4.0e12, link=250e9,
            domain=8, per_node=8, host_memory=2e12,
        ),
        Gpu(
            name="gb200", memory=198e9, flops=2450e12, hbm=8e12, link=500e9,
            domain=72, per_node=4, host_memory=0.9e12,
        ),
    )
}  # fmt: skip


def gpu(name: str) -> Gpu:
    """Raises ConfigError for a GPU that is not in the table."""
    try:
        return GPUS[name.lower()]
    except KeyError:
        raise ConfigError(f"--gpu {name}: not in the planner's table; use one of {', '.join(GPUS)}") from None


_FIT = "fitted on the calibration rows (benchmarks/planner/fit.py)"


def _constant(value: float, unit: str, meaning: str, source: str = _FIT) -> float:
    result: float = field(default=value, metadata={"unit": unit, "meaning": meaning, "source": source})
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Every fitted or assumed number of the planner."""

    gemm_dense: float = _constant(0.536, "share of peak", "dense GEMMs and attention in the trainer")
    gemm_expert: float = _constant(0.418, "share of peak", "grouped expert GEMMs in the trainer")
    fp8_gain: float = _constant(1.31, "x", "GEMM rate of FP8 against bf16, casts included")
    layer_floor: float = _constant(
        0.292, "ms", "least time of one layer's forward (launches), whatever its tokens"
    )
    moe_floor: float = _constant(1.37, "ms", "the same, added by routing and dispatch of an expert layer")
    dispatch: float = _constant(0.25, "share of collectives' rate", "expert all-to-all, permutation included")
    network: float = _constant(
        46.4, "GB/s per GPU", "between nodes: expert dispatch, gradients and parameters"
    )
    decode_hbm: float = _constant(0.763, "share of peak", "memory bandwidth while decoding")
    decode_step: float = _constant(4.55, "ms", "host time of one decode step")
    decode_layer: float = _constant(15.7, "us", "launches of one decoder layer in one decode step")
    decode_moe: float = _constant(45.6, "us", "the same, added by an expert layer")
    allreduce: float = _constant(
        15.1, "us x log2(ranks)", "one small all-reduce of an engine's tensor-parallel ranks"
    )
    fixed: float = _constant(8.53, "s", "per step outside all phases: driver, rewards, data")
    transition: float = _constant(
        5.43, "GB/s x sqrt(nodes)", "weight update with sleep and wake of both sides"
    )
    overlap: float = _constant(
        0.131, "share", "part of an asynchronous step's shorter side that is not hidden"
    )
    stack_nemo: float = _constant(
        1.24, "x", "NeMo RL's trainer seconds against Megatron-Bridge's; used for redone"
    )
    stack_verl: float = _constant(0.753, "x", "verl's trainer seconds against Megatron-Bridge's")
    stack_skyrl: float = _constant(
        2.83, "x", "SkyRL's trainer seconds against Megatron-Bridge's (padding included)"
    )
    stack_tuned: float = _constant(0.617, "x", "pre-training benchmark with forced balance and overlap")
    cpu_optimizer: float = _constant(
        71.0,
        "GB/s per node",
        "memory traffic that Adam on the host reaches",
        "assumed: 12 s for 30B on one node",
    )
    kv_share: float = _constant(
        0.8, "x mean length", "KV cache that a running sequence holds on average", "assumed"
    )
    band_near: float = _constant(
        1.35,
        "x",
        "P10-P90 half width where the same stack, GPU and model line was calibrated",
        "notes, bar 3",
    )
    band_far: float = _constant(1.6, "x", "P10-P90 half width elsewhere", "notes, bar 3")
    imbalance: float = _constant(
        1.5, "x", "tokens of the fullest expert rank against the mean", "assumed; natural routing"
    )
    reserve: float = _constant(
        3.5, "GB", "one process: context, NCCL buffers, workspaces, fragmentation; as much of host RAM",
        "assumed between Megatron's 3 and vLLM's 4 (notes, section 5)",
    )  # fmt: skip


DEFAULT = Constants()


def constant_rows(constants: Constants = DEFAULT) -> list[tuple[str, float, str, str, str]]:
    """(name, value, unit, meaning, source) of every constant, for the documentation and the report."""
    return [
        (f.name, getattr(constants, f.name), f.metadata["unit"], f.metadata["meaning"], f.metadata["source"])
        for f in fields(constants)
    ]
