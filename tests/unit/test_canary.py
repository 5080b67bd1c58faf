"""What the canary does about a difference: a fault ends the run, a tie between experts asks again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from redone.cluster.canary import MAX_TIES, Canary
from redone.config.schema import Config
from redone.errors import SyncError
from redone.types import Batch, CanaryReading, FloatArray
from redone.weights.layers import attention_point, gate_point, mlp_point, point_names

VOCAB, HIDDEN = 64, 4


def config() -> Config:
    return Config.model_validate(
        {
            "model": {"path": "unused"},
            "data": {"train": ["unused"]},
            "rewards": {"default": {"family": "exact"}},
            "weights": {"canary": {"prompts": 2, "length": 5, "tolerance": 1e-3}},
        }
    )


class Sides:
    """Trainer and engine in one. For the first `wrong` sets of sequences the first prompts differ at the last
    token, behind layer 1's experts; `margin` is by how much these were chosen. `stale`: it is what engines
    write behind the probe instead, and their cache holds keys and values of older weights."""

    def __init__(self, wrong: int, margin: float, stale: bool = False) -> None:
        self.wrong, self.margin, self.stale = wrong, margin, stale
        self.asked: list[Sequence[Sequence[int]]] = []

    def canary(self, sequences: Sequence[Sequence[int]], probe: Sequence[int]) -> list[CanaryReading]:
        self.asked.append(sequences)
        scores = [np.full(len(s) - 1, -1.0, np.float32) for s in sequences]
        written = np.full(4, -1.0, np.float32)
        if len(self.asked) <= self.wrong:
            (written if self.stale else scores[0])[-1] -= 0.1
        return [CanaryReading(scores=tuple(scores), probe_ids=np.zeros(4, np.int32), probe_logprobs=written)]

    def logprobs(self, batch: Batch, *, temperature: float) -> list[list[FloatArray]]:
        return [[np.full(len(t.token_ids), -1.0, np.float32) for t in g.trajectories] for g in batch.groups]

    def streams(self, *asked: object) -> Mapping[str, FloatArray]:
        """Of the trainer (a batch) or an engine (its number, sequence, cached)."""
        found = {p: np.ones((5, HIDDEN), np.float32) for p in point_names(2)}
        if len(asked) == 1:
            return found | {gate_point(1): np.full((5, 1), self.margin, np.float32)}
        found[mlp_point(1)][-1] += 1
        if self.stale and asked[2]:
            found[attention_point(0)][-1] += 1
        return found


def check(sides: Sides) -> dict[str, float]:
    return Canary.of(config(), VOCAB).check(sides, sides, version=3)  # type: ignore[arg-type]


def test_agreement_is_one_set_of_sequences() -> None:
    sides = Sides(wrong=0, margin=1e-7)
    assert check(sides)["sync/canary_ties"] == 0 and len(sides.asked) == 1


def test_a_tie_asks_other_sequences() -> None:
    sides = Sides(wrong=2, margin=1e-7)
    assert check(sides)["sync/canary_ties"] == 2
    assert len({str(s) for s in sides.asked}) == 3


def test_a_fault_ends_the_run_at_once() -> None:
    sides = Sides(wrong=1, margin=0.2)
    with pytest.raises(SyncError, match=r"version 3.* model.layers.1, MLP") as caught:
        check(sides)
    assert "tie" not in str(caught.value) and len(sides.asked) == 1


def test_a_tie_does_not_excuse_a_stale_cache() -> None:
    sides = Sides(wrong=1, margin=1e-7, stale=True)
    with pytest.raises(SyncError, match=r"first diverging layer is model.layers.0, attention"):
        check(sides)
    assert len(sides.asked) == 1


def test_ties_without_end_are_an_error_that_says_so() -> None:
    sides = Sides(wrong=99, margin=1e-7)
    with pytest.raises(SyncError, match="a tie that rounding decides"):
        check(sides)
    assert len(sides.asked) == MAX_TIES + 1
