"""Sweeps: points and their work, states, efficiency, reports of partial sweeps, job dependencies."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from redone_launcher.scale import _report, _run

from redone.bench.roofline import Roofline
from redone.config.check import check_config
from redone.config.load import load_config
from redone.errors import ConfigError, RunFolderError
from redone.scaling import launch
from redone.scaling.launch import LocalLauncher
from redone.scaling.measured import cells, read_run
from redone.scaling.predict import cpu_row, predict_cell
from redone.scaling.sweep import Point, Sweep, open_folder, points, read_sweep, state

CONFIG = """
model: {path: MODEL, dtype: float32}
data: {train: [TRAIN], max_prompt_length: 64, max_response_length: 16}
rewards: {default: {family: exact}}
algorithm: {train_batch_size: 8, ppo_mini_batch_size: 4}
rollout: {n: 4, forced_lengths: [4, 16]}
"""
HF = dict(
    model_type="qwen3", num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, vocab_size=256, max_position_embeddings=512, rope_theta=1e4,
    rms_norm_eps=1e-6, tie_word_embeddings=True,
)  # fmt: skip
ROOF = Roofline(device="x", dtype="float32", threads=1, matmul_flops=4e10, copy_bytes_s=1e10, seconds=0.0)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(HF))
    (tmp_path / "train.jsonl").touch()
    text = CONFIG.replace("MODEL", str(tmp_path / "model")).replace("TRAIN", str(tmp_path / "train.jsonl"))
    (tmp_path / "c.yaml").write_text(text)
    return tmp_path


def sweep(place: Path, **changes: Any) -> Sweep:
    values: dict[str, Any] = dict(
        config=str(place / "c.yaml"),
        overrides=(),
        nodes=(1, 2, 4),
        modes=("strong", "weak"),
        seeds=(0,),
        repeats=2,
        steps=3,
        warmup=1,
        simulated=True,
        scale_engines=False,
    )
    return Sweep(**{**values, **changes})


def todo(place: Path, one: Sweep) -> list[Point]:
    return points(one, load_config(one.config, one.overrides), place / "out")


def write_metrics(
    place: Path, point: Point, seconds: list[float], tokens: float = 800.0, gpus: int = 1
) -> None:
    folder = place / "out" / "points" / point.id
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": 0, "parity/x": 1.0}]
    for step, s in enumerate(seconds, start=1):
        rows.append(
            {
                "step": step, "timing_s/step": s, "perf/throughput": tokens / s / gpus, "timing_s/gen": s / 2,
                "timing_s/update_weights": s / 10, "perf/gen_tail_s": s / 5, "perf/total_num_tokens": tokens,
                "prompt_length/mean": 30.0, "response_length/mean": 10.0,
            }
        )  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_points_fix_the_work(place: Path) -> None:
    found = todo(place, sweep(place))
    ids = [p.id for p in found]
    assert ids[:5] == [
        "base-n1-s0-r0",
        "strong-n2-s0-r0",
        "weak-n2-s0-r0",
        "strong-n4-s0-r0",
        "weak-n4-s0-r0",
    ]
    assert len(ids) == len(set(ids)) == 10
    by_id = {p.id: load_config(place / "c.yaml", p.overrides) for p in found}
    for name, ranks, batch in (("base-n1", 1, 8), ("strong-n4", 4, 8), ("weak-n4", 4, 32)):
        cfg = by_id[f"{name}-s0-r1"]
        assert (cfg.cluster.world_size, cfg.algorithm.train_batch_size) == (ranks, batch)
        assert cfg.algorithm.train_batch_size == 2 * cfg.algorithm.ppo_mini_batch_size
        assert cfg.rollout.replicas == 1 and not cfg.algorithm.filter_groups.enable
        check_config(cfg, HF)
        assert not cfg.checkpoint.at_end and cfg.evaluate.every == 0 and cfg.algorithm.total_steps == 3


def test_on_slurm_nodes_are_nodes_and_engines_grow(place: Path) -> None:
    found = todo(place, sweep(place, simulated=False, scale_engines=True, overrides=("rollout.replicas=2",)))
    cfg = load_config(place / "c.yaml", next(p for p in found if p.id == "weak-n4-s0-r0").overrides)
    assert (cfg.cluster.nodes, cfg.cluster.gpus_per_node) == (4, 1)
    assert cfg.rollout.replicas == 8


@pytest.mark.parametrize(
    "wrong", [dict(nodes=(1, 1)), dict(nodes=(0, 2)), dict(steps=1), dict(repeats=0), dict(seeds=())]
)
def test_a_sweep_that_means_nothing_is_refused(place: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--"):
        sweep(place, **wrong).check()


def test_weak_scaling_needs_whole_batches(place: Path) -> None:
    with pytest.raises(ConfigError, match="not whole"):
        todo(place, sweep(place, nodes=(3, 4)))


def test_a_folder_takes_one_sweep(place: Path) -> None:
    one = sweep(place)
    open_folder(place / "out", one)
    open_folder(place / "out", one)
    assert read_sweep(place / "out") == one
    with pytest.raises(RunFolderError, match="steps: 3 -> 5"):
        open_folder(place / "out", sweep(place, steps=5))
    with pytest.raises(RunFolderError, match="no scaling folder"):
        read_sweep(place)


def test_efficiency_and_shares_from_metrics(place: Path) -> None:
    one = sweep(place, repeats=1)
    open_folder(place / "out", one)
    for point in todo(place, one):
        ranks = point.nodes
        tokens = 800.0 * (ranks if "strong" not in point.modes else 1)
        seconds = {"base": 8.0, "strong": 8.0 / ranks * 1.25, "weak": 10.0}[point.id.split("-")[0]]
        write_metrics(place, point, [100.0, seconds], tokens, ranks)
    runs = [r for p in todo(place, one) if (r := read_run(place / "out", one, p))]
    found = {(c.mode, c.nodes): c for c in cells(one, runs, gpus_per_node=1)}
    assert found["strong", 1].efficiency == found["weak", 1].efficiency == 1.0
    assert found["strong", 4].efficiency == pytest.approx(0.8)
    assert found["weak", 4].efficiency == pytest.approx(0.8)
    assert found["strong", 4].median("step_s") == 2.5, "the warm-up step is left out"
    assert found["weak", 2].sync_share == pytest.approx(0.1)
    assert found["weak", 2].tail_share == pytest.approx(0.2)
    assert found["weak", 2].other == pytest.approx(10 - 5 - 1)


def test_the_report_of_a_partial_sweep(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redone.bench.roofline.roofline", lambda *_: ROOF)
    one = sweep(place, price=2.0)
    open_folder(place / "out", one)
    every = todo(place, one)
    write_metrics(place, every[0], [9.0, 4.0, 4.0])
    write_metrics(place, every[1], [9.0, 2.0], gpus=2)  # cut off after two steps
    (place / "out" / "points" / f"{every[2].id}.failed").write_text("no <memory> left\n")
    path, states = _report(place / "out", one, every)
    assert dict(states) == {"done": 1, "missing": 8, "failed": 1}
    html = path.read_text()
    assert "Partial: 1 of 10 runs" in html and "Simulated nodes" in html and html.count("<svg") >= 4
    assert "no &lt;memory&gt; left" in html
    rows = list(csv.DictReader((place / "out" / "scaling.csv").open()))
    assert [(r["mode"], r["nodes"]) for r in rows] == [("strong", "1"), ("strong", "2"), ("weak", "1")]
    assert float(rows[0]["cost_per_mtoken"]) == pytest.approx(2.0 / 3600 / 200 * 1e6)
    assert float(rows[0]["refit_s"]) == pytest.approx(4.0), "the multiplier is fitted to the base"
    assert float(rows[1]["refit_s"]) != pytest.approx(float(rows[1]["predicted_s"]))
    assert json.loads((place / "out" / "scaling.json").read_text())["multiplier"] > 0


FAKE_RUN = """
import json, pathlib, sys
words = dict(w.split("=", 1) for w in sys.argv[3:])
folder = pathlib.Path(words["run.dir"]) / words["run.name"]
count = pathlib.Path(words["run.dir"]) / "count"
count.write_text(count.read_text() + words["run.name"] + " " if count.exists() else words["run.name"] + " ")
if "weak-n2" in words["run.name"] and not (folder.parent / "healed").exists():
    sys.exit("a rank died")
