"""Asynchronous mode, with fakes of our own interfaces: bounds, accounting, resume, an end without remains."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redone.config.schema import Config
from redone.data.ledger import Ledger, audit
from redone.data.stream import PromptStream
from redone.errors import EngineError, TrainerError
from redone.pipeline.folder import RunFolder
from redone.pipeline.train import RlRun
from redone.rollout.source import Ahead, open_source
from redone.types import Batch, Completion, UpdateReport, VersionSpan
from tests.unit.test_collect import FakeRewards, config, even_prompts_teach, mixed, prompt

BATCH = 4


class Fleet:
    """Answers with the versions of the moment; prompts of `held` wait until they are released."""

    def __init__(self, held: Sequence[int] = ()) -> None:
        self.version = 0
        self.asked: list[int] = []
        self.cancelled: list[int] = []
        self.held = set(held)
        self.broken: int | None = None
        self.awake_depth = 0

    @contextmanager
    def awake(self, what: str = "all") -> Iterator[None]:
        self.awake_depth += 1
        yield
        self.awake_depth -= 1

    async def generate(self, prompt_ids: Any, sampling: Any, seeds: Sequence[int]) -> list[Completion]:
        i, first = len(prompt_ids) - 1, self.version
        self.asked.append(i)
        try:
            await asyncio.sleep(0.001)
            while i in self.held:
                await asyncio.sleep(0.001)
        except asyncio.CancelledError:
            self.cancelled.append(i)
            raise
        if i == self.broken:
            raise EngineError("the engine died")
        spans = (
            VersionSpan(version=first, start=0, end=1),
            VersionSpan(version=self.version, start=1, end=4),
        )
        return [
            Completion(
                token_ids=np.full(4, 7, np.int32),
                text=f"{i}/{sample}",
                logprobs=np.full(4, -0.5, np.float32),
                finish="stop",
                versions=spans,
            )
            for sample, _ in enumerate(seeds)
        ]


def settings(ahead: int, **changes: Any) -> Config:
    return config(
        rollout__max_staleness=ahead,
        algorithm__importance={"level": "token"},
        algorithm__train_batch_size=BATCH,
        **{"algorithm__total_steps": 6, **changes},
    )


def stream_of(n: int = 100) -> PromptStream:
    return PromptStream([prompt(i) for i in range(n)], seed=0, shuffle=False)


@contextmanager
def ahead(fleet: Fleet, cfg: Config, stream: PromptStream | None = None, done: int = 0) -> Iterator[Ahead]:
    source = Ahead(stream or stream_of(), fleet, FakeRewards(mixed), cfg, (), done)  # type: ignore[arg-type]
    try:
        yield source
    finally:
        fleet.held.clear()
        source.close()


def eventually(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it never came true")


@pytest.mark.parametrize("k", [1, 2])
def test_a_step_begins_when_its_tokens_cannot_become_too_old(k: int) -> None:
    fleet = Fleet(held=range(100))
    with ahead(fleet, settings(k)) as source:
        eventually(lambda: len(fleet.asked) == BATCH * (k + 1))
        threading.Event().wait(0.05)
        assert sorted(fleet.asked) == list(range(BATCH * (k + 1))), "step k + 2 must wait for version 1"
        source.pushed(1)
        eventually(lambda: sorted(fleet.asked) == list(range(BATCH * (k + 2))))


def test_later_steps_are_generated_while_one_is_trained() -> None:
    fleet = Fleet(held=range(BATCH, 100))
    with ahead(fleet, settings(1)) as source:
        first = source.take(1)  # step 2 is under way
        assert [g.prompt.id for g in first.groups] == ["p00", "p01", "p02", "p03"]
        assert first.metrics["staleness/max"] == 0 and first.metrics["staleness/steps_ready"] <= 1
        fleet.version = 1  # the weights change in mid-generation
        source.pushed(1)
        fleet.held.clear()
        second = source.take(2)
    assert second.metrics["staleness/mixed_share"] == 1.0
    assert second.metrics["staleness/max"] == 1.0
    assert second.metrics["staleness/behind_1"] == 0.25 and second.metrics["staleness/behind_0"] == 0.75
    assert second.metrics["staleness/mean"] == 0.25
    assert second.metrics["staleness/dropped_groups"] == 0 and second.drops == ()


def test_tokens_that_are_too_old_are_dropped_and_counted() -> None:
    """An engine that lags (it never took the updates): rule 2, the trainer refuses them."""
    fleet = Fleet()
    with ahead(fleet, settings(1)) as source:
        for step in (1, 2):
            assert len(source.take(step).groups) == BATCH
            source.pushed(step)
        found = source.take(3)
    assert found.groups == ()
    assert {drop.reason for drop in found.drops} == {"stale"} and len(found.drops) == BATCH
    assert found.metrics["staleness/dropped_groups"] == BATCH


def test_an_error_while_generating_reaches_its_step() -> None:
    fleet = Fleet()
    fleet.broken = BATCH + 1
    with ahead(fleet, settings(1)) as source:
        assert len(source.take(1).groups) == BATCH
        with pytest.raises(EngineError, match="the engine died"):
            source.take(2)


def test_the_end_aborts_what_is_under_way() -> None:
    fleet, cfg = Fleet(held=range(100)), settings(1)
    with pytest.raises(TrainerError), open_source(stream_of(), fleet, FakeRewards(mixed), cfg, (), 0):  # type: ignore[arg-type]
        eventually(lambda: len(fleet.asked) == 2 * BATCH)
        assert fleet.awake_depth == 1
        raise TrainerError("a rank died")
    assert sorted(fleet.cancelled) == list(range(2 * BATCH))
    assert not [t for t in threading.enumerate() if t.name == "generate-ahead"]


def test_what_goes_on_later_draws_the_unfinished_prompts_again() -> None:
    stream, fleet = stream_of(), Fleet(held=[5, 6])
    with ahead(fleet, settings(1), stream) as source:
        source.take(1)
        source.pushed(1)
        eventually(lambda: len(fleet.asked) == 3 * BATCH)
        state = source.state_dict()
    again = stream_of()
    again.load_state_dict(state)
    assert [p.id for _, p in again.take(10)] == [f"p{i:02d}" for i in range(BATCH, BATCH + 10)]


class Trainer:
    """Trains nothing; pushing gives the fleet its version."""

    def __init__(self, dies_at: int = 0) -> None:
        self.dies_at = dies_at
        self.stale: list[int] = []

    def memory(self) -> dict[str, float]:
        return {}

    @contextmanager
    def awake(self, what: str = "all") -> Iterator[None]:
        yield

    def score_old(self, batch: Batch) -> Batch:
        return batch.with_logprobs(
            "old_logprobs", [[np.full(4, -0.6, np.float32) for _ in g.trajectories] for g in batch.groups]
        )

    def update(self, part: Batch, algorithm: Any, step: int) -> UpdateReport:
        if step == self.dies_at:
            raise TrainerError("killed")
        for group in part.groups:
            assert all(t.old_logprobs is not None for t in group.trajectories)
            self.stale += [step - 1 - t.version for t in group.trajectories]
        return UpdateReport(loss=0.0, grad_norm=1.0, lr=1e-3, skipped=False, metrics={})

    def push(self, engines: Any, version: int) -> dict[str, float]:
        engines.version = version
        return {}

    def save(self, path: str) -> None:
        Path(path).mkdir()

    def load(self, path: str) -> None:
        assert Path(path).is_dir()


class Silent:
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield

    def step(self, step: int, metrics: Any) -> None:
        self.metrics.append(dict(metrics))

    def samples(self, step: int, groups: Any) -> None: ...

    def note(self, message: str) -> None: ...


def make_run(cfg: Config, folder: RunFolder, trainer: Trainer, ledger: Ledger) -> RlRun:
    return RlRun(
        cfg=cfg, folder=folder, trainer=trainer, engines=Fleet(), rewards=FakeRewards(even_prompts_teach),
        stream=stream_of(), val=(), test=(), stop_token_ids=(), ledger=ledger, observer=Silent(),
    )  # type: ignore[arg-type]  # fmt: skip


def booked(path: Path) -> list[str]:
    return [line.split('"prompt": "')[1].split('"')[0] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("over_sampling", [0.0, 0.5])
def test_a_killed_run_goes_on_and_every_prompt_is_booked_once(
    tmp_path: Path, k: int, over_sampling: float
) -> None:
    cfg = settings(
        k, run={"dir": str(tmp_path), "name": "r"}, checkpoint={"every": 2}, algorithm__total_steps=8,
        rollout__over_sampling=over_sampling, evaluate={"keep_best": False, "every": 0},
    )  # fmt: skip
    folder, path = RunFolder.create(cfg), tmp_path / "r" / "ledger.jsonl"
    first = Trainer(dies_at=6)
    ledger = Ledger(path)
    with pytest.raises(TrainerError, match="killed"):
        make_run(cfg, folder, first, ledger).loop()
    ledger.close()
    state = folder.load_state(4)
    folder.rewind(state)
    assert audit(path) == []
    second = Trainer()
    run = make_run(cfg, folder, second, Ledger(path))
    run.go_on(state)
    run.loop()
    assert run.last_step == 8
    assert audit(path) == []
    assert max(first.stale + second.stale) <= k
    if k == 3:
        assert max(first.stale + second.stale) > 1, "generation was never ahead"
    trained = sum('"trained"' in line for line in path.read_text().splitlines())
    assert trained == 8 * BATCH
    names = booked(path)
    rest = run.stream.state_dict(
        [one for prompts, _ in getattr(run.source, "_steps", {}).values() for one in prompts.pending]
    ).get("returned", [])
    every = sorted(names + [name for _, name in rest])
    assert every == [f"p{i:02d}" for i in range(len(every))], "a prompt was lost, or drawn twice"
