"""One private SLURM per session (private_slurm.py), and jobs submitted to it through redone's own code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redone_launcher.jobs import attempts, job_of
from redone_launcher.slurm import JobState, job_state
from redone_launcher.submit import Request, Submitted, submit

from .private_slurm import PrivateSlurm

REPO = Path(__file__).resolve().parents[2]
TINY = REPO / "configs" / "tiny" / "rl.yaml"
# One trainer rank per node, no validation, nothing written that no test reads.
LEAN = (
    "cluster.gpus_per_node=1",
    "data.val=[]",
    "evaluate.every=0",
    "evaluate.keep_best=false",
    "checkpoint.every=0",
    "checkpoint.export_hf=false",
    "record.loggers=[jsonl]",
    "algorithm.train_batch_size=8",
)
SITE = "REDONE_TIME=00:20:00\nREDONE_SIGNAL_LEAD_S=120\nREDONE_SHARED={shared}\n"


@dataclass(frozen=True)
class Jobs:
    """Submits to the private SLURM and waits for what becomes of it."""

    cluster: PrivateSlurm
    root: Path

    def site(self, name: str, extra: str = "") -> Path:
        path = self.root / f"{name}.env"
        path.write_text(SITE.format(shared=self.root / "shared") + extra)
        return path

    def submit(self, name: str, nodes: int, *overrides: str, site: str = "", **more: Any) -> Submitted:
        expert = f"trainer.parallel.expert={min(nodes, 2)}"
        words = (*LEAN, expert, f"run.dir={self.root}", f"run.name={name}", *overrides)
        return submit(Request(config=TINY, overrides=words, nodes=nodes, site=self.site(name, site), **more))

    def submit_again(self, name: str) -> Submitted:
        """As `redone submit --resume`."""
        site = self.root / f"{name}.env"
        return submit(Request(config=None, overrides=(), nodes=None, site=site, resume=self.run(name)))

    def run(self, name: str) -> Path:
        return self.root / name

    def metrics(self, name: str) -> list[dict[str, float]]:
        file = self.run(name) / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def attempts(self, name: str) -> list[dict[str, Any]]:
        return attempts(self.run(name))

    def state(self, name: str) -> JobState:
        state = job_state(job_of(self.run(name)))
        assert state is not None
        return state

    def wait(self, name: str, what: Callable[[], bool], timeout_s: float = 420.0) -> None:
        """Until `what`; a job that ended meanwhile, or never does, fails with all of its logs."""
        deadline = time.monotonic() + timeout_s
        while not what():
            state = self.state(name)
            if state.state == "PENDING" and state.reason == "BeginTime" and state.restarts:
                self.start_now(name)
            assert state.live or what(), f"{name} is {state}\n{self.logs(name)}"
            assert time.monotonic() < deadline, f"{name}: {state}\n{self.logs(name)}"
            time.sleep(0.3)

    def start_now(self, name: str) -> None:
        """SLURM lets a requeued job wait for two minutes, which would be most of the tests' time."""
        update = ["scontrol", "update", f"JobId={job_of(self.run(name))}", "StartTime=now"]
        subprocess.run(update, timeout=20, check=False)

    def wait_for_end(self, name: str, state: str = "COMPLETED", timeout_s: float = 420.0) -> None:
        self.wait(name, lambda: not self.state(name).live, timeout_s)
        assert self.state(name).state == state, f"{self.state(name)}\n{self.logs(name)}"

    def wait_for_step(self, name: str, step: int, attempt: int = 0) -> None:
        """Until `attempt` (or a later one) is running and the run has reached `step`."""
        begun = self.run(name) / "logs" / f"attempt-{attempt}"
        self.wait(name, lambda: begun.exists() and any(m["step"] >= step for m in self.metrics(name)))

    def cancel(self, job: str) -> None:
        subprocess.run(["scancel", job], check=True, timeout=20)

    def logs(self, name: str) -> str:
        """The ends of all logs of all attempts."""
        files = [*self.run(name).glob("slurm/*.out"), *self.run(name).glob("logs/attempt-*/*.*")]
        texts = []
        for file in sorted(files):
            if file.suffix in (".log", ".out"):
                end = file.read_text(errors="replace")[-1500:]
                texts.append(f"==> {file.relative_to(self.root)}\n{end}")
        return "\n".join(texts)


@pytest.fixture(scope="session")
def cluster() -> Iterator[PrivateSlurm]:
    """Four nodes on this host. Fails, not skips, without slurm-wlm and munge (make system-packages)."""
    private = PrivateSlurm(nodes=4)
    try:
        private.start()
        yield private
    finally:
        private.stop()


@pytest.fixture(scope="session")
def tiny_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and data, where configs/tiny looks for them."""
    assets = tmp_path_factory.mktemp("assets")
    done = subprocess.run(
        [sys.executable, "-m", "redone_launcher.main", "data", "prepare", "--only=tiny", f"--dest={assets}"],
        cwd=REPO, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return assets


@pytest.fixture(scope="module", autouse=True)
def environment(cluster: PrivateSlurm, tiny_assets: Path) -> Iterator[None]:
    """What a user's shell would have; other folders of the same test process must not see it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
        patch.setenv("REDONE_ASSETS", str(tiny_assets))
        patch.chdir(REPO)  # jobs run where they were submitted
        yield


@pytest.fixture(scope="session")
def big_model(tiny_assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-30B-A3B's sizes with the tiny model's tokenizer and no weights worth the name."""
    folder = tmp_path_factory.mktemp("big") / "model"
    shutil.copytree(tiny_assets / "tiny" / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= dict(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        intermediate_size=6144, moe_intermediate_size=768, num_local_experts=128, num_experts_per_tok=8,
        vocab_size=151936, max_position_embeddings=40960,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def jobs(cluster: PrivateSlurm, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(cluster, tmp_path_factory.mktemp("runs"))
