"""Process groups of the trainers that one worker makes one after the other."""

from __future__ import annotations

import gc

import torch.distributed as dist


def close_groups() -> None:
    """End the groups of the last layout: each has threads that wake a hundred times a second. They end when
    nothing refers to them any more: no trainer."""
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
