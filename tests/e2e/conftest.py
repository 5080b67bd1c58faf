"""Whole runs through the command line on the tiny model: real Ray, Megatron-core ranks and vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
TINY = REPO / "configs" / "tiny" / "rl.yaml"


@dataclass(frozen=True)
class Workplace:
    """A working directory with its own assets and run folders."""

    root: Path
    assets: Path
    python: str = sys.executable

    def redone(self, *args: str, timeout_s: float = 420.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*args), cwd=REPO, env=self.env(), capture_output=True, text=True, timeout=timeout_s
        )

    def start(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*args),
            cwd=REPO,
            env=self.env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def command(self, *args: str) -> list[str]:
        return [self.python, "-m", "redone_launcher.main", *args]

    def env(self) -> dict[str, str]:
        return {**os.environ, "REDONE_ASSETS": str(self.assets), "COLUMNS": "200"}

    def run_args(self, name: str, *overrides: str) -> list[str]:
        return ["run", str(TINY), f"run.dir={self.root}", f"run.name={name}", *overrides]

    def metrics(self, name: str) -> list[dict[str, float]]:
        lines = (self.root / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    root = tmp_path_factory.mktemp("runs")
    place = Workplace(root=root, assets=tmp_path_factory.mktemp("assets"))
    made = place.redone("data", "prepare", "--only", "tiny", "--dest", str(place.assets))
    assert made.returncode == 0, made.stdout + made.stderr
    return place
