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


def test_engine_that_cannot_start(workplace: Workplace) -> None:
    done = workplace.redone(
        *workplace.run_args("noengine", "rollout.engine.kv_cache_mb=8", "rollout.engine.block_size=4096")
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "engine 0" in done.stderr and "Traceback" not in done.stderr
    assert_clean(workplace, "noengine")
    # nothing was trained: the same name may be used again
    assert not (workplace.root / "noengine" / "metrics.jsonl").exists() or not workplace.metrics("noengine")


@pytest.mark.parametrize("victim", ["engine-0.log", "trainer-1.log"])
def test_killed_actor_ends_the_run(workplace: Workplace, victim: str) -> None:
    name = f"kill-{victim.removesuffix('.log')}"
    process = workplace.start(*workplace.run_args(name, "algorithm.total_steps=200", "evaluate.every=0"))
    wait_for_step(workplace, name, 2, process)
    child(process, f"{name}/logs/{victim}").kill()
    output = finish(process)
    assert process.returncode == 2, output
    assert ("engine 0" if "engine" in victim else "trainer rank 1") in output
    assert "Traceback" not in output
    assert_clean(workplace, name)


def test_interrupt_stops_cleanly(workplace: Workplace) -> None:
    process = workplace.start(*workplace.run_args("interrupt", "algorithm.total_steps=200"))
    wait_for_step(workplace, "interrupt", 1, process)
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert_clean(workplace, "interrupt")
