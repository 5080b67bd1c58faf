"""A run's first steps against its own prediction: was the band right, which one multiplier re-fits it, and
did a phase take more memory than planned (trainer.offload, which reads it)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redone.config.schema import Config
from redone.errors import ConfigError
from redone.planner.hardware import gpu
from redone.planner.report import GB, Options, Plan, compare, make_plan

STEPS = 3
FILE = "planned.json"
# of the metrics memory/<phase>_peak_gb -> as the planner names it
PHASES = {"rollout": "rollout", "update": "update", "weight_update": "weight update"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseUse:
    """GB on the fullest GPU."""

    phase: str
    measured: float
    planned: float

    def text(self) -> str:
        """`rollout 61.2 GB (planned 66.0)`; a phase above its plan says so."""
        above = ", ABOVE the plan" if self.measured > self.planned else ""
        return f"{self.phase} {self.measured:.1f} GB (planned {self.planned:.1f}{above})"


@dataclass(slots=True, kw_only=True)
class PlanWatch:
    """Made when cluster.gpu names the hardware. The prediction takes the lengths that were measured, so that
    the comparison is about time and not about guessed lengths."""

    cfg: Config
    hf: Mapping[str, Any]  # the model's config.json
    seen: list[Mapping[str, float]] = field(default_factory=list)

    @staticmethod
    def of(cfg: Config, hf: Mapping[str, Any]) -> PlanWatch | None:
        """None without cluster.gpu. Raises ConfigError for a GPU that the planner does not know."""
        if cfg.cluster.gpu is None:
            return None
        gpu(cfg.cluster.gpu)
        return PlanWatch(cfg=cfg, hf=hf)

    def listener(self, folder: Path) -> Callable[[int, Mapping[str, float]], str | None]:
        """Takes a step's metrics; after the third step it writes planned.json into `folder` and says what
        came out."""

        def listen(step: int, metrics: Mapping[str, float]) -> str | None:
            if step < 1 or len(self.seen) >= STEPS:
                return None
            self.seen.append(metrics)
            return self._judge(folder) if len(self.seen) == STEPS else None

        return listen

    def _mean(self, name: str) -> float:
        return sum(m[name] for m in self.seen) / len(self.seen)

    def _plan(self) -> Plan:
        cluster = self.cfg.cluster
        assert cluster.gpu is not None
        prompt, response = self._mean("prompt_length/mean"), self._mean("response_length/mean")
        options = Options(
            nodes=cluster.nodes, gpu=cluster.gpu, prompt_tokens=prompt, response_tokens=max(1.0, response)
        )
        return make_plan(self.cfg, self.hf, options)

    def _judge(self, folder: Path) -> str:
        try:
            plan = self._plan()
        except ConfigError as error:
            return f"the planner has no prediction for this run: {error}"
        memory = self._memory(plan)
        told = "".join(f"; {m.text()}" for m in memory)
        if plan.refused:
            return f"the planner refuses to predict this run's step: {'; '.join(plan.refused)}{told}"
        found = compare(plan, [m["timing_s/step"] for m in self.seen])
        predicted = plan.chosen.seconds.step
        low, high = predicted / plan.band, predicted * plan.band
        values = {
            "steps": STEPS,
            "measured_s": found.measured,
            "predicted_s": predicted,
            "band_s": [low, high],
            "inside": found.inside,
            "multiplier": found.multiplier,
            "band_after": found.band,
            "memory_gb": {m.phase: {"measured": m.measured, "planned": m.planned} for m in memory},
        }
        (folder / FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        place = "inside" if found.inside else "OUTSIDE"
        return (
            f"step {found.measured:.1f} s (median of {STEPS}), {place} the plan's {low:.1f} .. {high:.1f} s; "
            f"re-fitted multiplier {found.multiplier:.2f} ({FILE}; redone plan --fit){told}"
        )

    def _memory(self, plan: Plan) -> list[PhaseUse]:
        """Of the phases that were read. On the CPU a process' memory says nothing here."""
        found = []
        for phase, planned in PHASES.items():
            name = f"memory/{phase}_peak_gb"
            totals = [m.total / GB for m in plan.chosen.memory if m.phase == planned]
            if self.cfg.cluster.device == "cuda" and totals and any(name in m for m in self.seen):
                most = max(m.get(name, 0.0) for m in self.seen)
                found.append(PhaseUse(phase=planned, measured=most, planned=max(totals)))
        return found


def read_multiplier(folder: Path) -> tuple[float, float]:
    """(multiplier, band after it) of a run folder. Raises ConfigError when the run has none."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        multiplier, band = float(found["multiplier"]), float(found["band_after"])
        if not (0 < multiplier < math.inf and 1 <= band < math.inf):
            raise ValueError(f"multiplier {multiplier:g}, band {band:g}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--fit {folder}: no usable {FILE} there ({error}); a run writes it after {STEPS} steps when "
            "cluster.gpu is set"
        ) from error
    return multiplier, band
