"""Processes that may outlive one run: a pipeline's nodes share trainers and engines."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from redone.api import EngineFleet
from redone.config.schema import Config

if TYPE_CHECKING:
    from redone.cluster.cluster import RayCluster


class StopRequest:
    """True once somebody asked the run to stop at the end of its step: SIGUSR1, or the file REDONE_STOP_FILE.

    A job's batch script uses the file: SLURM delivers a signal to every process of a step, workers too.
    """

    def __init__(self) -> None:
        self._signalled = False
        named = os.environ.get("REDONE_STOP_FILE")
        self._file = Path(named) if named else None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def __call__(self) -> bool:
        return self._signalled or (self._file is not None and self._file.exists())


def log_folder(run: Path) -> Path:
    """Where a run's processes log: in its folder, or where the job says (REDONE_LOG_DIR: one per attempt)."""
    return Path(os.environ.get("REDONE_LOG_DIR") or run / "logs")


class Session:
    """At most one cluster. Starting costs most of a short stage's time, nearly all of it imports."""

    def __init__(self, log_dir: Path, keep_engines: bool = False) -> None:
        """keep_engines: start engines also for a run without them, because later ones need them."""
        self._log_dir, self._keep_engines = log_dir, keep_engines
        self._cluster: RayCluster | None = None
        self._phase: Callable[[], str] = lambda: "start"  # of the run that goes on, for messages
        self.stop = StopRequest()
        self._held: str | None = None  # the model that trainer and engines hold unchanged

    def cluster(
        self,
        cfg: Config,
        note: Callable[[str], None],
        with_engines: bool = True,
        phase: Callable[[], str] = lambda: "answers",
    ) -> RayCluster:
        """Processes that hold cfg.model.path: the present ones where they can take over, else new ones."""
        self._phase = phase
        self._held = None  # it will be trained on
        if self._cluster is not None and self._cluster.serves(cfg, with_engines):
            self._cluster.adopt(cfg)
            return self._cluster
        return self._start(cfg, note, with_engines or self._keep_engines, True)

    def answering(self, cfg: Config, note: Callable[[str], None]) -> EngineFleet:
        """Engines that hold cfg.model.path; nothing is loaded when they do already."""
        ready = self._cluster is not None and self._cluster.serves(cfg, True)
        if not (ready and self._held == cfg.model.path):
            self.cluster(cfg, note)
            self._held = cfg.model.path
        assert self._cluster is not None
        return self._cluster.engines()

    def engines(self, cfg: Config, note: Callable[[str], None]) -> EngineFleet:
        """Engines alone, loaded from cfg.model.path."""
        return self._start(cfg, note, True, False).engines()

    def _start(
        self, cfg: Config, note: Callable[[str], None], with_engines: bool, with_trainers: bool
    ) -> RayCluster:
        from redone.cluster.cluster import RayCluster  # ray takes a second to import: not before the checks

        self.close(graceful=True)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._cluster = RayCluster(
            cfg,
            self._log_dir,
            note,
            phase=lambda: self._phase(),
            with_engines=with_engines,
            with_trainers=with_trainers,
        )
        # After ray.init, which takes SIGTERM for a crash handler; a background job ignores SIGINT.
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGUSR2, _interrupt)  # from a job script: srun does not pass SIGTERM on
        signal.signal(signal.SIGUSR1, self.stop.on_signal)
        return self._cluster

    def close(self, graceful: bool) -> None:
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.close(graceful=graceful)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"signal {number}")
