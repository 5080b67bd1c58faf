"""The main job on the tiny mixture of experts: it learns, is exact at every step, leaves what it promises."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from .conftest import Workplace

STEPS = 15


def our_processes(root: Path) -> list[str]:
    """Live processes that belong to a run below `root` (actors write their logs there)."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        if process.info["status"] == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
            continue
        try:
            files = [f.path for f in process.open_files()]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(path.startswith(str(root)) for path in files):
            found.append(f"{process.pid} {' '.join(process.info['cmdline'] or [])[:80]}")
    return found


@pytest.fixture(scope="module")
def learned(workplace: Workplace) -> tuple[Workplace, subprocess.CompletedProcess[str]]:
    done = workplace.redone(
        *workplace.run_args("learn", f"algorithm.total_steps={STEPS}", "checkpoint.every=5")
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return workplace, done


def test_reward_rises(learned: tuple[Workplace, subprocess.CompletedProcess[str]]) -> None:
    place, _ = learned
    rewards = [m["reward/mean"] for m in place.metrics("learn") if "reward/mean" in m]
    assert len(rewards) == STEPS
    assert rewards[0] < 0.05
    assert rewards[-1] > 0.4


def test_trainer_and_engine_agree_at_every_step(
    learned: tuple[Workplace, subprocess.CompletedProcess[str]],
) -> None:
    place, _ = learned
    steps = [m for m in place.metrics("learn") if m["step"] > 0]
    assert [m["step"] for m in steps] == list(range(1, STEPS + 1))
    for m in steps:
        assert 0 < m["sync/canary_max_abs_diff"] <= 1e-4
        assert m["training/rollout_logprobs_diff_max"] <= 1e-4
        assert all(math.isfinite(v) for v in m.values() if isinstance(v, float))


def test_run_folder_is_complete(learned: tuple[Workplace, subprocess.CompletedProcess[str]]) -> None:
    place, done = learned
    run = place.root / "learn"
    for name in ("config.yaml", "samples.jsonl", "ledger.jsonl", "summary.json", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").glob("events.*"))
    assert {p.name for p in (run / "logs").iterdir()} >= {
        "driver.log",
        "trainer-0.log",
        "trainer-1.log",
        "engine-0.log",
    }
    assert "svg" in (run / "report.html").read_text()
    assert "test" in done.stdout or "reward" in done.stdout


def test_export_loads_in_transformers(learned: tuple[Workplace, subprocess.CompletedProcess[str]]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, _ = learned
    folder = place.root / "learn" / "export"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompts = [json.loads(line) for line in (place.root / "learn" / "samples.jsonl").read_text().splitlines()]
    assert prompts
    ids = tokenizer("hello", return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    text = tokenizer.decode(answer)
    assert text.count(max(set(text), key=text.count)) >= 6, (
        f"the exported model did not learn the letter: {text!r}"
    )


def test_nothing_is_left_behind(learned: tuple[Workplace, subprocess.CompletedProcess[str]]) -> None:
    place, _ = learned
    assert our_processes(place.root / "learn") == []
    assert not list(Path("/dev/shm").glob("redone-*-learn*"))


def test_ledger_audit(learned: tuple[Workplace, subprocess.CompletedProcess[str]]) -> None:
    place, _ = learned
    audit = place.redone("data", "audit", str(place.root / "learn"))
    assert audit.returncode == 0, audit.stdout + audit.stderr


def test_existing_run_folder_is_refused(learned: tuple[Workplace, subprocess.CompletedProcess[str]]) -> None:
    place, _ = learned
    again = place.redone(*place.run_args("learn"))
    assert again.returncode == 2
    assert "--resume" in again.stderr and "run.name" in again.stderr
    assert "Traceback" not in again.stderr


def wait_for_step(place: Workplace, name: str, step: int, process: subprocess.Popen[str]) -> None:
    path = place.root / name / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if path.exists() and any(m["step"] >= step for m in place.metrics(name)):
            return
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached")


@pytest.mark.slow
def test_kill_and_resume_equals_the_uninterrupted_run(
    learned: tuple[Workplace, subprocess.CompletedProcess[str]],
) -> None:
    place, _ = learned
    args = place.run_args("killed", f"algorithm.total_steps={STEPS}", "checkpoint.every=5")
    process = place.start(*args)
    wait_for_step(place, "killed", 7, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = place.redone("run", "--resume", str(place.root / "killed"))
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    whole, cut = ({m["step"]: m for m in place.metrics(n)} for n in ("learn", "killed"))
    assert sorted(cut) == sorted(whole)
    for step in range(1, STEPS + 1):
        for key in ("reward/mean", "actor/pg_loss", "actor/grad_norm", "response_length/mean"):
            assert cut[step][key] == pytest.approx(whole[step][key], abs=1e-6, rel=1e-5), (step, key)
    samples = [(place.root / n / "samples.jsonl").read_text() for n in ("learn", "killed")]
    assert samples[0] == samples[1]
    assert place.redone("data", "audit", str(place.root / "killed")).returncode == 0
    assert our_processes(place.root / "killed") == []
