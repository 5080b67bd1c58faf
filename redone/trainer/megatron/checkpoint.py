"""Checkpoints in Megatron's torch_dist format: parameters, optimizer states, RNG and the trainer's counters.

The format is independent of the parallel layout (`fully_reshardable`): a checkpoint loads at another one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from redone.errors import TrainerError
from redone.trainer.megatron.device import device
from redone.trainer.megatron.optim import inner_optimizers

META = "redone.json"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """What the trainer remembers besides tensors."""

    format: int = FORMAT
    updates: int  # optimizer steps taken
    lr_step: int | None  # as given to set_lr_step
    layout: str  # ranks and parallel sizes; RNG states are restored only at the same layout


class InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron's own writer forks and spawns processes: unsafe beside gloo's threads and under Ray."""

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        dcp.save(
            mcore_to_pyt_state_dict(state, False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, thread_count=1),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
        )


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _state(module: torch.nn.Module, optimizer: Any, rng: bool, is_loading: bool) -> ShardedStateDict:
    """`module` is the unwrapped one: the wrappers would prefix every key."""
    metadata = _metadata()
    state: ShardedStateDict = {"model": module.sharded_state_dict(prefix="", metadata=metadata)}
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    if rng:
        state["rng"] = ShardedObject(
            "rng", _rng_state(), (dist.get_world_size(),), (dist.get_rank(),), replica_id=0
        )
    return state


def save(path: str, module: torch.nn.Module, optimizer: Any, meta: Meta) -> None:
    """Collective. `path` is created; making the whole folder atomic is the caller's. Raises TrainerError."""
    folder = Path(path)
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise TrainerError(f"cannot save to {path}: {failure[0]}")
    _fill_optimizer_state(optimizer)
    try:
        dist_checkpointing.save(
            _state(module, optimizer, rng=True, is_loading=False), path, InProcessSave("torch_dist", 1)
        )
        if dist.get_rank() == 0:
            (folder / META).write_text(json.dumps(asdict(meta)) + "\n")
    except CheckpointException as error:
        causes = sorted({f"{type(e).__name__}: {e}" for e, _ in error.failures.values()})
        raise TrainerError(f"cannot save to {path}: {'; '.join(causes)}") from error
    except (OSError, RuntimeError) as error:  # torch's own file writer raises RuntimeError
        raise TrainerError(f"cannot save to {path}: {error}") from error
    dist.barrier()


def load(path: str, module: torch.nn.Module, optimizer: Any, layout: str) -> Meta:
    """Collective; the parallel layout may differ from the one that saved. Raises TrainerError."""
    meta = _read_meta(Path(path))
    rng = meta.layout == layout
    _fill_optimizer_state(optimizer)
    try:
        state = dist_checkpointing.load(_state(module, optimizer, rng=rng, is_loading=True), path)
    except (CheckpointingException, CheckpointException, OSError) as error:
        raise TrainerError(f"cannot load {path}: {error}") from error
    module.load_state_dict(state["model"])
    _load_optimizer(optimizer, state["optimizer"])
    if rng:
        _set_rng_state(state["rng"])
    return meta


def _read_meta(folder: Path) -> Meta:
    try:
        values = json.loads((folder / META).read_text())
        meta = Meta(**values)
    except FileNotFoundError:
        raise TrainerError(f"{folder} is not a complete trainer checkpoint: {META} is missing") from None
    except (OSError, ValueError, TypeError) as error:
        raise TrainerError(f"{folder / META} cannot be read: {error}") from error
    if meta.format != FORMAT:
        raise TrainerError(f"{folder}: checkpoint format {meta.format}, this version reads {FORMAT}")
    return meta


def _fill_optimizer_state(optimizer: Any) -> None:
    """A fresh torch AdamW has no state, which Megatron cannot save or load into; zeros mean the same."""
    for part in inner_optimizers(optimizer):
        inner = part.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data),
                    }


def _load_optimizer(optimizer: Any, state: dict[Any, Any]) -> None:
    parts = inner_optimizers(optimizer)
    if "optimizer" not in state and 0 in state and len(parts) == 1:
        # Saved as a chain (dense, expert), loaded as one optimizer.
        state.update(state[0])
    optimizer.load_state_dict(state)
    for part in parts:
        for values in part.optimizer.state.values():
            if "step" in values:
                # Megatron puts ONE step tensor into all states; AdamW would advance it once per parameter.
                values["step"] = torch.as_tensor(values["step"]).detach().clone()


def _rng_state() -> dict[str, Any]:
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if device().type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and device().type == "cuda":
        torch.cuda.set_rng_state(state["cuda"])
