"""`redone scale --slurm` on a real SLURM: job arrays, dependencies, one report; nothing is queued twice."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from redone_launcher.jobs import status

from .conftest import LEAN, REPO, Jobs

pytestmark = pytest.mark.slow

POINTS = ["base-n1-s0-r0", "base-n1-s1-r0", "strong-n2-s0-r0", "strong-n2-s1-r0"]


def scale(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "redone_launcher.main", "scale", *words]
    return subprocess.run(command, cwd=REPO, env=os.environ, capture_output=True, text=True, timeout=120)


def field(job: str, name: str) -> str:
    said = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True, timeout=20, check=True
    ).stdout
    found = [word.partition("=")[2] for word in said.split() if word.startswith(f"{name}=")]
    return found[0] if found else ""


def queued(*states: str) -> list[str]:
    command = ["squeue", "--noheader", "--array", "--format=%i %j", *(f"--states={s}" for s in states)]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()


def until(what: Callable[[], bool], said: Callable[[], str], timeout_s: float = 400) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, said()
        time.sleep(0.5)


@pytest.fixture(scope="module")
def sweep(jobs: Jobs) -> Path:
    """One and two nodes, two seeds each, one run at a time; begun only when the test says so."""
    out = jobs.root / "sweep"
    lean = [word for word in LEAN if not word.startswith(("data.", "evaluate.", "checkpoint."))]
    site = jobs.site("sweep", 'REDONE_SBATCH_ARGS="--begin=now+1hour"\n')
    done = scale(
        str(REPO / "configs/scaling/tiny.yaml"), *lean, "--nodes=1,2", "--scaling=strong", "--seeds=0,1",
        "--steps=2", "--engines=fixed", "--slurm", "--serial", f"--site={site}", f"--out={out}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 queued of 4 runs" in done.stdout
    return out


def test_a_job_array_per_node_count_and_a_report_after_all(sweep: Path) -> None:
    named = json.loads((sweep / "jobs.json").read_text())
    assert list(named) == POINTS
    one, two = ({named[p].split("_")[0] for p in POINTS if f"-n{n}-" in p} for n in (1, 2))
    assert len(one) == len(two) == 1
    assert [named[p].split("_")[1] for p in POINTS] == ["0", "1", "0", "1"]
    (first,), (second,) = one, two
    assert field(second, "Dependency").startswith(f"afterany:{first}_*")
    assert field(first, "ArrayTaskThrottle") == field(second, "ArrayTaskThrottle") == "1"
    (report,) = [line.split()[0] for line in queued() if "scale-report" in line]
    waits = field(report, "Dependency")
    assert f"afterany:{first}_*" in waits and f"afterany:{second}_*" in waits
    again = scale(f"--resume={sweep}", "--slurm", f"--site={sweep.parent / 'sweep.env'}")
    assert again.returncode == 0 and len(queued()) == 5, again.stdout + again.stderr


def test_the_sweep_ends_in_one_report_with_its_plots(
    sweep: Path, jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second seed of both node counts is cancelled while it waits: the rest is shown."""
    named = json.loads((sweep / "jobs.json").read_text())
    (report,) = [line.split()[0] for line in queued() if "scale-report" in line]
    ran = [point for point in POINTS if "-s0-" in point]
    for point in POINTS:
        if point not in ran:
            jobs.cancel(named[point])
    for array in dict.fromkeys(job.split("_")[0] for job in named.values()):
        subprocess.run(["scontrol", "update", f"JobId={array}", "StartTime=now"], check=True, timeout=20)

    def said() -> str:
        return "\n".join([*queued(), *(jobs.logs(f"sweep/points/{p}") for p in ran)])

    until(lambda: not any(line.split()[0] == report for line in queued()), said)
    assert "2 done, 2 missing of 4 runs" in (sweep / "report.log").read_text(), said()
    assert field(report, "JobState") == "COMPLETED"
    rows = list(csv.DictReader((sweep / "scaling.csv").open()))
    assert [(r["mode"], r["nodes"], r["runs"]) for r in rows] == [("strong", "1", "1"), ("strong", "2", "1")]
    assert all(float(r["tokens_s_gpu"]) > 0 for r in rows)
    page = (sweep / "report.html").read_text()
    assert page.count("<svg") >= 4 and "Partial: 2 of 4 runs" in page and "Simulated nodes" not in page
    (one,), (two,) = (jobs.attempts(f"sweep/points/{p}") for p in ran)
    assert one["ended"] <= two["begun"], "--serial"
    assert (one["nodes"].count(","), two["nodes"].count(",")) == (0, 1)
    assert (
        status(sweep / "points" / ran[0]) == 0
        and f"job {named[ran[0]]}: COMPLETED" in capsys.readouterr().out
    )
