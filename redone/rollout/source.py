"""Where a step's groups come from: generated when the step asks for them, or ahead of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from redone.api import EngineFleet
from redone.config.schema import Config
from redone.data.stream import Drawn, PromptStream
from redone.reward.pool import RewardPool
from redone.rollout.collect import Collected, Drop, collect, collect_async
from redone.rollout.staleness import oldest_version, staleness_metrics


class Source(Protocol):
    def take(self, step: int) -> Collected:
        """The groups of rollout step `step`; waits for them."""

    def pushed(self, version: int) -> None:
        """All engines hold `version` now."""

    def state_dict(self) -> dict[str, Any]:
        """The prompt stream behind the last step that was taken: from here a run goes on."""


class InTurn:
    """Synchronous: engines generate while the trainer waits, and the other way round."""

    def __init__(
        self,
        stream: PromptStream,
        engines: EngineFleet,
        rewards: RewardPool,
        cfg: Config,
        stop_token_ids: Sequence[int],
    ) -> None:
        self._stream, self._engines, self._rewards, self._cfg = stream, engines, rewards, cfg
        self._stop_token_ids = stop_token_ids

    def take(self, step: int) -> Collected:
        return collect(self._stream, self._engines, self._rewards, self._cfg, step, self._stop_token_ids)

    def pushed(self, version: int) -> None:
        """Nothing waits for it."""

    def state_dict(self) -> dict[str, Any]:
        return self._stream.state_dict()


class StepPrompts:
    """The stream as one step sees it. What the step drew stays known, until the step is trained on."""

    def __init__(self, stream: PromptStream) -> None:
        self._stream = stream
        self.pending: list[Drawn] = []

    def take(self, n: int) -> list[Drawn]:
        drawn = self._stream.take(n)
        self.pending += drawn
        return drawn

    def give_back(self, drawn: Sequence[Drawn]) -> list[Drawn]:
        refused = self._stream.give_back(drawn)
        returned = {(epoch, prompt.id) for epoch, prompt in drawn if (epoch, prompt) not in refused}
        self.pending = [(e, p) for e, p in self.pending if (e, p.id) not in returned]
        return refused


class Ahead:
    """Asynchronous: a thread generates for later steps while the trainer works on this one.

    Step t begins when the engines hold version t - 1 - rollout.max_staleness: no token that it gets is
    older. Steps overlap, so the longest responses of one leave no engine idle.
    """

    def __init__(
        self,
        stream: PromptStream,
        engines: EngineFleet,
        rewards: RewardPool,
        cfg: Config,
        stop_token_ids: Sequence[int],
        done: int,
    ) -> None:
        """done: the last step that is trained; engines hold its version."""
        self._stream, self._engines, self._rewards, self._cfg = stream, engines, rewards, cfg
        self._stop_token_ids = tuple(stop_token_ids)
        self._next = done + 1  # the first step that has not begun
        self._steps: dict[int, tuple[StepPrompts, Future[Collected]]] = {}  # begun, not taken
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="generate-ahead", daemon=True)
        self._thread.start()
        self.pushed(done)

    def take(self, step: int) -> Collected:
        """Waits for the groups; what is staler than allowed is dropped and counted."""
        _, future = self._steps[step]
        ready = sum(one.done() for _, one in self._steps.values())
        collected = future.result()
        del self._steps[step]
        oldest = step - 1 - self._cfg.rollout.max_staleness
        stale = [group for group in collected.groups if oldest_version(group) < oldest]
        kept = tuple(group for group in collected.groups if oldest_version(group) >= oldest)
        metrics = staleness_metrics(kept, step - 1) | {
            "staleness/dropped_groups": float(len(stale)),
            "staleness/steps_ready": float(ready),  # when the trainer asked: 0 means that it had to wait
        }
        drops = [Drop(epoch=g.epoch, prompt_id=g.prompt.id, reason="stale") for g in stale]
        return replace(
            collected,
            groups=kept,
            drops=(*collected.drops, *drops),
            metrics=collected.metrics | metrics,
        )

    def pushed(self, version: int) -> None:
        """Let generation begin for the steps that may train on tokens of `version`."""
        rollout, last = self._cfg.rollout, self._cfg.algorithm.total_steps
        while self._next <= min(version + 1 + rollout.max_staleness, last):
            prompts = StepPrompts(self._stream)
            work = collect_async(
                prompts, self._engines, self._rewards, self._cfg, self._next, self._stop_token_ids
            )
            self._steps[self._next] = prompts, asyncio.run_coroutine_threadsafe(work, self._loop)
            self._next += 1

    def state_dict(self) -> dict[str, Any]:
        """What was drawn for steps that were not taken yet is drawn again by who goes on here."""

        async def read() -> dict[str, Any]:  # in the thread that draws
            return self._stream.state_dict([one for p, _ in self._steps.values() for one in p.pending])

        return asyncio.run_coroutine_threadsafe(read(), self._loop).result()

    def close(self) -> None:
        """Abort what is under way."""
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:  # cancels what is left at its end
            runner.run(self._wait())

    async def _wait(self) -> None:
        await self._ended.wait()


@contextmanager
def open_source(
    stream: PromptStream,
    engines: EngineFleet,
    rewards: RewardPool,
    cfg: Config,
    stop_token_ids: Sequence[int],
    done: int,
) -> Iterator[Source]:
    """The source that rollout.max_staleness asks for, after step `done`."""
    if cfg.rollout.max_staleness == 0:
        yield InTurn(stream, engines, rewards, cfg, stop_token_ids)
        return
    with engines.awake():  # all the time
        source = Ahead(stream, engines, rewards, cfg, stop_token_ids, done)
        try:
            yield source
        finally:
            source.close()
