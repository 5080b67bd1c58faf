"""RayCluster: starts every actor at once, waits for all, and leaves nothing behind."""

from __future__ import annotations

import json
import logging
import os
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
from redone.weights.channel import channel_path, sweep_stale

log = logging.getLogger(__name__)


class RayCluster:
    """redone.api.Cluster. Trainer and engine start-up overlap: both are bound by imports."""

    def __init__(
        self,
        cfg: Config,
        log_dir: Path,
        status: Callable[[str], None] = log.info,
        with_engines: bool = True,
        with_trainers: bool = True,
    ) -> None:
        self.cfg, self.log_dir = cfg, log_dir
        self.with_engines, self.with_trainers = with_engines, with_trainers
        self._fleet: RayEngineFleet | None = None
        self._group: RayTrainerGroup | None = None
        self._peers: list[Peer] = []
        self._pids: list[int] = []
        sweep_stale(cfg.weights)
        self.location = channel_path(cfg.weights, f"{os.getpid()}-{cfg.run.name}")
        status("starting Ray")
        self.host = RayHost(cfg)
        try:
            self._start(status)
        except BaseException:
            self.close()
            raise

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
            if self.with_engines
        ]
        trainers = [
            self._spawn(TrainerActor, f"trainer rank {r}", f"trainer-{r}", seat, r)
            for r, seat in enumerate(trainer_seats(cfg))
            if self.with_trainers
        ]
        self._peers = [*trainers, *engines]
        status(f"starting {len(trainers)} trainer rank(s) and {len(engines)} engine(s)")
        engine_refs = [e.handle.start.remote() for e in engines]
        infos: list[Any] = []
        if trainers:
            init = self._meet(trainers)
            refs = [t.handle.start.remote(init) for t in trainers]
            infos = join(trainers, refs, "start", timeout, TrainerError)
        if trainers and engines:
            status("trainer ready, waiting for the engine")
        engine_infos = join(engines, engine_refs, "start", timeout, EngineError)
        self._remember_pids()
        self._trainers, self._engines, self._engine_infos = trainers, engines, engine_infos
        self._fleet = RayEngineFleet(cfg, engines, engine_infos)
        if trainers:
            self._group = RayTrainerGroup(cfg, trainers, infos, self.location)

    def _meet(self, trainers: list[Peer]) -> str:
        """Import what the ranks need, and agree on their rendezvous."""
        timeout = self.cfg.cluster.ray.start_timeout_s
        refs = [t.handle.prepare.remote() for t in trainers]
        addresses = join(trainers, refs, "prepare", timeout, TrainerError)
        return "tcp://{}:{}".format(*addresses[0])

    def serves(self, cfg: Config, with_engines: bool) -> bool:
        """Whether these processes can take over a run of `cfg` (see `adopt`)."""
        fits = self.with_trainers and self.with_engines >= with_engines
        return fits and _processes(cfg) == _processes(self.cfg)

    def adopt(self, cfg: Config) -> None:
        """Another run of the same model architecture in the same processes: the trainer starts anew from
        cfg.model.path, and the engines receive its weights as version 0, checked by digest and canary."""
        timeout, trainers = cfg.cluster.ray.start_timeout_s, self._trainers
        init = self._meet(trainers)
        refs = [t.handle.restart.remote(cfg, init) for t in trainers]
        infos = join(trainers, refs, "restart", timeout, TrainerError)
        self.cfg = cfg
        self._fleet = RayEngineFleet(cfg, self._engines, self._engine_infos)
        self._group = RayTrainerGroup(cfg, trainers, infos, self.location)
        if self._engines:
            with self._group.awake(), self._fleet.awake("weights"):
                self._group.push(self._fleet, version=0)

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
        if graceful:
            for part in (self._fleet, self._group):
                try:
                    if part is not None:
                        part.close()
                except (RedoneError, RayError) as error:
                    log.warning("while closing: %s", error)
        for peer in self._peers:
            if ray.is_initialized():
                ray.kill(peer.handle)
        self.host.close()
        if os.path.exists(self.location):
            os.unlink(self.location)
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


def _processes(cfg: Config) -> tuple[object, ...]:
    """What a running set of processes cannot change: seats, engine arguments, the model's architecture."""
    engine_length = cfg.model.max_model_len or cfg.data.max_prompt_length + cfg.data.max_response_length
    architecture = json.loads((Path(cfg.model.path) / "config.json").read_text(encoding="utf-8"))
    for volatile in ("dtype", "torch_dtype", "transformers_version", "_name_or_path"):
        architecture.pop(volatile, None)
    rollout, model = cfg.rollout, cfg.model
    return (
        cfg.cluster,
        rollout.engine,
        rollout.replicas,
        rollout.tensor_model_parallel_size,
        rollout.gpu_memory_utilization,
        cfg.trainer.num_threads,
        cfg.weights,
        (model.dtype, model.trust_remote_code, engine_length),
        architecture,
    )
