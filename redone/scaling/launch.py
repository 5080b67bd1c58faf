"""How a point is run: here, one after the other; or as jobs of `redone submit`, with dependencies."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from redone.errors import RedoneError
from redone.scaling.sweep import Point, Sweep

REDONE = (sys.executable, "-m", "redone_launcher.main")
JOB = re.compile(r"\bjob (\d+) submitted|Submitted batch job (\d+)")  # redone submit | sbatch


class Launcher(Protocol):
    """Starts points. `after`: job ids that must have ended, in whatever way, before."""

    def launch(self, point: Point, after: Sequence[str]) -> str:
        """The job's id; "" when the point has already run. Raises RedoneError when it could not start."""

    def finish(self, after: Sequence[str]) -> str:
        """Write the report once `after` have ended."""


class LocalLauncher:
    """`redone run` as a child process. A failed point is marked and does not stop the sweep."""

    def __init__(self, folder: Path, sweep: Sweep) -> None:
        self.folder, self.sweep = folder, sweep

    def launch(self, point: Point, after: Sequence[str]) -> str:
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
        return ""

    def finish(self, after: Sequence[str]) -> str:
        return ""


class SubmitLauncher:
    """`redone submit CONFIG --nodes N --dependency afterany:ID a.b=c ...`, which prints `job <id> submitted`.

    `extra`: more words for it (--site FILE); `report`: sbatch options of the job that writes the report.
    """

    def __init__(
        self, folder: Path, sweep: Sweep, extra: Sequence[str] = (), report: Sequence[str] = ()
    ) -> None:
        self.folder, self.sweep, self.extra, self.report = folder, sweep, tuple(extra), tuple(report)

    def command(self, point: Point, after: Sequence[str]) -> list[str]:
        waits = ["--dependency", "afterany:" + ":".join(after)] if after else []
        nodes = ["--nodes", str(point.nodes)]
        return [*REDONE, "submit", self.sweep.config, *nodes, *waits, *self.extra, *point.overrides]

    def launch(self, point: Point, after: Sequence[str]) -> str:
        return job_id(self.command(point, after))

    def finish(self, after: Sequence[str]) -> str:
        """A small job that only reads."""
        again = " ".join([*REDONE, "scale", "--report", str(self.folder.resolve())])
        command = ["sbatch", "--job-name=redone-scale-report", "--nodes=1", "--ntasks=1", "--time=00:10:00"]
        command.append(f"--output={self.folder.resolve() / 'report.log'}")
        if after:
            command.append("--dependency=afterany:" + ":".join(after))
        return job_id([*command, *self.report, f"--wrap={again}"])


def job_id(command: Sequence[str]) -> str:
    """Raises RedoneError with the command's own words when it fails or names no job."""
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=300)
    except FileNotFoundError:
        raise RedoneError(f"{command[0]} is not there: is this a SLURM login node?") from None
    except subprocess.TimeoutExpired:
        raise RedoneError(f"{' '.join(command[:4])} gave no answer in 300 s: is slurmctld alive?") from None
    said = (done.stdout + done.stderr).strip()
    found = JOB.search(said)
    if done.returncode or not found:
        raise RedoneError(f"a point could not be submitted: {said.splitlines()[-1] if said else 'no answer'}")
    return found[1] or found[2]


def living(jobs: Sequence[str]) -> set[str]:
    """Those of `jobs` that SLURM still has queued or running. Raises RedoneError when it gives no answer."""
    if not jobs:
        return set()
    command = ["squeue", "--noheader", "--format=%i", f"--jobs={','.join(jobs)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise RedoneError("squeue is not there: is this a SLURM login node?") from None
    except subprocess.TimeoutExpired:
        raise RedoneError("squeue gave no answer in 60 s: is slurmctld alive?") from None
    if done.returncode and "Invalid job id" not in done.stderr:
        raise RedoneError(f"squeue: {done.stderr.strip()}")
    return set(done.stdout.split())
