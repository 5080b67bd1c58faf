"""Which channel a location or a configuration means: the only place that matches on weights.channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from redone.types import WeightPlan
from redone.weights.channel import FileWriter, ShmReader, ShmWriter
from redone.weights.collective import CollectiveReader, CollectiveWriter, Meeting, is_collective
from redone.weights.digest import Reader, Writer
from redone.weights.ipc import CudaHandles, IpcReader, IpcWriter

if TYPE_CHECKING:
    from redone.config.schema import Config


def open_writer(cfg: Config, location: str, plan: WeightPlan, host: str, rank: int) -> Writer | None:
    """A trainer rank's end, at `location` in its host memory or file system; None for a rank without one.

    Args:
        host: an address of rank 0 that engines reach.
    """
    weights, readers = cfg.weights, cfg.rollout.replicas * cfg.rollout.tensor_model_parallel_size
    patience = cfg.trainer.timeout_s / 2  # before the driver gives up on the call
    if weights.channel == "ipc":
        return IpcWriter(plan, host=host, readers=readers, timeout_s=patience, handles=CudaHandles())
    if rank != 0:
        return None
    match weights.channel:
        case "shm":
            return ShmWriter(location, plan.total_bytes)
        case "file":
            return FileWriter(location, plan.total_bytes)
        case "collective":
            return CollectiveWriter(
                location,
                plan.total_bytes,
                host=host,
                size=1 + readers,
                backend="nccl" if cfg.rollout.gpus_per_node else "gloo",
                timeout_s=patience,
            )


def open_reader(location: str, plan: WeightPlan) -> Reader:
    """An engine rank's end of the publication at `location`, a bucket's."""
    if is_collective(location):
        if Meeting.of(location).backend == "ipc":
            return IpcReader(location, plan, CudaHandles())
        return CollectiveReader(location, plan)
    return ShmReader(location, plan.total_bytes)
