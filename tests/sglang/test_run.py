"""A whole run whose engine lives under another interpreter: driver and trainer in .venv, SGLang apart."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import REPO, TINY, Workplace

pytestmark = pytest.mark.sglang

STEPS = 8
# Python of the environment that has megatron-core and Ray; make test-sglang names it.
DRIVER = os.environ.get("REDONE_DRIVER_PYTHON", "")


def test_an_engine_under_an_interpreter_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts the engine with rollout.engine.python; every update passes the canary, reward rises."""
    assert DRIVER, "REDONE_DRIVER_PYTHON: the interpreter of .venv (make test-sglang sets it)"
    values = yaml.safe_load(TINY.read_text())
    values["rollout"]["engine"] = {"type": "sglang", "python": sys.executable, "max_num_seqs": 128}
    config = tmp_path / "sglang.yaml"
    config.write_text(yaml.safe_dump(values))
    path = [str(REPO / p) for p in (".", "kernels", "launcher", "tests/sglang/stubs")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    place = Workplace(root=tmp_path, assets=tmp_path / "assets", python=DRIVER)
    over = (f"run.dir={tmp_path}", "run.name=run", f"algorithm.total_steps={STEPS}", "checkpoint.every=0")
    for command in (
        ("data", "prepare", "--only", "tiny", "--dest", str(place.assets)),
        ("run", str(config), *over),
        ("data", "audit", str(tmp_path / "run")),
    ):
        done = place.redone(*command, timeout_s=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = [m for m in place.metrics("run") if m["step"] > 0]
    assert [m["step"] for m in steps] == list(range(1, STEPS + 1))
    assert max(m["sync/canary_max_abs_diff"] for m in steps) <= 1e-4
    assert max(m["training/rollout_logprobs_diff_max"] for m in steps) <= 1e-4
    assert steps[-1]["reward/mean"] > steps[0]["reward/mean"] + 0.2
