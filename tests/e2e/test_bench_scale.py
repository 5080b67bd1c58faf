"""`redone bench` and `redone scale` on the tiny model: real Ray, Megatron-core ranks and vLLM."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from redone.bench.result import read_result
from tests.e2e.conftest import REPO, Workplace

pytestmark = pytest.mark.slow


def test_every_part_is_measured(workplace: Workplace, tmp_path: Path) -> None:
    out = tmp_path / "all.json"
    config = str(REPO / "configs/tiny/rl.yaml")
    done = workplace.redone(
        "bench", "all", config, "--repeats", "2", "--allow-dirty", "--out", str(out), timeout_s=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = {figure.name: figure for figure in read_result(out).figures}
    assert {name.split("/")[0] for name in found} == {"rollout", "train", "sync", "reward", "pack", "e2e"}
    assert all(len(figure.values) == 2 and figure.median > 0 for figure in found.values())
    # What the machine can do at most bounds what was reached.
    shares = {name: figure.share for name, figure in found.items() if figure.share is not None}
    assert {"train/update", "train/logprobs", "rollout/seconds", "sync/push"} <= shares.keys()
    assert all(0 < share < 1 for share in shares.values()), shares
    same = subprocess.run(
        workplace.command("bench", "compare", str(out), str(out)), cwd=REPO, env=workplace.env(),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert same.returncode == 0 and "REGRESSION" not in same.stdout


@pytest.mark.extra  # four minutes
def test_a_sweep_over_simulated_nodes_ends_in_a_report(workplace: Workplace) -> None:
    out = workplace.root / "scale"
    args = (
        "scale",
        str(REPO / "configs/scaling/tiny.yaml"),
        "--nodes",
        "1,2",
        "--steps",
        "3",
        "--out",
        str(out),
    )
    done = workplace.redone(*args, timeout_s=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    rows = list(csv.DictReader((out / "scaling.csv").open()))
    assert [(r["mode"], r["nodes"], r["gpus"]) for r in rows] == [
        ("strong", "1", "1"), ("strong", "2", "2"), ("weak", "1", "1"), ("weak", "2", "2"),
    ]  # fmt: skip
    # The work is fixed: the same tokens on both node counts of strong scaling, twice as many of weak scaling.
    tokens = [float(r["tokens_per_step"]) for r in rows]
    assert tokens[1] == pytest.approx(tokens[0], rel=0.02)
    assert tokens[3] == pytest.approx(2 * tokens[2], rel=0.02)
    assert all(float(r["response_tokens"]) == pytest.approx(9.875) for r in rows)
    assert all(float(r["predicted_s"]) > 0 and float(r["tokens_s_gpu"]) > 0 for r in rows)
    assert (out / "report.html").read_text().count("<svg") == 7
    # Resumed, with one run gone: only that one runs again.
    stamps = {p.name: p.stat().st_mtime_ns for p in (out / "points").glob("*.log")}
    shutil.rmtree(out / "points" / "weak-n2-s0-r0")
    again = workplace.redone("scale", "--resume", str(out), timeout_s=600)
    assert again.returncode == 0 and "3 done of 3" in again.stdout, again.stdout + again.stderr
    changed = {p.name for p in (out / "points").glob("*.log") if p.stat().st_mtime_ns != stamps[p.name]}
    assert changed == {"weak-n2-s0-r0.log"}
    assert json.loads((out / "scaling.json").read_text())["states"] == {"done": 3}


@pytest.mark.extra
def test_a_traced_step_leaves_a_trace(workplace: Workplace) -> None:
    args = workplace.run_args(
        "traced", "algorithm.total_steps=2", "evaluate.before_train=false", "evaluate.every=0",
        "evaluate.keep_best=false", "data.val=[]",
        "record.profile.tool=torch", "record.profile.steps=[2]", "record.profile.ranks=[1]",
        "checkpoint.at_end=false", "checkpoint.export_hf=false",
    )  # fmt: skip
    done = workplace.redone(*args)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    logs = workplace.root / "traced" / "logs"
    assert [p.name for p in logs.glob("*.trace.json.gz")] == ["trainer-1.step2.trace.json.gz"]
    assert not list((workplace.root / "traced" / "checkpoints").glob("step-*"))
