"""The three stages whole, on the tiny model: every node real, in one set of processes."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import REPO, Workplace
from .test_tiny_run import our_processes

TINY = REPO / "configs" / "tiny" / "pipeline.yaml"
Made = tuple[Workplace, subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.slow


def args(place: Workplace, name: str, *overrides: str) -> list[str]:
    return ["run", str(TINY), f"run.dir={place.root}", f"run.name={name}", *overrides]


def nodes(root: Path) -> dict[str, dict[str, Any]]:
    """name -> node.json of every finished node that is current."""
    current = json.loads((root / "current.json").read_text())
    return {name: json.loads((root / place / "node.json").read_text()) for name, place in current.items()}


def folder(root: Path, name: str) -> Path:
    return root / str(json.loads((root / "current.json").read_text())[name])


def metrics(root: Path, name: str) -> list[dict[str, float]]:
    lines = (folder(root, name) / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def made(workplace: Workplace) -> Made:
    done = workplace.redone(*args(workplace, "stages"), timeout_s=590)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return workplace, done


def test_every_node_is_finished_and_says_what_it_did(made: Made) -> None:
    place, done = made
    root = place.root / "stages"
    found = nodes(root)
    assert set(found) == {
        "explore_data", "explore", "evaluate_base", "evaluate_explore", "probe_base", "probe_explore",
        "diagnose", "sft_set", "soft_labels", "target", "evaluate_target", "probe_target",
        "refine_data", "refine", "evaluate_refine",
    }  # fmt: skip
    assert found["explore_data"]["facts"]["rows"] == 96
    assert "first" in found["diagnose"]["facts"]["failing"]
    assert found["soft_labels"]["facts"]["labels"] > 0
    assert found["refine_data"]["facts"]["rows"] >= 16
    for name in ("diagnosis.json", "diagnosis.html"):
        assert (folder(root, "diagnose") / name).stat().st_size > 0
    assert "held-out results" in done.stdout and "mean (sns)" in done.stdout
    assert (root / "results.html").stat().st_size > 0
    assert our_processes(root) == []


def test_supervised_loss_falls_and_targeted_tasks_are_learned(made: Made) -> None:
    place, _ = made
    root = place.root / "stages"
    losses = [m["sft/loss"] for m in metrics(root, "target") if "sft/loss" in m]
    assert losses[-1] < 0.7 * losses[0]
    rates = [m["actor/lr"] for m in metrics(root, "target") if "actor/lr" in m]
    assert max(rates) == pytest.approx(2e-3) and rates[-1] < 0.2 * max(rates)
    results = json.loads((root / "results.json").read_text())
    assert results["macros"]["all"]["target"]["score"] > results["macros"]["all"]["base"]["score"]


def test_refinement_is_accepted_only_if_validation_did_not_fall(made: Made) -> None:
    place, _ = made
    found = nodes(place.root / "stages")
    facts = found["refine"]["facts"]
    assert facts["accepted"] == (facts["val"] >= facts["val_before"])
    same = found["refine"]["outputs"]["model"]["path"] == found["target"]["outputs"]["model"]["path"]
    assert same != facts["accepted"]


def test_ledgers_are_clean(made: Made) -> None:
    place, _ = made
    audit = place.redone("data", "audit", str(place.root / "stages"))
    assert audit.returncode == 0, audit.stdout
    assert audit.stdout.count("0 problems") >= 9


def test_running_again_makes_nothing_and_starts_nothing(made: Made) -> None:
    place, _ = made
    before = nodes(place.root / "stages")
    again = place.redone(*args(place, "stages"), timeout_s=120)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count(" kept") == len(before) and "starting Ray" not in again.stdout
    assert nodes(place.root / "stages") == before


def answers(root: Path, name: str, file: str) -> list[dict[str, Any]]:
    """Of a node, or of the one whose answers it took over."""
    path = folder(root, name) / file
    if "answers" in (outputs := nodes(root)[name]["outputs"]):
        path = root / outputs["answers"]["path"]
    return [json.loads(line) for line in path.read_text().splitlines()]


def close(one: dict[str, float], other: dict[str, float]) -> None:
    """Every metric of a step that is not a duration is the same."""
    timed = ("timing_s/", "perf/", "reward_latency/")
    keys, others = (
        {k for k in m if not k.startswith(timed) and not k.endswith("_s") and k != "time"}
        for m in (one, other)
    )
    assert keys == others
    for key in keys - {k for k in keys if k.startswith(("sync/canary", "parity/"))}:
        assert other[key] == pytest.approx(one[key], abs=1e-6, rel=1e-5), (one["step"], key)


def same_run(root: Path, other: Path, name: str) -> None:
    whole, cut = ({m["step"]: m for m in metrics(r, name)} for r in (root, other))
    assert sorted(whole) == sorted(cut)
    for step in whole:
        close(whole[step], cut[step])
    texts = [(folder(r, name) / "run" / "ledger.jsonl").read_text() for r in (root, other)]
    assert texts[0] == texts[1]


def lines_of(root: Path, pattern: str) -> int:
    found = list((root / "nodes").glob(pattern))
    return len(found[0].read_text().splitlines()) if found else 0


# node -> when to kill: enough of it is done, and something is left
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "explore": lambda root: lines_of(root, "explore-*/run/metrics.jsonl") >= 4,
    "soft_labels": lambda root: lines_of(root, "soft_labels-*/candidates.jsonl") >= 2,
    "target": lambda root: lines_of(root, "target-*/run/metrics.jsonl") >= 4,
    "refine": lambda root: lines_of(root, "refine-*/run/metrics.jsonl") >= 2,
}


@pytest.mark.extra  # five minutes
def test_killed_in_every_stage_equals_the_uninterrupted_pipeline(made: Made) -> None:
    """SIGKILL in explore, soft labels, target and refine, one after the other, each time gone on with."""
    place, _ = made
    whole, cut = place.root / "stages", place.root / "killed"
    command = args(place, "killed")
    for node, reached in MOMENTS.items():
        process = place.start(*command)
        deadline = time.monotonic() + 400
        while not reached(cut):
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() < deadline, f"{node} was not reached"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not list((cut / "nodes").glob(f"{node}-*/node.json")), f"the kill in {node} came too late"
        command = ["run", "--resume", str(cut)]
    resumed = place.redone(*command, timeout_s=590)
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    before, after = nodes(whole), nodes(cut)
    assert {n: d["inputs"].keys() for n, d in after.items()} == {
        n: d["inputs"].keys() for n, d in before.items()
    }
    for node in ("explore_data", "sft_set", "soft_labels", "refine_data"):
        assert after[node]["outputs"] == before[node]["outputs"], node
    for node, file in (
        *((n, "answers.jsonl") for n in before if n.startswith(("evaluate", "probe"))),
        ("soft_labels", "candidates.jsonl"),
    ):
        assert answers(cut, node, file) == answers(whole, node, file), node
    for run in ("explore", "target", "refine"):
        same_run(whole, cut, run)
    assert place.redone("data", "audit", str(cut)).returncode == 0
    assert our_processes(cut) == []


def test_one_changed_input_runs_exactly_its_dependents(made: Made) -> None:
    place, _ = made
    changed = "pipeline.nodes.soft_labels.threshold=0.05"
    again = place.redone(*args(place, "stages", changed), timeout_s=590)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    ran = {line.split()[2] for line in again.stdout.splitlines() if " running" in line}
    assert "soft_labels" in ran
    assert ran <= {"soft_labels", "target", "evaluate_target", "probe_target", "refine_data", "refine",
                   "evaluate_refine"}  # fmt: skip
    taken_back = place.redone(*args(place, "stages"), timeout_s=120)
    assert " running" not in taken_back.stdout


def test_the_ablation_adds_its_rows_and_keeps_what_is_finished(made: Made) -> None:
    place, _ = made
    root = place.root / "stages"
    optim = "{lr: 2.0e-3, lr_warmup_ratio: 0.1, lr_decay_style: cosine}"
    test_rows = place.assets / "tiny-pipeline" / "test.jsonl"
    done = place.redone(
        "ablate", *args(place, "stages")[1:],
        "pipeline.nodes.sft_only={kind: sft, data: [sft_set, soft_labels], overrides: {trainer.optim: "
        f"{optim}, evaluate: {{keep_best: false, every: 0}}}}}}",
        f"pipeline.nodes.evaluate_sft={{kind: evaluate, model: sft_only, data: ['{test_rows}']}}",
        "pipeline.ablation={base: evaluate_base, SFT only: evaluate_sft, EL: evaluate_explore,"
        " EL+TFT: evaluate_target, EL+TFT+RL: evaluate_refine}",
        timeout_s=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    ran = {line.split()[2] for line in done.stdout.splitlines() if " running" in line}
    assert ran == {"sft_only", "evaluate_sft"}
    found = json.loads((root / "ablation.json").read_text())
    assert list(found["macros"]["all"]) == ["base", "SFT only", "EL", "EL+TFT", "EL+TFT+RL"]
    scores = {row: entry["score"] for row, entry in found["macros"]["all"].items()}
    assert scores["SFT only"] > scores["base"]
    assert all(row in done.stdout for row in scores)


def test_an_empty_failure_bucket_skips_the_target_or_stops(made: Made) -> None:
    place, _ = made
    nothing = "pipeline.nodes.diagnose.fail_below=0"
    quiet = ["pipeline.nodes.diagnose.regression=1", "pipeline.nodes.diagnose.constant_fails=false"]
    done = place.redone(*args(place, "stages", nothing, *quiet), "--until", "target", timeout_s=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "failing none" in done.stdout
    assert "nothing to train on" in done.stdout and "skipped" in done.stdout
    found = nodes(place.root / "stages")
    assert found["target"]["outputs"]["model"]["digest"] == found["explore"]["outputs"]["model"]["digest"]
    stop = "pipeline.nodes.diagnose.on_empty=error"
    done = place.redone(*args(place, "stages", nothing, stop, *quiet), "--until", "target", timeout_s=300)
    assert done.returncode == 2 and "no task fails" in done.stderr


def test_a_judge_that_is_down_stops_and_keeps_the_candidates(made: Made) -> None:
    place, _ = made
    judge = (
        "pipeline.nodes.soft_labels.judge="
        "{type: llm, base_url: 'http://127.0.0.1:9/v1', model: none, retries: 1, backoff_s: 0.1}"
    )
    labelled = (place.root / "stages" / "nodes").glob
    before = set(labelled("soft_labels-*/candidates.jsonl"))
    done = place.redone(*args(place, "stages", judge), timeout_s=300)
    assert done.returncode == 2, done.stdout[-3000:] + done.stderr[-3000:]
    assert "127.0.0.1:9" in done.stderr and "--resume" in done.stderr
    after = set(labelled("soft_labels-*/candidates.jsonl"))
    assert len(after - before) == 1 and before < after
    assert len({f.read_text().count("\n") for f in after}) == 1
