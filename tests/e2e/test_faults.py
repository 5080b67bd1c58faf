"""What breaks while a run is going: one message, a non-zero exit, and no process of ours left."""

from __future__ import annotations

import signal
import subprocess
import time

import psutil
import pytest

from .conftest import Workplace
from .test_tiny_run import our_processes, wait_for_step


def child(process: subprocess.Popen[str], log: str) -> psutil.Process:
    """The actor of a running job that writes to `log`."""
    for candidate in psutil.process_iter(["pid"]):
        try:
            if any(f.path.endswith(log) for f in candidate.open_files()):
                return candidate
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    raise AssertionError(f"no process writes to {log}")


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate(timeout=60)
        raise AssertionError(f"the run went on:\n{output}") from None
    return output


def assert_clean(place: Workplace, name: str) -> None:
    deadline = time.monotonic() + 15
    while our_processes(place.root / name) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert our_processes(place.root / name) == []


@pytest.mark.slow
def test_engine_that_cannot_start(workplace: Workplace) -> None:
    done = workplace.redone(
        *workplace.run_args("noengine", "rollout.engine.kv_cache_mb=8", "rollout.engine.block_size=4096")
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "engine 0" in done.stderr and "Traceback" not in done.stderr
    assert_clean(workplace, "noengine")
    # nothing was trained: the same name may be used again
    assert not (workplace.root / "noengine" / "metrics.jsonl").exists() or not workplace.metrics("noengine")


LONG_RUN = ("algorithm.total_steps=200", "evaluate.every=0")


def test_killed_trainer_ends_the_run(workplace: Workplace) -> None:
    process = workplace.start(*workplace.run_args("kill-trainer", *LONG_RUN))
    wait_for_step(workplace, "kill-trainer", 2, process)
    child(process, "kill-trainer/logs/trainer-1.log").kill()
    output = finish(process)
    assert process.returncode == 2, output
    assert "trainer rank 1" in output and "Traceback" not in output
    assert_clean(workplace, "kill-trainer")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", pytest.param("stop", marks=pytest.mark.extra)])
def test_lost_engine_is_replaced_and_the_run_goes_on(workplace: Workplace, how: str) -> None:
    """kill -9, or SIGSTOP that only the missing sign of life tells. Nothing is trained twice."""
    name = f"engine-{how}"
    args = workplace.run_args(
        name, "algorithm.total_steps=8", "evaluate.every=0", "cluster.health_timeout_s=10"
    )
    process = workplace.start(*args)
    wait_for_step(workplace, name, 2, process)
    victim = child(process, f"{name}/logs/engine-0.log")
    victim.kill() if how == "kill" else victim.suspend()
    output = finish(process)
    assert process.returncode == 0, output
    assert "engine 0" in output and "started again" in output
    if how == "stop":
        assert "no sign of life" in output and "last event" in output
    steps = [m for m in workplace.metrics(name) if m["step"] > 0]
    assert [m["step"] for m in steps] == list(range(1, 9))
    assert max(m["sync/canary_max_abs_diff"] for m in steps) <= 1e-4
    audit = workplace.redone("data", "audit", str(workplace.root / name))
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert_clean(workplace, name)


@pytest.mark.extra
@pytest.mark.slow
def test_stopped_trainer_is_named_and_ends_the_run(workplace: Workplace) -> None:
    process = workplace.start(*workplace.run_args("stopped", *LONG_RUN, "cluster.health_timeout_s=10"))
    wait_for_step(workplace, "stopped", 2, process)
    child(process, "stopped/logs/trainer-1.log").suspend()
    output = finish(process)
    assert process.returncode == 2, output
    assert "trainer rank 1 shows no sign of life" in output
    assert "in phase " in output and "its last event: " in output
    assert_clean(workplace, "stopped")


@pytest.mark.extra
@pytest.mark.slow
def test_a_saved_batch_is_run_again(workplace: Workplace) -> None:
    args = workplace.run_args(
        "replayed", "algorithm.total_steps=3", "evaluate.every=0", "record.save_batches=2"
    )
    done = workplace.redone(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = str(workplace.root / "replayed")
    again = workplace.redone("replay", folder, "--step", "2")
    assert again.returncode == 0, again.stdout + again.stderr
    rows = [line.split("\u2502") for line in again.stdout.splitlines() if line.startswith("\u2502")]
    relative = {r[1].strip(): float(r[4]) for r in rows if r[4].strip()}
    assert {"actor/grad_norm", "actor/lr", "actor/pg_clipfrac"} <= set(relative)
    assert max(relative.values()) <= 1e-5, relative
    missing = workplace.redone("replay", folder, "--step", "3")
    assert missing.returncode == 2 and "there: 2" in missing.stderr


@pytest.mark.slow
def test_interrupt_stops_cleanly(workplace: Workplace) -> None:
    process = workplace.start(*workplace.run_args("interrupt", "algorithm.total_steps=200"))
    wait_for_step(workplace, "interrupt", 1, process)
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert_clean(workplace, "interrupt")
