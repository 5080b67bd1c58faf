"""Bring up Ray, or join the launcher's, and say where each actor runs and with what environment."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from dataclasses import dataclass

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from redone.config.schema import Config
from redone.errors import RedoneError

log = logging.getLogger(__name__)

DRIVER_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # keep CUDA_VISIBLE_DEVICES as we set it
    "RAY_memory_monitor_refresh_ms": "0",  # it would end our actors when others fill the machine's memory
    "RAY_worker_niceness": "0",  # 15 by default: every other process would come before trainer and engines
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
}
ACTOR_ENV = {
    **DRIVER_ENV,
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True, slots=True)
class Seat:
    """A place for one actor: its node's bundle, the GPUs it sees, its environment."""

    bundle: int
    gpus: tuple[int, ...]
    env: dict[str, str]


START_ATTEMPTS = 3


class RayHost:
    """A Ray session of our own, or a connection to RAY_ADDRESS. Only what we started is stopped."""

    def __init__(self, cfg: Config) -> None:
        os.environ.update({k: os.environ.get(k, v) for k, v in DRIVER_ENV.items()})
        self._owned_dir: str | None = None
        seats = cfg.cluster.world_size + cfg.rollout.replicas
        address = os.environ.get("RAY_ADDRESS")
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
            self._await_nodes(cfg)
        else:
            # Ray's unix sockets live below this folder and their paths must stay short.
            self._owned_dir = cfg.cluster.ray.temp_dir or tempfile.mkdtemp(prefix="rd", dir="/tmp")
            self._start_own(seats + 1, cfg)
        self.group = self._reserve(cfg)

    def _start_own(self, cpus: int, cfg: Config) -> None:
        """Ray on this machine. Its node has 30 s to come up, whatever we set; a busy machine needs more."""
        for attempt in range(START_ATTEMPTS):
            try:
                ray.init(
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=cfg.cluster.ray.object_store_mb << 20,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                    _temp_dir=self._owned_dir,
                    _node_ip_address="127.0.0.1",
                )
                return
            except Exception as error:  # Ray raises the base class here
                if type(error) is not Exception or "timed out during startup" not in str(error):
                    raise
                ray.shutdown()
                log.warning("Ray's node did not come up within 30 s (attempt %d)", attempt + 1)
        raise RedoneError(
            f"Ray's node did not come up within 30 s, {START_ATTEMPTS} times: this machine is overloaded, or "
            f"its processes may not talk to each other; Ray's logs: {self._owned_dir}/session_latest/logs"
        )

    def _await_nodes(self, cfg: Config) -> None:
        """The launcher's Ray nodes register one after another."""
        deadline = time.monotonic() + cfg.cluster.ray.start_timeout_s
        while (alive := sum(bool(node["Alive"]) for node in ray.nodes())) < cfg.cluster.nodes:
            if time.monotonic() > deadline:
                raise RedoneError(
                    f"{alive} of cluster.nodes={cfg.cluster.nodes} Ray nodes joined within "
                    f"{cfg.cluster.ray.start_timeout_s:.0f} s; the others' logs are beside the driver's"
                )
            time.sleep(0.2)

    def _reserve(self, cfg: Config) -> PlacementGroup:
        cluster, cuda = cfg.cluster, cfg.cluster.device == "cuda"
        engines_per_node = -(-cfg.rollout.replicas // cluster.nodes)
        bundle = {"CPU": float(cluster.gpus_per_node + engines_per_node)}
        if cuda:
            bundle["GPU"] = float(cfg.node_gpus)
        group = placement_group(
            [bundle] * cluster.nodes, strategy="PACK" if cluster.nodes == 1 else "STRICT_SPREAD"
        )
        ready, _ = ray.wait([group.ready()], timeout=cluster.ray.start_timeout_s)
        if not ready:
            raise RedoneError(
                f"Ray could not place {cluster.nodes} bundle(s) of {bundle} in "
                f"{cluster.ray.start_timeout_s:.0f} s; it has {ray.cluster_resources()}. Remedy: "
                f"cluster.nodes, cluster.gpus_per_node and rollout.gpus_per_node must fit what was allocated."
            )
        return group

    def strategy(self, seat: Seat) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(
            placement_group=self.group,
            placement_group_bundle_index=seat.bundle,
            placement_group_capture_child_tasks=True,
        )

    def close(self) -> None:
        if ray.is_initialized():
            ray.shutdown()
        if self._owned_dir:
            shutil.rmtree(self._owned_dir, ignore_errors=True)


def _device_env(cfg: Config, gpus: tuple[int, ...], threads: int) -> dict[str, str]:
    env = {**ACTOR_ENV, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if cfg.cluster.device == "cuda":
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        env["CUDA_DEVICE_MAX_CONNECTIONS"] = (
            "1"  # Megatron's order of communication and compute kernels relies on it
        )
    else:
        # torch.compile costs a C++ build at first use on CPU and gains nothing at these sizes
        env |= {"TORCH_COMPILE_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
        if cfg.cluster.nodes == 1:
            env["GLOO_SOCKET_IFNAME"] = "lo"
    return env


def trainer_seats(cfg: Config) -> list[Seat]:
    """Rank r sits on node r // gpus_per_node and sees GPU r % gpus_per_node."""
    per_node = cfg.cluster.gpus_per_node
    seats = []
    for rank in range(cfg.cluster.world_size):
        gpus = (rank % per_node,)
        seats.append(Seat(rank // per_node, gpus, _device_env(cfg, gpus, cfg.trainer.num_threads)))
    return seats


def engine_seats(cfg: Config, engine_env: dict[str, str]) -> list[Seat]:
    """Engine e shares the GPUs of trainer ranks [e * tp, (e + 1) * tp), in turn; with rollout.gpus_per_node
    it has its own, numbered after the trainer's on the same node."""
    own, tp = cfg.rollout.gpus_per_node, cfg.rollout.tensor_model_parallel_size
    per_node, start = (own, cfg.cluster.gpus_per_node) if own else (cfg.cluster.gpus_per_node, 0)
    seats = []
    for index in range(cfg.rollout.replicas):
        if cfg.cluster.device == "cuda":
            node, first = divmod(index * tp, per_node)
            gpus = tuple(range(start + first, start + first + tp))
        else:
            node, gpus = index % cfg.cluster.nodes, ()
        env = {**_device_env(cfg, gpus, cfg.rollout.engine.num_threads), **engine_env}
        seats.append(Seat(node, gpus, env))
    return seats
