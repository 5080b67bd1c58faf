"""Over-sampling: enough groups end the round, the rest is aborted, and no prompt is lost or counted twice."""

from __future__ import annotations

import asyncio
import random

import pytest

from redone.data.stream import PromptStream
from redone.errors import EngineError
from redone.rollout.collect import Collected, collect, first_enough
from tests.unit.test_collect import FakeFleet, FakeRewards, config, even_prompts_teach, ids, mixed, prompt

NEVER = 60.0  # seconds: a test that waits for it fails


class AbortableFleet(FakeFleet):
    """Notes which prompts were cancelled."""

    def __init__(self, delays=None, broken=None):
        super().__init__(delays, broken=broken)
        self.cancelled: list[int] = []

    async def generate(self, prompt_ids, sampling, seeds):
        try:
            return await super().generate(prompt_ids, sampling, seeds)
        except asyncio.CancelledError:
            self.cancelled.append(len(prompt_ids) - 1)
            raise


def slow(*which: int):
    return lambda i: NEVER if i in which else 0.0


def stream_of(n: int = 20) -> PromptStream:
    return PromptStream([prompt(i) for i in range(n)], seed=0, shuffle=False)


def step(stream, fleet, rule=mixed, **changes) -> Collected:
    return collect(stream, fleet, FakeRewards(rule), config(rollout__over_sampling=0.5, **changes), 1)


def asked(fleet) -> list[int]:
    return [i for i, _, _ in fleet.requests]


def test_the_long_tail_is_aborted_and_asked_for_again():
    stream, fleet = stream_of(), AbortableFleet(slow(1, 4))
    found = step(stream, fleet)
    assert ids(found.groups) == ["p00", "p02", "p03", "p05"]
    assert sorted(fleet.cancelled) == [1, 4]
    assert found.drops == ()
    assert found.metrics["rollout/aborted_groups"] == 2
    second = AbortableFleet()
    again = step(stream, second)
    assert asked(second) == [1, 4, 6, 7, 8, 9]
    assert ids(again.groups) == ["p01", "p04", "p06", "p07"]


def test_what_is_never_finished_is_dropped_the_second_time():
    stream = stream_of()
    step(stream, AbortableFleet(slow(1, 4)))
    found = step(stream, AbortableFleet(slow(1, 6)))
    assert [(d.prompt_id, d.reason) for d in found.drops] == [("p01", "aborted")]
    assert found.metrics["rollout/aborted_twice"] == 1
    third = AbortableFleet()
    step(stream, third)
    assert asked(third)[0] == 6 and 1 not in asked(third)


def test_uninformative_groups_do_not_end_the_round():
    """p01 and p03 teach nothing: p04, the slow one, is waited for."""
    fleet = AbortableFleet(lambda i: 0.05 if i == 4 else 0.0)
    found = step(stream_of(), fleet, even_prompts_teach, algorithm__train_batch_size=3)
    assert fleet.cancelled == []
    assert ids(found.groups) == ["p00", "p02", "p04"]
    assert [(d.prompt_id, d.reason) for d in found.drops] == [
        ("p01", "uninformative"),
        ("p03", "uninformative"),
    ]


def test_without_filter_no_more_than_a_batch_is_kept():
    found = step(stream_of(), AbortableFleet(), algorithm__filter_groups__enable=False)
    assert ids(found.groups) == ["p00", "p01", "p02", "p03"]
    assert [(d.prompt_id, d.reason) for d in found.drops] == [("p04", "surplus"), ("p05", "surplus")]


def test_an_engines_error_ends_the_round_as_itself():
    fleet = AbortableFleet(slow(0, 1, 3), broken=2)
    with pytest.raises(EngineError, match="the engine died"):
        step(stream_of(), fleet)
    assert sorted(fleet.cancelled) == [0, 1, 3]


def test_every_prompt_ends_once_or_is_in_the_stream():
    noise = random.Random(0)
    stream = stream_of(200)
    ended: list[str] = []
    drawn: set[int] = set()
    for _ in range(12):
        fleet = AbortableFleet(lambda i: 0.02 * noise.random())
        found = step(stream, fleet, even_prompts_teach)
        ended += [g.prompt.id for g in found.groups] + [d.prompt_id for d in found.drops]
        drawn |= set(asked(fleet))
    waiting = [name for _, name in stream.state_dict().get("returned", [])]
    assert len(ended + waiting) == len(set(ended + waiting))
    assert {f"p{i:02d}" for i in drawn} == set(ended + waiting)


def test_results_stand_in_the_order_of_the_work():
    async def late(value: int, seconds: float) -> int:
        await asyncio.sleep(seconds)
        return value

    async def run() -> list[int | None]:
        works = [late(1, 0.02), late(2, NEVER), late(3, 0.0), late(4, 0.01)]
        return await first_enough(works, lambda value: value != 4, 2)

    assert asyncio.run(run()) == [1, None, 3, 4]
