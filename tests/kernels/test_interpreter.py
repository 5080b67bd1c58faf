"""Runs this folder's kernel tests in a process of their own, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.conftest import INTERPRETER


def interpret(repo: Path, marker: str) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-m", marker, "-W", "ignore::RuntimeWarning",
            "--durations=10", "tests/kernels",
        ],
        cwd=repo,
        env=os.environ | INTERPRETER,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_kernels(repo: Path) -> None:
    interpret(repo, "not slow")


@pytest.mark.slow
def test_kernels_slow(repo: Path) -> None:
    interpret(repo, "slow")
