"""RayCluster: starts every actor at once, waits for all, and leaves nothing behind."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError

from redone.cluster.actors import EngineActor, TrainerActor
from redone.cluster.engines import RayEngineFleet
from redone.cluster.placement import RayHost, Seat, engine_seats, trainer_seats
from redone.cluster.remote import Peer, join
from redone.cluster.trainers import RayTrainerGroup
from redone.config.schema import Config
from redone.engine import engine_env
from redone.errors import EngineError, RedoneError, TrainerError
from redone.weights.channel import location_of, sweep_stale

log = logging.getLogger(__name__)


class RayCluster:
    """redone.api.Cluster. Trainer and engine start-up overlap: both are bound by imports."""

    def __init__(self, cfg: Config, log_dir: Path, status: Callable[[str], None] = log.info) -> None:
        self.cfg, self.log_dir = cfg, log_dir
        self._fleet: RayEngineFleet | None = None
        self._group: RayTrainerGroup | None = None
        self._peers: list[Peer] = []
        self._pids: list[int] = []
        sweep_stale(cfg.weights)
        self.location = location_of(cfg.weights, Path(cfg.run.dir) / cfg.run.name, cfg.run.name)
        self._location_file.write_text(self.location)
        status("starting Ray")
        self.host = RayHost(cfg)
        try:
            self._start(status)
        except BaseException:
            self.close()
            raise

    @property
    def _location_file(self) -> Path:
        """Tells a job's script what to remove when SLURM ends the driver before it can."""
        return self.log_dir / "weights-path"

    def _spawn(self, actor: type, name: str, log_name: str, seat: Seat, *args: Any) -> Peer:
        path = str(self.log_dir / f"{log_name}.log")
        options = dict(
            num_cpus=1, runtime_env={"env_vars": seat.env}, scheduling_strategy=self.host.strategy(seat),
            max_concurrency=1 if actor is TrainerActor else 1000,
        )  # fmt: skip
        handle = ray.remote(actor).options(**options).remote(self.cfg, *args, path)
        return Peer(name, handle, path)

    def _start(self, status: Callable[[str], None]) -> None:
        cfg, timeout = self.cfg, self.cfg.cluster.ray.start_timeout_s
        engines = [
            self._spawn(EngineActor, f"engine {i}", f"engine-{i}", seat, i)
            for i, seat in enumerate(engine_seats(cfg, engine_env(cfg)))
        ]
        trainers = [
            self._spawn(TrainerActor, f"trainer rank {r}", f"trainer-{r}", seat, r)
            for r, seat in enumerate(trainer_seats(cfg))
        ]
        self._peers = [*trainers, *engines]
        status(f"starting {len(trainers)} trainer rank(s) and {len(engines)} engine(s)")
        engine_refs = [e.handle.start.remote() for e in engines]
        addresses = join(
            trainers, [t.handle.prepare.remote() for t in trainers], "prepare", timeout, TrainerError
        )
        init = "tcp://{}:{}".format(*addresses[0])
        infos = join(
            trainers, [t.handle.start.remote(init) for t in trainers], "start", timeout, TrainerError
        )
        status("trainer ready, waiting for the engine")
        engine_infos = join(engines, engine_refs, "start", timeout, EngineError)
        self._remember_pids()
        self._fleet = RayEngineFleet(cfg, engines, engine_infos)
        self._group = RayTrainerGroup(cfg, trainers, infos, self.location)

    def _remember_pids(self) -> None:
        refs = [p.handle.pid.remote() for p in self._peers]
        for pid in join(self._peers, refs, "pid", 30.0, RedoneError):
            self._pids.append(pid)
            if self.cfg.cluster.nodes == 1 and psutil.pid_exists(pid):
                self._pids += [c.pid for c in psutil.Process(pid).children(recursive=True)]

    def trainers(self) -> RayTrainerGroup:
        assert self._group is not None
        return self._group

    def engines(self) -> RayEngineFleet:
        assert self._fleet is not None
        return self._fleet

    def close(self, graceful: bool = False) -> None:
        """Graceful: actors say goodbye first. Otherwise they are killed, since a rank may hang."""
        if graceful and self._fleet and self._group:
            for part in (self._fleet, self._group):
                try:
                    part.close()
                except (RedoneError, RayError) as error:
                    log.warning("while closing: %s", error)
        Path(self.location).unlink(missing_ok=True)  # first: under SLURM, Ray may be gone and its calls wait
        for peer in self._peers:
            if ray.is_initialized():
                ray.kill(peer.handle)
        self.host.close()
        Path(self.location).unlink(missing_ok=True)  # a rank that was still writing
        self._location_file.unlink(missing_ok=True)
        self._reap()

    def _reap(self, patience_s: float = 8.0) -> None:
        """Wait for the processes that we started; end by pid those that outlive their parents."""
        deadline = time.monotonic() + patience_s
        left = [psutil.Process(p) for p in self._pids if self.cfg.cluster.nodes == 1 and psutil.pid_exists(p)]
        _, left = psutil.wait_procs(left, timeout=max(0.0, deadline - time.monotonic()))
        for process in left:
            log.warning("process %d outlived the run and was ended", process.pid)
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._pids = []
