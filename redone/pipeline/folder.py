"""The run folder: config, logs, metrics, checkpoints. A checkpoint is complete or it is not there."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from redone.config.load import dump_config
from redone.config.schema import Config
from redone.config.versions import check_run_folder
from redone.errors import RunFolderError

log = logging.getLogger(__name__)

JOB_FILE = "slurm/job.json"  # written once a job was submitted for the folder
WRITING = ".writing"  # of the trainer's checkpoint module
STREAMS = ("metrics.jsonl", "samples.jsonl", "ledger.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverState:
    """What the driver must remember to go on after step `step` as if nothing had happened."""

    step: int
    stream: dict[str, Any]
    val_history: tuple[tuple[int, float], ...]  # (step, mean validation score)
    best_step: int | None
    stream_bytes: dict[str, int]  # length of each append-only file: what came later is undone on resume


class RunFolder:
    """Layout: config.yaml metrics.jsonl samples.jsonl ledger.jsonl summary.json report.html logs/ evals/
    checkpoints/step-000010/{trainer/,driver.json} batches/step-000010/{trainer/,batch.npz} export/"""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    @staticmethod
    def create(cfg: Config) -> RunFolder:
        """A new folder `run.dir/run.name`, in the place of one whose run never reached its first metrics.

        Raises RunFolderError when a run is there already.
        """
        path = Path(cfg.run.dir) / cfg.run.name
        if never_began(path):
            shutil.rmtree(path)
        if path.exists():
            raise RunFolderError(
                f"run folder {path} exists; remedy: --resume {path} to continue it, or another run.name"
            )
        try:
            for part in ("logs", "evals", "checkpoints"):
                (path / part).mkdir(parents=True)
            dump_config(cfg, path / "config.yaml")
        except OSError as error:
            shutil.rmtree(path, ignore_errors=True)
            raise RunFolderError(
                f"cannot write run folder {path}: {error.strerror}; remedy: run.dir=..."
            ) from None
        return RunFolder(path)

    @staticmethod
    def open(path: Path) -> RunFolder:
        """An existing folder, to resume. Raises RunFolderError when it is none, or of another schema."""
        check_run_folder(path)
        return RunFolder(path)

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, oldest first."""
        found = []
        for entry in self.checkpoints.glob("step-*"):
            if (entry / "driver.json").is_file() and not (entry / "trainer" / WRITING).exists():
                found.append(int(entry.name.removeprefix("step-")))
        return sorted(found)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def batch(self, step: int) -> Path:
        """Where the batch of `step` is kept with the trainer's state before it (record.save_batches)."""
        return self.path / "batches" / f"step-{step:06d}"

    def saved_batches(self) -> list[int]:
        """Steps whose batch was kept, oldest first."""
        found = self.path.glob("batches/step-*/batch.npz")
        return sorted(int(p.parent.name.removeprefix("step-")) for p in found)

    def save(
        self,
        state: DriverState,
        save_trainer: Callable[[str], None],
        keep: int,
        asynchronous: bool = False,
    ) -> Path:
        """Write trainer and driver state beside the final name, rename, then drop the oldest ones."""
        final = self.checkpoint(state.step)
        if state.step in self.steps():
            return final
        # A trainer that writes on after its `save` keeps WRITING until it is done; it needs the final name.
        partial = final if asynchronous else self.checkpoints / f".partial-{state.step:06d}"
        for leftover in (partial, final):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            save_trainer(str(partial / "trainer"))
            write_json(partial / "driver.json", asdict(state))
            if not asynchronous:
                os.replace(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in self.steps()[:-keep]:
            if old != state.best_step:
                shutil.rmtree(self.checkpoint(old))
        return final

    def load_state(self, step: int) -> DriverState:
        data = json.loads((self.checkpoint(step) / "driver.json").read_text())
        data["val_history"] = tuple((int(s), float(v)) for s, v in data["val_history"])
        return DriverState(**data)

    def stream_bytes(self) -> dict[str, int]:
        return {name: (self.path / name).stat().st_size for name in STREAMS if (self.path / name).exists()}

    def rewind(self, state: DriverState) -> None:
        """Undo what was appended after the checkpoint: those steps run again."""
        shutil.rmtree(self.checkpoints / f".partial-{state.step:06d}", ignore_errors=True)
        for name in STREAMS:
            path, size = self.path / name, state.stream_bytes.get(name, 0)
            if path.exists() and path.stat().st_size > size:
                os.truncate(path, size)

    def begin_again(self) -> None:
        """Undo an attempt that ended before its first checkpoint: the run starts from step 0."""
        for name in STREAMS:
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)


def never_began(path: Path) -> bool:
    """A run folder of ours without metrics: its run failed while starting. One that a job was submitted for
    may still wait in the queue."""
    metrics = path / "metrics.jsonl"
    if (path / JOB_FILE).exists():
        return False
    return (path / "config.yaml").is_file() and not (metrics.exists() and metrics.stat().st_size)


def write_json(path: Path, value: Any) -> None:
    """Atomically: a reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as f:
        json.dump(value, f, ensure_ascii=False, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)
