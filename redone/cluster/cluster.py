"""RayCluster: starts every actor at once, waits for all, and leaves nothing behind."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError

from redone.cluster.actors import EngineActor, TrainerActor
from redone.cluster.engines import RayEngineFleet
from redone.cluster.health import Watch
from redone.cluster.placement import RayHost, Seat, engine_seats, trainer_seats
from redone.cluster.profile import runtime_env
from redone.cluster.remote import Peer, join
from redone.cluster.trainers import RayTrainerGroup
from redone.cluster.turns import Turns
from redone.config.replay import replays_engine, without_replay
from redone.config.schema import Config
from redone.engine import engine_env
from redone.errors import EngineError, RedoneError, TrainerError
from redone.weights.channel import location_of, sweep_stale

log = logging.getLogger(__name__)

MAX_CALLS = 10_000  # of one engine at once: prompts under way must leave room for an update


class RayCluster:
    """redone.api.Cluster. Trainer and engine start-up overlap: both are bound by imports.

    Without engines (supervised runs) engines() has none; without trainers (evaluation) no trainers().
    """

    def __init__(
        self,
        cfg: Config,
        log_dir: Path,
        status: Callable[[str], None] = log.info,
        *,
        phase: Callable[[], str] = lambda: "run",
        with_engines: bool = True,
        with_trainers: bool = True,
    ) -> None:
        """status: shows a line to the user. phase: what the run is doing, for messages."""
        cfg = cfg if with_trainers else without_replay(cfg)
        self.cfg, self.log_dir, self._status = cfg, log_dir, status
        self.with_engines, self.with_trainers = with_engines, with_trainers
        self._fleet: RayEngineFleet | None = None
        self._group: RayTrainerGroup | None = None
        self._peers: list[Peer] = []
        self._watch: Watch | None = None
        self._closed = False
        self._pids: dict[str, list[int]] = {}  # by name of the actor: itself and its descendants
        sweep_stale(cfg.weights)
        self.location = location_of(cfg.weights, Path(cfg.run.dir) / cfg.run.name, cfg.run.name)
        self._location_file.write_text(self.location)
        status("starting Ray")
        self.host = RayHost(cfg)
        try:
            self._watch = Watch(
                lambda: list(self._peers), cfg.cluster.health_timeout_s, cfg.cluster.stall_timeout_s, phase
            )
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
        env: dict[str, Any] = {"env_vars": seat.env}
        if actor is TrainerActor:
            env |= runtime_env(self.cfg, args[0])
        elif self.cfg.rollout.engine.python is not None:
            env["py_executable"] = self.cfg.rollout.engine.python
        options = dict(
            num_cpus=1, runtime_env=env, scheduling_strategy=self.host.strategy(seat),
            max_concurrency=1 if actor is TrainerActor else MAX_CALLS,
        )  # fmt: skip
        handle = ray.remote(actor).options(**options).remote(self.cfg, *args, path)
        return Peer(name, handle, path)

    def _start(self, status: Callable[[str], None]) -> None:
        cfg, timeout = self.cfg, self.cfg.cluster.ray.start_timeout_s
        engines = [self._spawn_engine(i) for i in range(cfg.rollout.replicas if self.with_engines else 0)]
        trainers = [
            self._spawn(TrainerActor, f"trainer rank {r}", f"trainer-{r}", seat, r)
            for r, seat in enumerate(trainer_seats(cfg) if self.with_trainers else [])
        ]
        self._peers = [*trainers, *engines]
        status(f"starting {len(trainers)} trainer rank(s) and {len(engines)} engine(s)")
        engine_refs = [e.handle.start.remote() for e in engines]
        infos: list[Any] = []
        if trainers and engines and cfg.trainer.offload:
            # An engine measures its device while it starts, and takes its share of what is free.
            join(engines, engine_refs, "start", timeout, EngineError)
            join(engines, [e.handle.call.remote("sleep") for e in engines], "sleep", timeout, EngineError)
        if trainers:
            init = self._meet(trainers)
            refs = [t.handle.start.remote(init) for t in trainers]
            infos = join(trainers, refs, "start", timeout, TrainerError)
        if engines:
            status("trainer ready, waiting for the engine" if trainers else "waiting for the engine")
        engine_infos = join(engines, engine_refs, "start", timeout, EngineError)
        self._remember_pids(self._peers)
        self._fleet = RayEngineFleet(cfg, engines, engine_infos, self._start_again, self._alarm)
        if trainers:
            self._group = RayTrainerGroup(cfg, trainers, infos, self.location)
            self._join_sides()
            if engines and cfg.weights.quantization != "none":  # they started without weights
                with self._group.awake("weights"), self._fleet.awake("weights"):
                    self._fleet.load(self._group.plan, self._group.publish(0), 0)

    def _join_sides(self) -> None:
        """What each side needs of the other."""
        assert self._fleet is not None and self._group is not None
        self._fleet.publish_again = self._group.publish_again
        if self.cfg.trainer.offload and self.with_engines:
            self._fleet.turns = self._group.turns = Turns(self._group.readings)
            self._group.rest()

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
        assert self._group is not None and self._fleet is not None
        timeout, trainers = cfg.cluster.ray.start_timeout_s, self._group.peers
        init = self._meet(trainers)
        refs = [t.handle.restart.remote(cfg, init) for t in trainers]
        infos = join(trainers, refs, "restart", timeout, TrainerError)
        self.cfg = cfg
        engines, engine_infos = self._fleet.peers, self._fleet.infos
        self._fleet = RayEngineFleet(cfg, engines, engine_infos, self._start_again, self._alarm)
        self._group = RayTrainerGroup(cfg, trainers, infos, self.location)
        self._join_sides()
        if engines:
            with self._group.awake("weights"), self._fleet.awake("weights"):
                self._group.push(self._fleet, version=0)

    def _spawn_engine(self, index: int) -> Peer:
        seat = engine_seats(self.cfg, engine_env(self.cfg))[index]
        return self._spawn(EngineActor, f"engine {index}", f"engine-{index}", seat, index)

    def _start_again(self, index: int, dead: Peer) -> Peer:
        """A new engine in the place of a dead one, whose remains are ended first."""
        self._status(f"{dead.verdict[-1] if dead.verdict else dead.name + ' died'}; it is started again")
        if not self._closed:
            ray.kill(dead.handle)
            self._reap(self._pids.pop(dead.name, []))
        if self._closed:  # Ray would start itself again
            raise EngineError(f"{dead.name} died while the run was ending")
        peer = self._spawn_engine(index)
        self._peers[self._peers.index(dead)] = peer
        join([peer], [peer.handle.start.remote()], "start", self.cfg.cluster.ray.start_timeout_s, EngineError)
        self._remember_pids([peer])
        return peer

    def _alarm(self) -> None:
        """Raises TrainerError when a trainer rank was ended: nobody need wait for the generation then."""
        for peer in self._peers:
            if peer.verdict and peer.name.startswith("trainer"):
                raise TrainerError(f"{peer.verdict[-1]}. Log: {peer.log_path}")

    def _remember_pids(self, peers: Sequence[Peer]) -> None:
        refs = [p.handle.pid.remote() for p in peers]
        for peer, pid in zip(peers, join(peers, refs, "pid", 30.0, RedoneError), strict=True):
            self._pids[peer.name] = [pid]
            if self.cfg.cluster.nodes == 1 and psutil.pid_exists(pid):
                self._pids[peer.name] += [c.pid for c in psutil.Process(pid).children(recursive=True)]

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
        Path(self.location).unlink(missing_ok=True)  # first: under SLURM, Ray may be gone and its calls wait
        self._closed = True
        if self._watch is not None:
            self._watch.close()
        for peer in self._peers:
            if ray.is_initialized():
                ray.kill(peer.handle)
        if self._fleet is not None:
            self._fleet.abandon()
        self.host.close()
        Path(self.location).unlink(missing_ok=True)  # a rank that was still writing
        self._location_file.unlink(missing_ok=True)
        self._reap([pid for pids in self._pids.values() for pid in pids])
        self._pids = {}

    def _reap(self, pids: Sequence[int], patience_s: float = 8.0) -> None:
        """Wait for processes that we started; end by pid those that outlive their parents."""
        left = [psutil.Process(p) for p in pids if self.cfg.cluster.nodes == 1 and psutil.pid_exists(p)]
        _, left = psutil.wait_procs(left, timeout=patience_s)
        for process in left:
            log.warning("process %d outlived the run and was ended", process.pid)
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


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
        replays_engine(cfg),
        rollout.replicas,
        rollout.tensor_model_parallel_size,
        rollout.gpu_memory_utilization,
        cfg.trainer.num_threads,
        cfg.weights,
        (model.dtype, model.trust_remote_code, engine_length),
        architecture,
    )
