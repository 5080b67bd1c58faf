"""What takes minutes: SLURM's own time limit, the death of a job's first node, a run that fails by itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from redone_launcher.jobs import job_of, status

from .conftest import Jobs

NO_END = "algorithm.filter_groups.enable=false"  # the toy task is soon solved: no group would be left

pytestmark = [pytest.mark.slow, pytest.mark.extra]


def test_the_time_limit_itself(jobs: Jobs) -> None:
    """SLURM itself sends the warning; each attempt goes on where the one before it stopped."""
    limit = "REDONE_TIME=00:04:00\nREDONE_SIGNAL_LEAD_S=60\nREDONE_MAX_ATTEMPTS=9\n"
    jobs.submit("limit", 1, "algorithm.total_steps=100000", NO_END, site=limit)

    def saved() -> list[dict[str, Any]]:
        return [a for a in jobs.attempts("limit") if a["reason"] == "time limit: state saved"]

    jobs.wait("limit", lambda: len(saved()) >= 2, timeout_s=1500)
    reached = jobs.metrics("limit")[-1]["step"]
    jobs.wait_for_step("limit", int(reached) + 2, attempt=len(jobs.attempts("limit")))
    jobs.cancel(job_of(jobs.run("limit")))
    jobs.wait_for_end("limit", state="CANCELLED")
    *attempts, last = jobs.attempts("limit")
    assert {a["outcome"] for a in attempts} == {"requeued"} and last["outcome"] == "cancelled"
    assert all(a["ended"] - a["begun"] < 240 for a in attempts)
    steps = [m["step"] for m in jobs.metrics("limit")]
    assert steps == list(range(len(steps))), "a step is missing, or twice"


def test_the_first_node_dies(jobs: Jobs) -> None:
    """The batch script dies with it: SLURM itself requeues the job."""
    jobs.submit("head", 1, "algorithm.total_steps=30", "checkpoint.every=2")
    jobs.wait_for_step("head", 4)
    victim = jobs.state("head").nodes
    jobs.cluster.kill_node(victim)
    jobs.wait_for_end("head", timeout_s=900)
    (attempt,) = jobs.attempts("head")  # the first one could not write its end
    assert attempt["outcome"] == "done" and attempt["nodes"] != victim
    assert [m["step"] for m in jobs.metrics("head")] == list(range(31))
    jobs.cluster.start_node(victim)
    jobs.cluster.wait_for_idle(4)


def test_a_run_that_fails_is_not_requeued(
    jobs: Jobs, tiny_assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model disappears between submission and start."""
    shutil.copytree(tiny_assets / "tiny/model", tmp_path / "model")
    jobs.submit("fails", 1, f"model.path={tmp_path / 'model'}")
    shutil.rmtree(tmp_path / "model")
    jobs.wait_for_end("fails", state="FAILED")
    (attempt,) = jobs.attempts("fails")
    assert attempt["outcome"] == "failed" and "no such folder" in attempt["reason"]
    assert status(jobs.run("fails")) == 1
    assert "no such folder" in capsys.readouterr().out
    assert jobs.cluster.processes() == []


def test_a_dependency_that_failed_cancels(jobs: Jobs) -> None:
    first = jobs.submit("first", 1, site='REDONE_SBATCH_ARGS="--begin=now+1hour"\n')
    jobs.submit("second", 1, dependency=f"afterok:{first.job}")
    assert jobs.state("second").state == "PENDING"
    jobs.cancel(str(first.job))
    jobs.wait_for_end("second", state="CANCELLED")
