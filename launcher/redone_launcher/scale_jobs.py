"""`redone scale --slurm`: a job array per node count, and a job that writes the report after all of them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from redone.scaling.sweep import Point, Sweep
from redone_launcher.slurm import SlurmError, slurm
from redone_launcher.submit import Request, submit_array


class SlurmLauncher:
    """`site`: as `redone submit`'s; `report`: sbatch options of the job that writes the report.

    `serial`: one task of an array at a time.
    """

    def __init__(
        self, folder: Path, sweep: Sweep, site: Path, *, report: Sequence[str] = (), serial: bool = False
    ) -> None:
        self.folder, self.sweep, self.site = folder.resolve(), sweep, site
        self.report, self.serial = tuple(report), serial

    def launch(self, points: Sequence[Point], after: Sequence[str]) -> dict[str, str]:
        """Jobs are named ARRAY_TASK, as SLURM names them."""
        requests = [
            Request(
                config=Path(self.sweep.config),
                overrides=point.overrides,
                nodes=point.nodes,
                site=self.site,
                gpu=self.sweep.gpu,
            )
            for point in points
        ]
        name = points[0].id.rsplit("-s", 1)[0]  # e.g. weak-n4
        array = submit_array(
            requests,
            self.folder / f"{name}.sbatch",
            name=f"redone-{self.folder.name}-{name}",
            serial=self.serial,
            dependency=waits_for(after),
        )
        return {point.id: f"{array}_{task}" for task, point in enumerate(points)}

    def finish(self, after: Sequence[str]) -> None:
        """A small job that only reads."""
        again = [sys.executable, "-m", "redone_launcher.main", "scale", "--report", str(self.folder)]
        command = ["sbatch", "--parsable", "--job-name=redone-scale-report", "--nodes=1", "--ntasks=1"]
        command += ["--time=00:10:00", f"--output={self.folder / 'report.log'}"]
        if (waits := waits_for(after)) is not None:
            command.append(f"--dependency={waits}")
        slurm([*command, *self.report, f"--wrap={shlex.join(again)}"])


def waits_for(jobs: Sequence[str]) -> str | None:
    """sbatch's words for "after these have ended, in whatever way"; the tasks of an array count as one."""
    arrays = dict.fromkeys(job.split("_")[0] for job in jobs)
    return "afterany:" + ":".join(arrays) if arrays else None


def living(jobs: Sequence[str]) -> set[str]:
    """Those of `jobs` that SLURM still has queued or running. Raises SlurmError when it gives no answer."""
    if not jobs:
        return set()
    try:
        said = slurm(["squeue", "--noheader", "--array", "--format=%i", f"--jobs={','.join(jobs)}"])
    except SlurmError as error:
        if "Invalid job id" in str(error):  # all of them are forgotten
            return set()
        raise
    return set(said.split())
