"""trainer.offload: nothing changes in what is learned, and the memory really goes."""

from __future__ import annotations

import pytest
from cases import ASLEEP, marks
from ranks import Group

NAMES = [pytest.param(ranks, name, id=name, marks=marks(ranks)) for name, (ranks, _) in ASLEEP.items()]


@pytest.mark.parametrize(("group", "name"), NAMES, indirect=["group"])
def test_a_trainer_that_sleeps_learns_the_same(group: Group, name: str) -> None:
    """Bit-equal weights, log-probabilities and metrics; checkpoint and publication in its sleep."""
    result = group[f"sleeping {name}"]
    assert result["differing"] == [] and result["logprobs"] == 0.0
    assert result["metrics"][0] == result["metrics"][1]
    assert result["held"] == ["none"] * 3 and result["published"]


@pytest.mark.parametrize(("group", "name"), NAMES, indirect=["group"])
def test_its_states_leave_and_return(group: Group, name: str) -> None:
    result = group[f"sleeping {name}"]
    parts = result["parts"]
    assert all(size > 0 for size in parts.values())
    per_weight = 2 if name.startswith("bf16") else 4
    assert parts["gradients"] == parts["weights"] * 4 // per_weight
    # two moments, and a master copy of bf16 weights (in fp32 the weights are their own), on one rank of two
    rows = [result["states"][i : i + 4] for i in range(0, len(result["states"]), 4)]
    for step, (asleep, awake, updated, weights) in enumerate(rows):
        assert asleep == 0 and weights == parts["weights"]
        assert updated == sum(parts.values())
        if step:
            assert awake == updated
