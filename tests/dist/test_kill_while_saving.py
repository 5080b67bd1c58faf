"""A writer that is killed at any moment leaves a checkpoint that loads and holds what was saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("kill_worker.py")


def run_trials(model: Path, folder: Path, trials: int, asynchronous: bool) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", str(WORKER), str(model), str(folder), str(trials)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*command, str(int(asynchronous))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads((folder / "result.json").read_text())
    return found


def check(found: list[dict[str, Any]]) -> None:
    saved = 0
    for trial in found:
        assert trial["killed"] and trial["said"][0] == f"loaded {saved}", trial
        saved = trial["steps"][-1]
        assert len(trial["steps"]) <= 3
    assert saved >= len(found)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in a thread"])
def test_twenty_kills(models: Path, tmp_path: Path, asynchronous: bool) -> None:
    found = run_trials(models / "moe", tmp_path / "run", 20, asynchronous)
    check(found)
    assert any(trial["incomplete"] for trial in found)  # at least one was killed in the middle
