"""The tiny run learns whatever the seed (0 is in test_tiny_run.py), with AsyncLLM and other layouts."""

from __future__ import annotations

import pytest

from .conftest import Workplace

CASES = {
    "seed1": ["run.seed=1"],
    "seed2": ["run.seed=2"],
    "async": ["rollout.engine.in_process=false"],
    "tp2-ep2": ["cluster.gpus_per_node=4", "trainer.parallel.tensor=2"],
    "pp2": ["trainer.parallel.expert=1", "trainer.parallel.pipeline=2", "trainer.recompute=full"],
}


EXTRA = ("async", "pp2")  # make test-full has no time for them


@pytest.mark.slow
@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.extra] * (c in EXTRA)) for c in CASES])
def test_tiny_run_learns(workplace: Workplace, case: str) -> None:
    done = workplace.redone(
        *workplace.run_args(f"seeds-{case}", "evaluate.every=0", "checkpoint.every=0", *CASES[case]),
        timeout_s=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = [m for m in workplace.metrics(f"seeds-{case}") if m["step"] > 0]
    assert len(steps) == 15
    assert steps[0]["reward/mean"] < 0.05
    assert steps[-1]["reward/mean"] > 0.4
    assert max(m["sync/canary_max_abs_diff"] for m in steps) <= 1e-4
