"""The planner's prediction for every cell of a sweep, raw and after one multiplier was fitted to its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from redone.bench.roofline import Roofline
from redone.config.schema import Config
from redone.errors import ConfigError
from redone.layout import ModelShape
from redone.planner.hardware import DEFAULT, Constants, Gpu
from redone.planner.layouts import MARGIN
from redone.planner.phases import cache_margin
from redone.planner.report import Options, describe_job
from redone.planner.throughput import Phases, predict


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """`refused`: why there is no prediction."""

    seconds: Phases | None
    band: float = DEFAULT.band_far
    refused: str = ""


def predict_cell(
    cfg: Config,
    hf: Mapping[str, Any],
    *,
    machine: str | Gpu,
    nodes: int,
    prompt_tokens: float,
    response_tokens: float,
) -> Predicted:
    """One step of `cfg` (the point's configuration) with the mean lengths that were measured."""
    simulated = isinstance(machine, Gpu)
    constants = simulated_constants() if simulated else DEFAULT
    options = Options(nodes=nodes, gpu=machine, prompt_tokens=prompt_tokens, response_tokens=response_tokens)
    try:
        job, _ = describe_job(cfg, ModelShape.from_hf(hf), options)
    except ConfigError as error:
        return Predicted(seconds=None, refused=str(error))
    margin = cache_margin(job, constants)
    if margin < MARGIN:
        return Predicted(seconds=None, refused=f"KV cache {margin:.2f} x of what its sequences want")
    return Predicted(seconds=predict(job, constants))


def simulated_constants() -> Constants:
    """On simulated nodes the GPU fits' seconds per step outside all phases mean nothing."""
    return replace(DEFAULT, fixed=0.0)


def cpu_row(roof: Roofline, ranks: int, ranks_per_node: int) -> Gpu:
    """A rank of `ranks` that share this machine's cores, as a row of the planner's hardware table.

    Memory is left out of it: a step's seconds are asked for, and the engine's KV cache has a size of its own.
    """
    return Gpu(
        name="cpu",
        memory=1e15,
        flops=roof.matmul_flops / ranks,
        hbm=roof.copy_bytes_s / ranks,
        link=roof.copy_bytes_s / ranks,
        domain=ranks,
        per_node=ranks_per_node,
        host_memory=1e15,
    )


def refit(measured_s: float, predicted: Predicted) -> float | None:
    """The one multiplier: measured / predicted seconds of the base."""
    return measured_s / predicted.seconds.step if predicted.seconds else None
