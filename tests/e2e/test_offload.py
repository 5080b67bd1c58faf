"""Devices in turn, weights by broadcast: the run is the plain one, token for token."""

from __future__ import annotations

import pytest

from .conftest import Workplace

pytestmark = [pytest.mark.slow, pytest.mark.extra]

WALL = ("time", "timing_s/", "perf/", "memory/", "reward_latency/", "sync/publish_s")


def test_turns_and_broadcast_change_nothing(workplace: Workplace) -> None:
    quiet = ("algorithm.total_steps=3", "evaluate.every=0")
    turns = ("trainer.offload=true", "weights.channel=collective", "checkpoint.every=2")
    found = {}
    for name, overrides in {"plain": (), "turns": turns}.items():
        done = workplace.redone(*workplace.run_args(name, *quiet, *overrides), timeout_s=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        samples = (workplace.root / name / "samples.jsonl").read_text()
        kept = [{k: v for k, v in m.items() if not k.startswith(WALL)} for m in workplace.metrics(name)]
        found[name] = samples, kept
    assert found["plain"] == found["turns"]
    for m in workplace.metrics("turns")[1:]:
        for phase in ("rollout", "update", "weight_update"):
            before, peak = m[f"memory/{phase}_before_gb"], m[f"memory/{phase}_peak_gb"]
            assert before > 0 and peak > 0 and m[f"memory/{phase}_after_gb"] > 0
    assert not [k for m in workplace.metrics("plain") for k in m if k.startswith("memory/")]
