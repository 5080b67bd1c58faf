"""An engine that must be stepped, driven by one thread: every call and every step is a task of its queue.

Requests that arrive while a step runs are all added before the next one, so concurrent callers are batched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from redone.errors import EngineError


class StepEngine(Protocol):
    """The part of vLLM's LLMEngine that the loop itself needs."""

    def add_request(self, request_id: str, prompt: Any, params: Any) -> Any: ...

    def abort_request(self, request_ids: list[str]) -> None: ...

    def step(self) -> list[Any]: ...


class LoopThread:
    """Owns the engine from construction on: no other thread touches it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine-loop")
        self._engine: Any = None
        self._waiting: dict[str, Future[Any]] = {}
        self._paused = self._stepping = False
        self._died: BaseException | None = None

    async def start(self, build: Callable[[], StepEngine]) -> None:
        """Build the engine in the thread."""
        self._engine = await self._do(build)

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """One method of the engine, between two steps."""
        return await self._do(getattr(self._alive(), method), *args, **kwargs)

    async def run(self, requests: Sequence[tuple[str, Any, Any]]) -> list[Any]:
        """Add (id, prompt, params) requests together and wait for their final outputs, in order."""
        futures = [Future[Any]() for _ in requests]
        for future in futures:
            # A running future cannot be cancelled by its waiter, so its result can always be set.
            future.set_running_or_notify_cancel()
        try:
            await self._do(self._add, requests, futures)
            return await asyncio.gather(*map(asyncio.wrap_future, futures))
        finally:
            left = [request_id for request_id, _, _ in requests if request_id in self._waiting]
            if left and self._engine is not None:
                await self._do(self._abort, left)

    async def set_paused(self, paused: bool) -> None:
        """While paused nothing is stepped; requests wait where they are."""
        await self._do(self._set_paused, paused)

    def close(self) -> Any:
        """End the thread, fail what still waits; returns the engine (None the second time)."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._fail_waiting("the engine was closed")
        engine, self._engine = self._engine, None
        return engine

    async def _do(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return await asyncio.wrap_future(self._thread.submit(function, *args, **kwargs))

    def _alive(self) -> Any:
        if self._died is not None:
            raise EngineError(f"the engine's loop died: {self._died!r}")
        if self._engine is None:
            raise EngineError("the engine is not running; call start")
        return self._engine

    def _add(self, requests: Sequence[tuple[str, Any, Any]], futures: Sequence[Future[Any]]) -> None:
        for (request_id, prompt, params), future in zip(requests, futures, strict=True):
            self._alive().add_request(request_id, prompt, params)
            self._waiting[request_id] = future
        self._schedule_step()

    def _abort(self, request_ids: list[str]) -> None:
        self._engine.abort_request(request_ids)
        for request_id in request_ids:
            self._waiting.pop(request_id, None)

    def _set_paused(self, paused: bool) -> None:
        self._paused = paused
        self._schedule_step()

    def _schedule_step(self) -> None:
        if self._waiting and not self._paused and not self._stepping:
            self._stepping = True
            self._thread.submit(self._step).add_done_callback(self._note_death)

    def _step(self) -> None:
        self._stepping = False
        if self._paused:
            return
        for output in self._engine.step():
            future = self._waiting.pop(output.request_id, None)
            if future is not None:
                future.set_result(output)
        self._schedule_step()

    def _note_death(self, step: Future[None]) -> None:
        if step.cancelled():
            return
        self._died = self._died or step.exception()
        if self._died is not None:
            self._fail_waiting(f"the engine's loop died: {self._died!r}")

    def _fail_waiting(self, reason: str) -> None:
        while self._waiting:
            self._waiting.popitem()[1].set_exception(EngineError(reason))
