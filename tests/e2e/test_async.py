"""Asynchronous mode and over-sampling on the tiny mixture of experts, through the command line."""

from __future__ import annotations

import math
import signal

import pytest

from .conftest import Workplace
from .test_tiny_run import our_processes, wait_for_step

pytestmark = [pytest.mark.slow, pytest.mark.extra]  # eight minutes

STEPS = 15
AHEAD = ("rollout.max_staleness=1", "algorithm.importance.level=token")
QUIET = ("evaluate.every=0", "checkpoint.every=5", f"algorithm.total_steps={STEPS}")


def learn(place: Workplace, name: str, *overrides: str) -> list[dict[str, float]]:
    done = place.redone(*place.run_args(name, *QUIET, *overrides), timeout_s=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    audited = place.redone("data", "audit", str(place.root / name))
    assert audited.returncode == 0, audited.stdout + audited.stderr
    steps = [m for m in place.metrics(name) if m["step"] > 0]
    assert [m["step"] for m in steps] == list(range(1, STEPS + 1))
    for m in steps:
        assert m["sync/canary_max_abs_diff"] <= 1e-4
        assert all(math.isfinite(v) for v in m.values() if isinstance(v, float))
    assert our_processes(place.root / name) == []
    return steps


def final_reward(steps: list[dict[str, float]]) -> float:
    return sum(m["reward/mean"] for m in steps[-3:]) / 3


def test_asynchronous_reaches_the_synchronous_reward(workplace: Workplace) -> None:
    synchronous = learn(workplace, "sync")
    ahead = learn(workplace, "ahead", *AHEAD)
    assert final_reward(ahead) > final_reward(synchronous) - 0.15
    for m in ahead:
        assert m["staleness/max"] <= 1 and m["staleness/dropped_groups"] == 0
        assert m["actor/importance_weight_max"] > 0
    assert max(m["staleness/mean"] for m in ahead) > 0, "generation was never ahead"
    assert not [name for name in synchronous[0] if name.startswith("staleness/")]


def test_a_killed_asynchronous_run_goes_on(workplace: Workplace) -> None:
    process = workplace.start(*workplace.run_args("ahead-killed", *QUIET, *AHEAD))
    wait_for_step(workplace, "ahead-killed", 7, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = workplace.root / "ahead-killed"
    resumed = workplace.redone("run", "--resume", str(folder), timeout_s=900)
    assert resumed.returncode == 0, resumed.stdout[-3000:] + resumed.stderr[-3000:]
    assert workplace.redone("data", "audit", str(folder)).returncode == 0
    steps = [m for m in workplace.metrics("ahead-killed") if m["step"] > 0]
    assert [m["step"] for m in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["reward/mean"] > 0.4


def test_over_sampling_aborts_and_loses_nothing(workplace: Workplace) -> None:
    steps = learn(workplace, "over", "rollout.over_sampling=0.5")
    assert sum(m["rollout/aborted_groups"] for m in steps) > 0
    assert steps[-1]["reward/mean"] > 0.4
