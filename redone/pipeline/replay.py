"""Run a saved batch again from the weights it was trained from, and compare with what the run recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from redone.api import TrainerGroup
from redone.config.schema import Config
from redone.errors import RunFolderError
from redone.pipeline.folder import RunFolder
from redone.pipeline.step import merge_reports, run_updates
from redone.record.batches import read_batch, write_batch
from redone.types import Batch, FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One quantity of the step; recorded is None where the run kept none."""

    name: str
    recorded: float | None
    replayed: float

    @property
    def relative(self) -> float | None:
        """|replayed - recorded| / max(|recorded|, 1e-12)."""
        if self.recorded is None:
            return None
        return abs(self.replayed - self.recorded) / max(abs(self.recorded), 1e-12)


def save_step(folder: RunFolder, step: int, batch: Batch, parts: int, trainer: TrainerGroup) -> None:
    """Before the updates of `step`: the batch, and the trainer's state that it starts from."""
    place = folder.batch(step)
    shutil.rmtree(place, ignore_errors=True)  # a resumed run takes the step again
    place.mkdir(parents=True)
    trainer.save(str(place / "trainer"))
    write_batch(place / "batch.npz", batch, parts)


def replay_step(folder: RunFolder, step: int, cfg: Config, trainer: TrainerGroup) -> list[Difference]:
    """Load state and batch of `step`, score, update, and compare. The run folder is only read."""
    batch, parts = read_batch(folder.batch(step) / "batch.npz")
    trainer.load(str(folder.batch(step) / "trainer"))
    found: list[Difference] = []
    with trainer.awake():
        scored = trainer.logprobs(batch)
        engine = [[t.engine_logprobs for t in g.trajectories] for g in batch.groups]
        found.append(_largest("largest |trainer - engine| log-probability", scored, engine))
        if batch.groups[0].trajectories[0].old_logprobs is not None:
            kept = [[t.old_logprobs for t in g.trajectories] for g in batch.groups]
            found.append(_largest("largest |trainer - recorded trainer| log-probability", scored, kept))  # type: ignore[arg-type]
        reports = run_updates(step, batch, parts, trainer, cfg.algorithm)
    recorded = recorded_metrics(folder.path, step)
    replayed = merge_reports(reports)
    return found + [
        Difference(name=name, recorded=recorded.get(name), replayed=value) for name, value in replayed.items()
    ]


def _largest(
    name: str, ours: Sequence[Sequence[FloatArray]], theirs: Sequence[Sequence[FloatArray]]
) -> Difference:
    worst = max(
        float(np.abs(a - b).max())
        for p, q in zip(ours, theirs, strict=True)
        for a, b in zip(p, q, strict=True)
    )
    return Difference(name=name, recorded=None, replayed=worst)


def recorded_metrics(path: Path, step: int) -> dict[str, float]:
    """The metrics of `step` in metrics.jsonl. Raises RunFolderError when the step is not there."""
    for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row: dict[str, float] = json.loads(line)
        if row.get("step") == step:
            return row
    raise RunFolderError(f"{path}/metrics.jsonl has no step {step}")
