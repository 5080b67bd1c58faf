"""`redone status`, `redone logs`, `redone cancel` for the run folder of a submitted job."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from redone.errors import RunFolderError
from redone.pipeline.folder import JOB_FILE, RunFolder
from redone_launcher.slurm import JobState, job_state, slurm

CANCEL_S = 60.0


def job_of(run: Path) -> str:
    """The SLURM job of a run folder. Raises RunFolderError when none was submitted."""
    file = run / JOB_FILE
    if not file.is_file():
        raise RunFolderError(f"{run}: no job was submitted for it; redone submit CONFIG, or --resume {run}")
    return str(json.loads(file.read_text())["job"])


def attempts(run: Path) -> list[dict[str, Any]]:
    """What the job script wrote at the end of each attempt, oldest first."""
    file = run / "slurm" / "attempts.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def last_step(run: Path) -> int | None:
    """The last step in metrics.jsonl."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else None


def status(run: Path) -> int:
    """Print the job's state, its attempts and how far the run is. Exit code 1 when it failed."""
    folder = RunFolder.open(run)
    job = job_of(run)
    state, past = job_state(job), attempts(run)
    write = sys.stdout.write
    write(f"job {job}: {_sentence(state, past)}\n")
    if state is not None and state.live and state.nodes:
        write(f"nodes: {state.nodes}\n")
    step, saved = last_step(run), folder.steps()
    write(f"step: {'none yet' if step is None else step}; checkpoint: {saved[-1] if saved else 'none yet'}\n")
    for row in past:
        write(
            f"attempt {row['attempt']} on {row['nodes']}: {row['outcome']} after "
            f"{row['ended'] - row['begun']} s, {row['reason']}\n"
        )
    if (run / "summary.json").exists():
        return 0
    over = state is None or not state.live
    return 1 if over else 0


def _sentence(state: JobState | None, past: list[dict[str, Any]]) -> str:
    if state is not None:
        return state.state + (f" ({state.reason})" if state.reason else "")
    if past:
        return f"{past[-1]['outcome']} (SLURM has forgotten it; from the job's own record)"
    return "unknown: SLURM has forgotten it and no attempt ended by itself"


def logs(run: Path, which: str | None, lines: int) -> int:
    """Print the end of a log of the latest attempt (default: the driver's, else the job's)."""
    RunFolder.open(run)
    latest = run / "logs" / "latest"
    if not latest.is_dir():
        found = sorted((run / "slurm").glob("job-*.out"))
        if not found:
            raise RunFolderError(f"{run}: no attempt has begun; redone status {run}")
        files = {file.name: file for file in found}
    else:
        files = {file.name: file for file in sorted(latest.iterdir()) if file.suffix in (".log", ".out")}
    name = which or next((n for n in ("driver.out", "job.log") if n in files), next(iter(files), ""))
    if name not in files:
        raise RunFolderError(f"{latest}: no log {name!r}; there are {', '.join(files) or 'none'}")
    sys.stdout.write(f"==> {files[name]} <==\n")
    with files[name].open(errors="replace") as f:
        sys.stdout.writelines(f.readlines()[-lines:])
    sys.stdout.write(f"\nother logs: {', '.join(n for n in files if n != name) or 'none'}\n")
    return 0


def cancel(run: Path) -> int:
    """End the job and wait until SLURM has: afterwards nothing of it runs."""
    job = job_of(run)
    state = job_state(job)
    if state is None or not state.live:
        sys.stdout.write(f"job {job} is not running ({_sentence(state, attempts(run))})\n")
        return 0
    slurm(["scancel", job])
    deadline = time.monotonic() + CANCEL_S
    while (state := job_state(job)) is not None and state.live:
        if time.monotonic() > deadline:
            sys.stdout.write(
                f"job {job} is still {state.state} after {CANCEL_S:.0f} s; redone status {run}\n"
            )
            return 1
        time.sleep(0.5)
    sys.stdout.write(f"job {job} is cancelled; redone submit --resume {run} goes on\n")
    return 0
