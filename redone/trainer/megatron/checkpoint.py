"""Checkpoints in Megatron's torch_dist format: parameters, optimizer states, RNG and the trainer's counters.

The format is independent of the parallel layout (`fully_reshardable`): a checkpoint loads at another one.
"""

from __future__ import annotations

import functools
import json
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict, ShardedTensor
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
WRITING = ".writing"  # there while an asynchronous save is under way
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """What the trainer remembers besides tensors."""

    format: int = FORMAT
    updates: int  # optimizer steps taken
    lr_step: int | None  # as given to set_lr_step
    layout: str  # ranks and parallel sizes; RNG states are restored only at the same layout


class InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron's own writer forks and spawns processes: unsafe beside gloo's threads and under Ray.

    With a process group, `save` copies the tensors and leaves the writing to `write`, which may run in a
    thread: its collectives use that group alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__("torch_dist", 1)
        self.group = group
        self.write: Callable[[], Any] | None = None

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        if self.group is not None:
            for shard in (s for shards in state.values() for s in shards if isinstance(s, ShardedTensor)):
                shard.data = None if shard.data is None else shard.data.detach().to("cpu", copy=True)
        write = functools.partial(
            dcp.save,
            mcore_to_pyt_state_dict(state, False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, thread_count=1),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
            ),
            process_group=self.group,
        )
        if self.group is None:
            write()
        else:
            self.write = write


class Saver:
    """Saves, at once or in a thread. At most one write is under way; its failure is raised by `wait`."""

    def __init__(self, asynchronous: bool) -> None:
        self.group = dist.new_group(backend="gloo") if asynchronous else None
        self.thread: threading.Thread | None = None
        self.path = ""
        self.failure: str | None = None

    def save(self, path: str, modules: Sequence[torch.nn.Module], optimizer: Any, meta: Meta) -> None:
        """Collective. While `path`/WRITING exists the checkpoint is incomplete. Raises TrainerError."""
        self.wait()
        self.path = path
        strategy = InProcessSave(self.group)
        save(path, modules, optimizer, meta, strategy)
        if strategy.write is not None:
            self.thread = threading.Thread(target=self._write, args=(strategy.write,), name="checkpoint")
            self.thread.start()

    def _write(self, write: Callable[[], Any]) -> None:
        try:
            write()
            dist.barrier(group=self.group)
            if dist.get_rank() == 0:
                (Path(self.path) / WRITING).unlink()
        except (CheckpointException, OSError, RuntimeError) as error:
            self.failure = f"{type(error).__name__}: {error}"

    def wait(self) -> None:
        """Until the write under way is complete. Collective; raises TrainerError everywhere if it failed."""
        if self.group is None or self.thread is None:
            return
        self.thread.join()
        self.thread = None
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, self.failure)
        self.failure = None
        if found := [f for f in failures if f is not None]:
            raise TrainerError(f"cannot save to {self.path}: {found[0]}")


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _state(
    modules: Sequence[torch.nn.Module], optimizer: Any, rng: bool, is_loading: bool
) -> ShardedStateDict:
    """`modules` are unwrapped: the wrappers would prefix every key."""
    metadata = _metadata()
    state: ShardedStateDict = {
        f"model{i}": module.sharded_state_dict(prefix="", metadata=metadata)  # type: ignore[operator]
        for i, module in enumerate(modules)
    }
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    if rng:
        state["rng"] = ShardedObject(
            "rng", _rng_state(), (dist.get_world_size(),), (dist.get_rank(),), replica_id=0
        )
    return state


def save(
    path: str, modules: Sequence[torch.nn.Module], optimizer: Any, meta: Meta, strategy: InProcessSave
) -> None:
    """Collective. `path` is created; making the whole folder atomic is the caller's. Raises TrainerError."""
    folder = Path(path)
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if strategy.group is not None:
                (folder / WRITING).touch()
        except OSError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise TrainerError(f"cannot save to {path}: {failure[0]}")
    _fill_optimizer_state(optimizer)
    try:
        dist_checkpointing.save(_state(modules, optimizer, rng=True, is_loading=False), path, strategy)
        if dist.get_rank() == 0:
            (folder / META).write_text(json.dumps(asdict(meta)) + "\n")
    except CheckpointException as error:
        causes = sorted({f"{type(e).__name__}: {e}" for e, _ in error.failures.values()})
        raise TrainerError(f"cannot save to {path}: {'; '.join(causes)}") from error
    except (OSError, RuntimeError) as error:  # torch's own file writer raises RuntimeError
        raise TrainerError(f"cannot save to {path}: {error}") from error
    dist.barrier()


def load(path: str, modules: Sequence[torch.nn.Module], optimizer: Any, layout: str) -> Meta:
    """Collective; the parallel layout may differ from the one that saved. Raises TrainerError."""
    meta = _read_meta(Path(path))
    rng = meta.layout == layout
    _fill_optimizer_state(optimizer)
    try:
        state = dist_checkpointing.load(_state(modules, optimizer, rng=rng, is_loading=True), path)
    except (CheckpointingException, CheckpointException, OSError) as error:
        raise TrainerError(f"cannot load {path}: {error}") from error
    for i, module in enumerate(modules):
        module.load_state_dict(state[f"model{i}"])
    _load_optimizer(optimizer, state["optimizer"])
    if rng:
        _set_rng_state(state["rng"])
    return meta


def _read_meta(folder: Path) -> Meta:
    if (folder / WRITING).exists():
        raise TrainerError(f"{folder} is not a complete trainer checkpoint: its writing was interrupted")
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
        if not isinstance(inner, torch.optim.AdamW):  # Megatron fills the states of its other optimizers
            continue
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
    optimizer.load_state_dict(_as_chained(state, parts))
    for part in parts:
        for values in part.optimizer.state.values():
            if "step" in values:
                # Megatron puts ONE step tensor into all states; AdamW would advance it once per parameter.
                values["step"] = torch.as_tensor(values["step"]).detach().clone()


def _as_chained(state: dict[Any, Any], parts: Sequence[Any]) -> dict[Any, Any]:
    """`state` as read, in the form that a chain of `parts` loads.

    With expert parallelism Megatron chains two optimizers, of dense and of expert parameters; without it one
    has all. Of what was read, tensors (`param_state`) stand where this chain asked for them, everything else
    where the chain that saved had it.
    """
    indices = sorted(k for k in state if isinstance(k, int))
    saved = [state] if "optimizer" in state else [state[i] for i in indices]
    if len(saved) == len(parts):
        return state
    common = {k: v for k, v in saved[0].items() if k not in (*indices, "optimizer", "param_state")}
    groups = [group for each in saved for group in each["optimizer"]["param_groups"]]
    chained = {}
    for i, part in enumerate(parts):
        # Megatron finds a group by its multipliers and by whether it is of experts, which the layout decides.
        of_experts = {"is_expert_parallel": part.optimizer.param_groups[0]["is_expert_parallel"]}
        chained[i] = {
            **common,
            "optimizer": {"param_groups": [group | of_experts for group in groups]},
            "param_state": (state[i] if len(parts) > 1 else state)["param_state"],
        }
    return chained if len(parts) > 1 else chained[0]


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
