"""Which of a rank's states are on the device: all, the weights alone, or none, while engines use it.

Whole storages move, in place, so that every view of them (parameters, gradients, optimizer shards, buckets of
communication) stays what it is. Weights and optimizer states wait in pinned host memory, which is kept for
the next time; gradients are dropped and come back as zeros, as every update begins with zeros. On the CPU the
"device" is host memory: the same calls and copies, and no memory is gained.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import psutil
import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, UntypedStorage

from redone.api import TrainerPart
from redone.trainer.megatron.device import device, on_cpu
from redone.trainer.megatron.optim import inner_optimizers

P = ParamSpec("P")
R = TypeVar("R")
State = Literal["weights", "gradients", "optimizer"]

HELD: dict[TrainerPart, tuple[State, ...]] = {
    "all": ("weights", "gradients", "optimizer"),
    "weights": ("weights",),
    "none": (),
}


class Residence:
    """The states of one rank. `held` says which are on the device; everything is, to begin with."""

    def __init__(self, models: Sequence[DistributedDataParallel], optimizer: Any) -> None:
        self._models, self._optimizer = models, optimizer
        self.held: TrainerPart = "all"
        self._away: dict[State, list[tuple[UntypedStorage, int]]] = {}  # storage, its bytes
        self._host: dict[int, Tensor] = {}  # by storage: where its bytes wait

    def become(self, held: TrainerPart) -> None:
        """Move what must go first, then what must come."""
        for state in HELD[self.held]:
            if state not in HELD[held]:
                self._leave(state)
        self._release()
        for state in HELD[held]:
            if state not in HELD[self.held]:
                self._return(state)
        if not on_cpu():
            torch.cuda.synchronize()
        self.held = held

    @contextlib.contextmanager
    def with_(self, needed: TrainerPart) -> Iterator[None]:
        """At least `needed` is there; afterwards what was there before."""
        before = self.held
        if set(HELD[needed]) <= set(HELD[before]):
            yield
            return
        self.become(needed)
        try:
            yield
        finally:
            self.become(before)

    def _leave(self, state: State) -> None:
        gone = []
        for storage in self._storages(state):
            size = storage.nbytes()
            if state != "gradients":
                self._copy_out(storage, size)
            gone.append((storage, size))
        if not on_cpu():
            torch.cuda.synchronize()  # copies to pinned memory are asynchronous
        for storage, _ in gone:
            storage.resize_(0)
        self._away[state] = gone

    def _copy_out(self, storage: UntypedStorage, size: int) -> None:
        host = self._host.get(storage._cdata)
        if host is None or host.numel() != size:
            host = torch.empty(size, dtype=torch.uint8, pin_memory=not on_cpu())
            self._host[storage._cdata] = host
        host.copy_(_bytes(storage), non_blocking=True)

    def _return(self, state: State) -> None:
        for storage, size in self._away.pop(state):
            storage.resize_(size)
            if state == "gradients":
                _bytes(storage).zero_()
            else:
                _bytes(storage).copy_(self._host[storage._cdata], non_blocking=True)

    def _release(self) -> None:
        """Give what left back to the device, and host memory of storages that are no more to the host."""
        if not self._away:
            return
        torch.cuda.empty_cache()
        known = {storage._cdata for gone in self._away.values() for storage, _ in gone}
        if {"weights", "optimizer"} <= self._away.keys():
            self._host = {key: host for key, host in self._host.items() if key in known}

    def _storages(self, state: State) -> list[UntypedStorage]:
        """Those of a state that is here, each once. Views of the weights are weights."""
        weights = [b.param_data for b in self._buffers() if b.param_data is not None]
        if state == "weights":
            return _distinct(weights)
        if state == "gradients":
            return _distinct([b.grad_data for b in self._buffers()])
        taken = {t.untyped_storage()._cdata for t in weights}
        mine = [t for t in self._optimizer_tensors() if t.device.type == device().type and t.dim() > 0]
        return [s for s in _distinct(mine) if s._cdata not in taken]

    def _buffers(self) -> list[Any]:
        return [b for model in self._models for b in (*model.buffers, *model.expert_parallel_buffers)]

    def _optimizer_tensors(self) -> Iterator[Tensor]:
        """Master weights and moments; those that live on the host by trainer.optim.cpu_offload as well."""
        for whole in inner_optimizers(self._optimizer):
            inner = getattr(whole, "optimizer", None)
            if inner is None:  # a rank without parameters of that kind
                continue
            for group in inner.param_groups:
                yield from group["params"]
            for state in inner.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor))

    def memory(self) -> dict[str, float]:
        """Bytes. states: of this rank on its device. used: of the device, by all processes (CPU: of this
        process). peak: the highest `used` since the last call, as far as this rank's allocations made it."""
        here = {s: self._storages(s) for s in HELD[self.held]}
        states = float(sum(storage.nbytes() for found in here.values() for storage in found))
        if on_cpu():
            used = float(psutil.Process(os.getpid()).memory_info().rss)
            return {"states": states, "used": used, "peak": used}
        free, total = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved()
        peak = others + torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        return {"states": states, "used": float(total - free), "peak": float(peak)}


def needs(
    part: TrainerPart,
) -> Callable[[Callable[Concatenate[Any, P], R]], Callable[Concatenate[Any, P], R]]:
    """Decorator of a method that reads or writes states of `self.residence`: they come when they are away."""

    def decorate(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
        @functools.wraps(method)
        def wrapped(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
            with self.residence.with_(part):
                return method(self, *args, **kwargs)

        return wrapped

    return decorate


def _bytes(storage: UntypedStorage) -> Tensor:
    """[nbytes] uint8 over a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _distinct(tensors: Sequence[Tensor]) -> list[UntypedStorage]:
    return list({t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}.values())
