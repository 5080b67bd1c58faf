"""A rollout engine in a process of its own, with the environment it asks for, behind a pipe."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

from redone.config.schema import Config
from redone.engine import build_engine, engine_env


class EngineProcess:
    """call() waits for a method of the engine; submit() returns a Future, so that calls overlap.

    Instead of a method's name: a coroutine function of a module, called with the engine.
    """

    def __init__(self, cfg: Config) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(cfg, theirs))
        with mock.patch.dict(os.environ, engine_env(cfg)):
            self._process.start()
        theirs.close()
        self._ids = itertools.count()
        self._futures: dict[int, Future[Any]] = {}
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def submit(self, method: str | Callable[..., Any], *args: Any) -> Future[Any]:
        key, future = next(self._ids), Future[Any]()
        self._futures[key] = future
        self._pipe.send((key, method, args))
        return future

    def call(self, method: str, *args: Any) -> Any:
        return self.submit(method, *args).result(timeout=600)

    def stop(self) -> None:
        self.call("close")
        self._pipe.send(None)
        self._process.join(timeout=120)
        assert self._process.exitcode == 0

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        """Stop; after a failed test end the process (its subprocesses follow), so that pytest can leave."""
        if kind is None:
            self.stop()
        else:
            self.kill()

    def kill(self) -> None:
        self._process.kill()

    def _read(self) -> None:
        try:
            while True:
                key, ok, value = self._pipe.recv()
                future = self._futures.pop(key)
                future.set_result(value) if ok else future.set_exception(value)
        except EOFError:
            for future in self._futures.values():
                future.set_exception(RuntimeError("the engine process ended"))


def _serve(cfg: Config, pipe: Connection) -> None:
    asyncio.run(_loop(cfg, pipe))


async def _loop(cfg: Config, pipe: Connection) -> None:
    engine = build_engine(cfg, 0)
    tasks = set()

    async def run(key: int, method: str | Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            value = await (method(engine, *args) if callable(method) else getattr(engine, method)(*args))
        except BaseException as error:
            pipe.send((key, False, error))
        else:
            pipe.send((key, True, value))

    while (message := await asyncio.to_thread(pipe.recv)) is not None:
        task = asyncio.create_task(run(*message))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
