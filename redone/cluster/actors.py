"""The Ray actors: a process around one Trainer or one Engine, with a log file of its own."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from redone.cluster.health import Pulse
from redone.cluster.profile import RankProfiler
from redone.config.schema import Config
from redone.errors import EngineError

NODE_GPUS = "REDONE_NODE_GPUS"  # the GPUs that SLURM gave this node's Ray, e.g. "4,5,6,7"


def redirect_output(path: str, level: str) -> None:
    """Everything this process and its children print goes to one file: Python, C++, vLLM's subprocesses."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for target in (1, 2):
        os.dup2(fd, target)
    os.close(fd)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable()
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )


def use_granted_gpus() -> None:
    """CUDA_VISIBLE_DEVICES counts from 0; on a node that other jobs share, GPU 0 is the first one granted.

    Before torch is imported. Seats are planned on the driver, which does not see other nodes' devices.
    """
    granted, wanted = os.environ.get(NODE_GPUS, ""), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if granted and wanted:
        names = granted.split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[int(i)] for i in wanted.split(","))


class TrainerActor:
    """One trainer rank. Synchronous: collectives must run in one thread, in program order."""

    def __init__(self, cfg: Config, rank: int, log_path: str) -> None:
        redirect_output(log_path, cfg.run.log_level)
        use_granted_gpus()
        self.cfg, self.rank = cfg, rank
        self.pulse = Pulse(log_path, cfg.cluster.health_timeout_s, children=False)
        self.profiler = RankProfiler(cfg)

    def prepare(self) -> tuple[str, int]:
        """Import what start() needs; returns a rendezvous address (used from rank 0)."""
        import redone.trainer

        redone.trainer.preload(self.cfg)
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        if self.cfg.cluster.nodes == 1:
            return "127.0.0.1", port
        import ray.util

        return ray.util.get_node_ip_address(), port  # the host's own name often means 127.0.1.1

    def start(self, init_method: str) -> dict[str, Any]:
        from redone.trainer import build_trainer

        self.trainer = build_trainer(self.cfg, self.rank, self.cfg.cluster.world_size, init_method)
        return self.trainer.describe()

    def restart(self, cfg: Config, init_method: str) -> dict[str, Any]:
        """Another trainer in the same process: what was imported stays."""
        self.trainer.close()
        del self.trainer
        gc.collect()
        self.cfg = cfg
        return self.start(init_method)

    def call(self, method: str, *args: Any) -> Any:
        """One method of redone.api.Trainer."""
        self.pulse.event(f"{method} began")
        result = getattr(self.trainer, method)(*args)
        self.pulse.event(f"{method} ended")
        return result

    def stream(self, method: str, *args: Any) -> Iterator[Any]:
        """A generator method, item by item."""
        self.pulse.event(f"{method} began")
        yield from getattr(self.trainer, method)(*args)
        self.pulse.event(f"{method} ended")

    def exhaust(self, method: str, *args: Any) -> None:
        """The same on a rank that has nothing to say."""
        for _ in self.stream(method, *args):
            pass

    def profile(self, path: str | None) -> str:
        """None: start. A path: stop, and write the trace there."""
        if path is not None:
            return self.profiler.stop(path)
        self.profiler.start()
        return ""

    def pid(self) -> int:
        return os.getpid()


class EngineActor:
    """One rollout engine. Asynchronous: many generate() calls are in flight at once."""

    def __init__(self, cfg: Config, index: int, log_path: str) -> None:
        redirect_output(log_path, cfg.run.log_level)
        use_granted_gpus()
        self.cfg, self.index = cfg, index
        self.pulse = Pulse(log_path, cfg.cluster.health_timeout_s, children=True)

    async def start(self) -> dict[str, Any]:
        from redone.engine import build_engine

        self.engine = build_engine(self.cfg, self.index)
        about = await self.engine.start()
        self._asking = asyncio.create_task(self._ask())
        return about

    async def _ask(self) -> None:
        """Until the engine is closed or dead, which whoever calls it hears."""
        with suppress(EngineError, RuntimeError):  # RuntimeError: of a loop that is being shut down
            while True:
                with self.pulse.asking():
                    await self.engine.ping()
                await asyncio.sleep(self.pulse.interval_s)

    async def call(self, method: str, *args: Any) -> Any:
        """One method of redone.api.Engine."""
        self.pulse.event(f"{method} began")
        return await getattr(self.engine, method)(*args)

    async def pid(self) -> int:
        return os.getpid()
