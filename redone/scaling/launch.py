"""How points are run: here, one after the other (jobs of SLURM: launcher/redone_launcher/scale_jobs.py)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from redone.scaling.sweep import Point, Sweep

REDONE = (sys.executable, "-m", "redone_launcher.main")


class Launcher(Protocol):
    """Starts points. `after`: jobs that must have ended, in whatever way, before."""

    def launch(self, points: Sequence[Point], after: Sequence[str]) -> dict[str, str]:
        """Points of one node count. Point -> job, of those that have not run yet when it returns.

        Raises RedoneError when they could not start.
        """

    def finish(self, after: Sequence[str]) -> None:
        """Write the report once `after` have ended."""


class LocalLauncher:
    """`redone run` as a child process. A failed point is marked and does not stop the sweep."""

    def __init__(self, folder: Path, sweep: Sweep) -> None:
        self.folder, self.sweep = folder, sweep

    def launch(self, points: Sequence[Point], after: Sequence[str]) -> dict[str, str]:
        for point in points:
            self._run(point)
        return {}

    def finish(self, after: Sequence[str]) -> None:
        """Nothing is left to wait for."""

    def _run(self, point: Point) -> None:
        log = self.folder / "points" / f"{point.id}.log"
        command = [*REDONE, "run", self.sweep.config, *point.overrides]
        with open(log, "w", encoding="utf-8") as out:
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT).returncode
        if code == 130:
            raise KeyboardInterrupt
        if code:
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
            reason = lines[-1] if lines else f"exit code {code}"
            (self.folder / "points" / f"{point.id}.failed").write_text(reason + "\n", encoding="utf-8")
