"""Which channel a location or a configuration means: the only place that matches on weights.channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from redone.types import WeightPlan
from redone.weights.channel import FileWriter, ShmReader, ShmWriter
from redone.weights.collective import CollectiveReader, CollectiveWriter, is_collective
from redone.weights.digest import Reader

if TYPE_CHECKING:
    from redone.config.schema import Config


def open_writer(cfg: Config, location: str, total_bytes: int, host: str) -> ShmWriter:
    """Trainer rank 0's end, at `location` in its host memory or file system.

    Args:
        host: an address of this process that engines reach.
    """
    match cfg.weights.channel:
        case "shm":
            return ShmWriter(location, total_bytes)
        case "file":
            return FileWriter(location, total_bytes)
        case "collective":
            return CollectiveWriter(
                location,
                total_bytes,
                host=host,
                size=1 + cfg.rollout.replicas * cfg.rollout.tensor_model_parallel_size,
                backend="nccl" if cfg.rollout.gpus_per_node else "gloo",
                timeout_s=cfg.trainer.timeout_s / 2,  # before the driver gives up on the call
            )


def open_reader(location: str, plan: WeightPlan) -> Reader:
    """An engine rank's end of the publication at `location`, a bucket's."""
    if is_collective(location):
        return CollectiveReader(location, plan)
    return ShmReader(location, plan.total_bytes)
