"""Whole runs on a real SLURM: 1, 2 and 4 nodes, time limit, cancel, a lost node, jobs that share hosts.

All jobs of the module are queued as early as they can be; each test waits for its own.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from redone_launcher.jobs import cancel, job_of, logs, status
from redone_launcher.ray_node import ray_folder

from .conftest import Jobs

pytestmark = pytest.mark.slow

STEPS = 8  # of the two jobs that are compared
ON_ONE_HOST = 'REDONE_SBATCH_ARGS="--nodelist=node1"\n'
SAME = ("reward/mean", "actor/pg_loss", "actor/grad_norm", "response_length/mean")


@pytest.fixture(scope="module")
def together(jobs: Jobs) -> Jobs:
    """Two jobs at once on node1, the same run: `whole` to its end, `cut` warned of its time limit on the way.

    The warning is what --signal=B:USR1 sends: SIGUSR1 to the batch script.
    """
    jobs.submit("whole", 1, f"algorithm.total_steps={STEPS}", site=ON_ONE_HOST)
    jobs.submit("cut", 1, f"algorithm.total_steps={STEPS}", site=ON_ONE_HOST)
    jobs.wait_for_step("cut", 1)
    warn(jobs, "cut")
    return jobs


def warn(jobs: Jobs, name: str) -> None:
    command = ["scancel", "--batch", "--signal=USR1", job_of(jobs.run(name))]
    subprocess.run(command, check=True, timeout=20)


def leftovers(jobs: Jobs, name: str) -> list[Path]:
    """Ray's folders, tokens and shared memory of all attempts at a run."""
    attempts = sorted((jobs.run(name) / "logs").glob("attempt-*"))
    assert attempts
    found = [Path(ray_folder("/tmp", attempt / "ray-address")) for attempt in attempts]
    found += [attempt / "ray-token" for attempt in attempts]
    return [*(path for path in found if path.exists()), *Path("/dev/shm").glob(f"redone-*-{name}")]


@pytest.fixture(scope="module")
def four(together: Jobs) -> Jobs:
    together.submit("four", 4, "algorithm.total_steps=3")
    return together


def test_two_jobs_share_a_host_and_both_end(together: Jobs) -> None:
    together.wait_for_end("whole")
    together.wait_for_end("cut")
    (whole,), cut = together.attempts("whole"), together.attempts("cut")
    assert whole["nodes"] == cut[0]["nodes"] == "node1"
    assert whole["begun"] < cut[0]["ended"] and cut[0]["begun"] < whole["ended"], "they did not overlap"
    assert [a["outcome"] for a in cut] == ["requeued", "done"]
    assert "time limit" in cut[0]["reason"]


def test_after_a_requeue_the_metrics_go_on_as_if_nothing_had_happened(together: Jobs) -> None:
    together.wait_for_end("whole")
    together.wait_for_end("cut")
    whole, cut = ({m["step"]: m for m in together.metrics(n)} for n in ("whole", "cut"))
    assert sorted(cut) == sorted(whole) == list(range(STEPS + 1))
    for step in range(1, STEPS + 1):
        for key in SAME:
            assert cut[step][key] == pytest.approx(whole[step][key], abs=1e-6, rel=1e-5), (step, key)
    samples = [(together.run(n) / "samples.jsonl").read_text() for n in ("whole", "cut")]
    assert samples[0] == samples[1]
    stopped = (together.run("cut") / "logs/attempt-0/driver.out").read_text()
    assert "stopped as requested after step" in stopped


def test_each_attempt_has_its_logs_and_status_tells(
    together: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    together.wait_for_end("cut")
    run = together.run("cut")
    assert os.readlink(run / "logs/latest") == "attempt-1"
    for attempt in ("attempt-0", "attempt-1"):
        names = {p.name for p in (run / "logs" / attempt).iterdir()}
        assert names >= {"job.log", "driver.log", "driver.out", "trainer-0.log", "engine-0.log"}, names
    assert status(run) == 0
    said = capsys.readouterr().out
    assert "COMPLETED" in said and f"step: {STEPS}" in said and "attempt 0 on node1: requeued" in said
    assert logs(run, None, 5) == 0
    assert "driver.out" in capsys.readouterr().out


def test_four_nodes_run_to_the_end(four: Jobs) -> None:
    four.wait_for_end("four")
    assert [m["step"] for m in four.metrics("four")] == [0, 1, 2, 3]
    (attempt,) = four.attempts("four")
    assert len(attempt["nodes"].split(",")) == 4
    logs = four.run("four") / "logs/latest"
    assert len(list(logs.glob("trainer-*.log"))) == 4
    assert "4 node(s) are fit" in (logs / "preflight.log").read_text()


def test_nothing_of_ours_stays(four: Jobs) -> None:
    ours = ("whole", "cut", "four")
    for name in ours:
        four.wait_for_end(name)
        assert leftovers(four, name) == []
    assert four.cluster.processes() == []
    assert not list((four.root / "shared/weights").iterdir()), "the weight channel's file"


def test_cancel_leaves_nothing_behind(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    jobs.submit("cancelled", 1, "algorithm.total_steps=500")
    jobs.wait_for_step("cancelled", 1)
    assert jobs.cluster.processes() != []
    assert cancel(jobs.run("cancelled")) == 0
    assert "is cancelled" in capsys.readouterr().out
    assert jobs.state("cancelled").state == "CANCELLED"
    assert jobs.cluster.processes() == []
    assert leftovers(jobs, "cancelled") == []
    assert status(jobs.run("cancelled")) == 1


# The first attempt's second node fails the site's own check; nothing is wrong with any later one.
ODD_NODE = """\
REDONE_NODE_CHECK='[ -n "${SLURM_RESTART_COUNT:-}" ] || [ "$SLURM_NODEID" = 0 ] || { echo bad fan; exit 7; }'
"""


@pytest.mark.extra  # four minutes: SLURM waits before it calls a node lost
def test_two_nodes_survive_an_odd_node_and_a_lost_one(jobs: Jobs) -> None:
    """Preflight excludes a node; then one of the others dies in mid-run; the run still ends, on two nodes."""
    jobs.submit("two", 2, "algorithm.total_steps=20", "checkpoint.every=2", site=ODD_NODE)
    jobs.wait_for_step("two", 2, attempt=1)
    (first,) = jobs.attempts("two")
    assert first["outcome"] == "requeued" and "bad fan" in first["reason"]
    odd = first["nodes"].split(",")[1]
    assert f"{odd}: REDONE_NODE_CHECK ended with 7" in first["reason"]
    victim = jobs.state("two").nodes
    names = subprocess.run(
        ["scontrol", "show", "hostnames", victim], capture_output=True, text=True, timeout=20, check=True
    ).stdout.split()
    assert odd not in names
    jobs.cluster.kill_node(names[1])
    jobs.wait_for_end("two")
    _, second, third = jobs.attempts("two")
    assert second["outcome"] == "requeued" and names[1] in second["reason"], second
    assert third["outcome"] == "done"
    assert not {odd, names[1]} & set(third["nodes"].split(","))
    assert [m["step"] for m in jobs.metrics("two")] == list(range(21))
    jobs.cluster.start_node(names[1])
    jobs.cluster.wait_for_idle(4)
    assert jobs.cluster.processes() == []
