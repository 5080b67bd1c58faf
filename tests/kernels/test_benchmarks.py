"""The benchmarks' own promises: what they refuse, and the memory the chunked head saves."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def head_memory(repo: Path, *sizes: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "benchmarks/kernels/head_memory.py", *map(str, sizes)],
        cwd=repo, env=os.environ | {"PYTHONPATH": str(repo / "kernels")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    out: dict[str, Any] = json.loads(done.stdout)
    for value in ("logprob", "dhidden", "dweight"):
        assert out["chunked"][value] == pytest.approx(out["naive"][value], rel=1e-4)
    return out


def test_head_memory_small(repo: Path) -> None:
    assert head_memory(repo, 512, 40000, 16, 16)["ratio"] >= 8


@pytest.mark.slow
def test_head_memory(repo: Path) -> None:
    """N = 2048, V = 151,936: at least 8 times less than whole logits."""
    out = head_memory(repo, 2048, 151936)
    assert out["ratio"] >= 8
    for kind in ("naive", "chunked"):
        assert out[kind]["bytes"] == pytest.approx(out[kind]["predicted_bytes"], rel=0.15)


def test_results_need_a_commit(repo: Path, tmp_path: Path) -> None:
    """A copy outside version control, and one with changes, are refused before anything runs."""
    shutil.copytree(repo / "benchmarks/kernels", tmp_path / "benchmarks/kernels")
    environment = {k: v for k, v in os.environ.items() if k != "REDONE_COMMIT"}
    environment |= {"PYTHONPATH": str(repo / "kernels"), "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}

    def refusal() -> str:
        done = subprocess.run(
            [sys.executable, "benchmarks/kernels/run.py"],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 1
        return done.stderr

    assert "no commit" in refusal()
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    (tmp_path / "new.txt").write_text("x")
    assert "uncommitted" in refusal()


def test_a_result_goes_between_the_marks_of_the_page(repo: Path) -> None:
    module = runpy.run_path(str(repo / "benchmarks/kernels/table.py"))
    record = {
        "device": "D", "date": "2000-01-01", "commit": "c", "cuda": "0", "versions": {"torch": "0"},
        "targets": [{"what": "w", "target": ">= 1", "measured": 0.5}],
        "rows": [{"name": "a", "ms": 1.25}, {"name": "b", "failed": "RuntimeError: x"}],
    }  # fmt: skip
    page = (repo / "docs/kernels.md").read_text()
    placed = module["place"](page, module["table"](record))
    assert "| w | >= 1 | 0.5 |" in placed and "| a | 1.25 |" in placed and "| b | RuntimeError: x |" in placed
    assert placed.split("<!-- measured -->")[0] == page.split("<!-- measured -->")[0]
    assert placed.split("<!-- /measured -->")[1] == page.split("<!-- /measured -->")[1]
