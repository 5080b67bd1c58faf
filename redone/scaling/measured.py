"""From metrics.jsonl of the points to one row per node count: medians over steps, then over runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from redone.scaling.sweep import Mode, Point, Sweep, read_rows

PHASES = ("gen", "old_log_prob", "ref", "update_actor", "update_weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One point's counted steps, medians."""

    point: Point
    steps: int
    step_s: float
    rate: float  # tokens/s/GPU
    tokens: float  # per step
    prompt_tokens: float
    response_tokens: float
    phases: Mapping[str, float]  # seconds
    tail_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """All runs of one mode and node count."""

    mode: Mode
    nodes: int
    gpus: int
    runs: tuple[Run, ...]
    efficiency: float | None  # tokens/s/GPU against the smallest node count's

    def median(self, name: str) -> float:
        return statistics.median(getattr(run, name) for run in self.runs)

    def extent(self, name: str) -> tuple[float, float]:
        values = [getattr(run, name) for run in self.runs]
        return min(values), max(values)

    def phase(self, name: str) -> float:
        return statistics.median(run.phases.get(name, 0.0) for run in self.runs)

    @property
    def other(self) -> float:
        """Seconds of a step outside the named phases."""
        return max(0.0, self.median("step_s") - sum(self.phase(name) for name in PHASES))

    @property
    def sync_share(self) -> float:
        return self.phase("update_weights") / self.median("step_s")

    @property
    def tail_share(self) -> float:
        """Share of the step in which at most a tenth of the groups was still generating."""
        return self.median("tail_s") / self.median("step_s")


def read_run(folder: Path, sweep: Sweep, point: Point) -> Run | None:
    """None until a step after the warm-up is there."""
    rows = read_rows(folder, point)[sweep.warmup :]
    if not rows:
        return None

    def middle(name: str) -> float:
        return statistics.median(float(row.get(name) or 0.0) for row in rows)

    return Run(
        point=point,
        steps=len(rows),
        step_s=middle("timing_s/step"),
        rate=middle("perf/throughput"),
        tokens=middle("perf/total_num_tokens"),
        prompt_tokens=middle("prompt_length/mean"),
        response_tokens=middle("response_length/mean"),
        phases={name: middle(f"timing_s/{name}") for name in PHASES},
        tail_s=middle("perf/gen_tail_s"),
    )


def cells(sweep: Sweep, runs: Sequence[Run], gpus_per_node: int) -> list[Cell]:
    """By mode, then nodes. A cell is there as soon as one of its runs is; efficiency once the base is."""
    found = []
    for mode in sweep.modes:
        base: float | None = None
        for nodes in sorted(sweep.nodes):
            there = tuple(r for r in runs if r.point.nodes == nodes and mode in r.point.modes)
            if not there:
                continue
            rate = statistics.median(run.rate for run in there)
            if nodes == sweep.base:
                base = rate
            found.append(
                Cell(
                    mode=mode,
                    nodes=nodes,
                    gpus=nodes * gpus_per_node,
                    runs=there,
                    efficiency=rate / base if base else None,
                )
            )
    return found
