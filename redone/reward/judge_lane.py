"""The judge as a reward: it waits for a server instead of computing, so a thread with a loop serves it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from redone.config.schema import JudgeReward
from redone.errors import JudgeError
from redone.reward.base import failed, make_score
from redone.reward.chat import ChatClient, connect
from redone.reward.judge import JudgeItem, LlmJudge
from redone.reward.lane import Job, Latency
from redone.reward.worker import Task, completion_of
from redone.types import Score


class JudgeLane:
    """submit(), take_latency(), close() as reward.lane.Lane. Latency includes waiting for `concurrency`.

    A judge that is down fails every response (dropped and counted); the run stops by its own share of them.
    """

    def __init__(self, config: JudgeReward) -> None:
        """Raises ConfigError when the rubric, the cache or the key cannot be used."""
        self._config = config
        deadline_s = min(config.deadline_s, config.timeout_s)
        self.judge = LlmJudge(config.model_copy(update={"deadline_s": deadline_s}))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._client: asyncio.Future[ChatClient] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()
        self._latency = Latency()

    def submit(self, jobs: Sequence[Job]) -> None:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._client = self._loop.create_future()
            self._thread = threading.Thread(target=self._run, daemon=True, name="reward-judge")
            self._thread.start()
        self._loop.call_soon_threadsafe(self._start, jobs)

    def take_latency(self) -> Latency:
        with self._lock:
            found, self._latency = self._latency, Latency()
        found.counts = self.judge.counts()
        return found

    def close(self) -> None:
        if self._loop is not None and self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _run(self) -> None:
        assert self._loop is not None
        loop = self._loop
        asyncio.set_event_loop(loop)
        connection = connect(self._config, self.judge.traffic)
        assert self._client is not None
        self._client.set_result(loop.run_until_complete(connection.__aenter__()))
        try:
            loop.run_forever()
        finally:
            for task in self._tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
            loop.run_until_complete(connection.__aexit__(None, None, None))
            loop.close()

    def _start(self, jobs: Sequence[Job]) -> None:
        assert self._loop is not None
        for job in jobs:
            task = self._loop.create_task(self._serve(job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, job: Job) -> None:
        start = time.perf_counter()
        score = await self._score(job.task)
        with self._lock:
            self._latency.seconds.append(time.perf_counter() - start)
            self._latency.failed += score.status == "error"
        with suppress(RuntimeError):  # closed: nobody waits any more
            job.group.loop.call_soon_threadsafe(job.group.put, job.index, score)

    async def _score(self, task: Task) -> Score:
        _, prompt, _, finish = task
        if self._config.require_stop and finish != "stop":
            return make_score(0.0, self._config, detail=f"not finished ({finish})")
        assert self._client is not None
        item = JudgeItem(prompt=prompt, completion=completion_of(task))
        try:
            (found,) = await self.judge.score_with(await self._client, [item])
        except JudgeError as error:
            return failed(str(error))
        if found.score is None:
            return failed(f"judge: {found.status}: {found.detail}")
        return make_score(found.score, self._config, parts=found.parts, detail=found.detail)