folder.mkdir()
row = {"timing_s/step": 1.0, "perf/throughput": 9.0, "perf/total_num_tokens": 9.0, "prompt_length/mean": 30.0,
       "response_length/mean": 10.0}
(folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i, **row}) + "\\n" for i in range(4)))
"""


def test_a_sweep_goes_on_after_a_failure_and_is_taken_up_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = place / "fake_run.py"
    script.write_text(FAKE_RUN)
    monkeypatch.setattr(launch, "REDONE", (sys.executable, str(script)))
    monkeypatch.setattr("redone.bench.roofline.roofline", lambda *_: ROOF)
    one = sweep(place, nodes=(1, 2), repeats=1)
    out, every = place / "out", todo(place, one)
    open_folder(out, one)
    _run(out, one, every, LocalLauncher(out, one), serial=False)
    assert [state(out, one, p) for p in every] == ["done", "done", "failed"]
    (out / "points" / "healed").touch()
    _run(out, one, every, LocalLauncher(out, one), serial=False)
    assert [state(out, one, p) for p in every] == ["done", "done", "done"]
    ran = (out / "points" / "count").read_text().split()
    assert ran == ["base-n1-s0-r0", "strong-n2-s0-r0", "weak-n2-s0-r0", "weak-n2-s0-r0"]


def test_predictions_use_the_points_work(place: Path) -> None:
    def seconds(nodes: int, *overrides: str) -> float:
        cfg = load_config(place / "c.yaml", [f"cluster.gpus_per_node={nodes}", *overrides])
        machine = cpu_row(ROOF, nodes, 1)
        found = predict_cell(cfg, HF, machine=machine, nodes=nodes, prompt_tokens=30, response_tokens=10)
        assert found.seconds is not None and not found.refused
        return found.seconds.update

    bigger = ("algorithm.train_batch_size=32", "algorithm.ppo_mini_batch_size=16")
    assert seconds(1, *bigger) > seconds(1)
    found = predict_cell(
        load_config(place / "c.yaml"), HF, machine="abacus", nodes=1, prompt_tokens=9, response_tokens=9
    )
    assert found.seconds is None and "not in the planner's table" in found.refused
