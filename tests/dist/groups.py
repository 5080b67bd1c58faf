"""What a worker sees to: which Megatron it tests, and process groups of trainers that follow one another."""

from __future__ import annotations

import gc
import os

import torch.distributed as dist


def check_megatron() -> None:
    """REDONE_MEGATRON=VERSION: no other megatron-core must pass for it."""
    if wanted := os.environ.get("REDONE_MEGATRON"):
        import megatron.core

        found = megatron.core.__version__.split("+")[0]  # a repository around its sources adds its commit
        assert found == wanted, f"REDONE_MEGATRON={wanted}, but this is {found} of {megatron.core.__file__}"


def close_groups() -> None:
    """End the groups of the last layout: each has threads that wake a hundred times a second. They end when
    nothing refers to them any more: no trainer."""
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
