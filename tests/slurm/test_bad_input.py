"""What users get wrong at submission, and a SLURM that does not answer: a sentence, no hang, no folder."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from redone_launcher import slurm as client
from redone_launcher.jobs import cancel, job_of, status
from redone_launcher.slurm import SlurmError

from redone.errors import ConfigError, RedoneError, RunFolderError

from .conftest import Jobs

pytestmark = [pytest.mark.slow, pytest.mark.extra]

CUDA = ("cluster.device=cuda", "rollout.engine.in_process=false")


def refused(jobs: Jobs, name: str, *words: str, kind: type[RedoneError], **more: object) -> str:
    with pytest.raises(kind) as caught:
        jobs.submit(name, 1, *words, **more)  # type: ignore[arg-type]
    assert not jobs.run(name).exists(), "a refused submission wrote something"
    return str(caught.value)


def test_unknown_partition(jobs: Jobs) -> None:
    said = refused(jobs, "nopart", kind=SlurmError, site="REDONE_PARTITION=nope\n")
    assert said == "REDONE_PARTITION=nope: no such partition; this cluster has debug"


def test_more_gpus_than_a_node_has(jobs: Jobs) -> None:
    words = (*CUDA, "cluster.gpus_per_node=16", "trainer.parallel.expert=1", "rollout.replicas=1")
    said = refused(jobs, "gpus", *words, kind=SlurmError, site="REDONE_GPU=h100\nREDONE_CPUS_PER_NODE=8\n")
    assert "cluster.gpus_per_node=16" in said and "have 8 GPUs (gpu:h100:8)" in said


def test_more_nodes_than_the_partition_has(jobs: Jobs) -> None:
    with pytest.raises(SlurmError, match="partition debug has 4 nodes"):
        jobs.submit("nodes", 5, "trainer.parallel.expert=1")


def test_more_cpus_than_a_node_has(jobs: Jobs) -> None:
    said = refused(jobs, "cpus", kind=SlurmError, site="REDONE_CPUS_PER_NODE=99\n")
    assert "99 CPUs" in said and "REDONE_CPUS_PER_NODE" in said


def test_what_only_sbatch_knows_is_passed_on(jobs: Jobs) -> None:
    with pytest.raises(SlurmError, match=r"(?i)sbatch: .*(constraint|feature)"):
        jobs.submit("constraint", 1, site="REDONE_SBATCH_ARGS=--constraint=nonsense\n")


def test_existing_run_folder(jobs: Jobs) -> None:
    first = jobs.submit("exists", 1, site='REDONE_SBATCH_ARGS="--begin=now+1hour"\n')
    assert first.job is not None
    with pytest.raises(RunFolderError, match="--resume"):
        jobs.submit("exists", 1)
    with pytest.raises(RunFolderError, match="is PENDING; redone cancel"):
        jobs.submit_again("exists")
    assert cancel(jobs.run("exists")) == 0
    assert job_of(jobs.run("exists")) == first.job


def test_dead_controller(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """slurmctld exists but does not answer: what a user sees as a hang of minutes."""
    monkeypatch.setenv("REDONE_SLURM_TIMEOUT_S", "2")
    jobs.cluster.stop_controller()
    begun = time.monotonic()
    try:
        said = refused(jobs, "dead", kind=SlurmError)
    finally:
        jobs.cluster.continue_controller()
    assert "did not answer in 2 s" in said and "slurmctld is down or out of reach" in said
    assert time.monotonic() - begun < 60


def test_no_controller_at_all(jobs: Jobs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = (jobs.cluster.root / "etc/slurm.conf").read_text().splitlines()
    lines = [line.split("=")[0] + "=1" if line.startswith("SlurmctldPort") else line for line in lines]
    (tmp_path / "slurm.conf").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    monkeypatch.setenv("REDONE_SLURM_TIMEOUT_S", "3")
    assert "slurmctld is down or out of reach" in refused(jobs, "gone", kind=SlurmError)


def test_slurm_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match="sinfo is not installed here"):
        client.partitions()


def test_a_job_that_nobody_knows(jobs: Jobs) -> None:
    assert client.job_state("4000000") is None
    with pytest.raises(RunFolderError, match="is no run folder"):
        status(jobs.root)


def test_the_planner_is_the_gate(jobs: Jobs, big_model: Path) -> None:
    words = (*CUDA, f"model.path={big_model}", "cluster.gpus_per_node=8", "rollout.replicas=1")
    words += ("trainer.parallel.expert=8", "rollout.tensor_model_parallel_size=8", "model.dtype=bfloat16")
    said = refused(jobs, "big", *words, kind=ConfigError, site="REDONE_GPU=h100\nREDONE_CPUS_PER_NODE=8\n")
    assert "the planner refuses this run (--force overrides)" in said and "GB" in said
    assert "REDONE_GPU=h100" in refused(jobs, "big", *words, kind=ConfigError)
    forced = jobs.submit(
        "forced", 1, *words, site="REDONE_GPU=h100\nREDONE_CPUS_PER_NODE=8\n", force=True, dry_run=True
    )
    assert any(note.startswith("forced: ") for note in forced.notes)
    assert "#SBATCH --gpus-per-node=8" in forced.script.read_text()
    assert (jobs.run("forced") / "slurm/plan.txt").stat().st_size > 100
