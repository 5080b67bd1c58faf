"""weights.channel=ipc: engine ranks read buckets out of the memory of the trainer rank on their own GPU.

Rank 0 fills one of two slots of device memory, the trainer's ranks broadcast it among themselves (NCCL), and
every engine rank opens the slot of its GPU by a CUDA IPC handle, copies it within the device and says so; a
slot is filled again when all have. An engine rank needs its own copy: vLLM keeps the tensors of a layer until
the last of them has come. Handles and answers go through rank 0's store. Slots live as long as a publication.

Written after vLLM 0.32's own IPC transfer and torch 2.13's reductions; never run on a GPU. Nobody keeps the
bytes, so an engine that dies ends the run.
"""

from __future__ import annotations

import base64
import datetime
import itertools
import json
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from redone.errors import SyncError
from redone.types import WeightPlan
from redone.weights.collective import Meeting, bucket_span

SLOTS = 2


class Handles(Protocol):
    """How memory of this process is named for another one on the same device."""

    def allocate(self, nbytes: int) -> Tensor: ...

    def export(self, data: Tensor) -> dict[str, str]:
        """device -> handle, of this rank's device. Good for one attach()."""

    def attach(self, handles: dict[str, str]) -> Tensor:
        """The exporter's memory, from the handle of this process' device."""


class CudaHandles:
    """CUDA IPC. Needs memory of the plain allocator: expandable segments cannot be exported."""

    def allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cuda")

    def export(self, data: Tensor) -> dict[str, str]:
        _, *arguments = data.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
        plain = [base64.b64encode(a).decode() if isinstance(a, bytes) else a for a in arguments]
        return {_uuid(): json.dumps([data.numel(), data.storage_offset(), *plain])}

    def attach(self, handles: dict[str, str]) -> Tensor:
        """Raises SyncError when no trainer rank is on this GPU."""
        if _uuid() not in handles:
            raise SyncError(
                f"weight channel: no trainer rank shares GPU {_uuid()} with this engine rank, only "
                f"{', '.join(sorted(handles))} do; use weights.channel=collective"
            )
        size, start, *plain = json.loads(handles[_uuid()])
        arguments = [base64.b64decode(a) if isinstance(a, str) else a for a in plain]
        storage = torch.UntypedStorage._new_shared_cuda(torch.cuda.current_device(), *arguments)
        whole = torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage)
        return whole[start : start + size]


def _uuid() -> str:
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


class IpcWriter:
    """A trainer rank's end: `announce` is collective, the rest is rank 0's business. See channel.ShmWriter.

    Args:
        host: an address of rank 0.
        readers: engine ranks.
        timeout_s: for a bucket to be taken by all of them.
    """

    def __init__(
        self, plan: WeightPlan, *, host: str, readers: int, timeout_s: float, handles: Handles
    ) -> None:
        self.plan, self._handles, self._readers = plan, handles, readers
        self._spans = [bucket_span(plan, i) for i in range(len(plan.buckets))]
        self._host, self._timeout_s, self._key = host, timeout_s, ""
        self._keys = itertools.count(1)
        self._store: TCPStore | None = None
        if dist.get_rank() == 0:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._slots: list[Tensor] = []
        self._bucket = -1

    def begin(self) -> str:
        """On every rank: allocate and export. Rank 0's result is the address."""
        self._slots = [self._handles.allocate(max(size for _, size in self._spans)) for _ in range(SLOTS)]
        mine = [self._handles.export(slot) for slot in self._slots]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        self._bucket, self._key = -1, f"i{next(self._keys)}"
        if self._store is None:
            return ""
        merged = [{device: h for rank in everyone for device, h in rank[s].items()} for s in range(SLOTS)]
        self._store.set(f"{self._key}/handles", json.dumps(merged))
        return Meeting(
            host=self._host, port=self._store.port, key=self._key, size=self._readers, backend="ipc",
            timeout_s=self._timeout_s,
        ).location  # fmt: skip

    def view(self, offset: int, nbytes: int) -> Tensor:
        """[nbytes] uint8 of the slot for the bucket that holds `offset`; waits until the slot is free."""
        while self._bucket < 0 or offset >= sum(self._spans[self._bucket]):
            self._bucket += 1
            self._wait_for(self._bucket - SLOTS)
        first = offset - self._spans[self._bucket][0]
        return self._slots[self._bucket % SLOTS][first : first + nbytes]

    def announce(self, offset: int, nbytes: int) -> None:
        """On every rank: the bucket is complete on rank 0; afterwards on every trainer rank's device."""
        if dist.get_rank() != 0:
            self._bucket += 1
        slot = self._slots[self._bucket % SLOTS][:nbytes]
        dist.broadcast(slot, src=0)
        if slot.is_cuda:
            torch.cuda.synchronize()
        # Rank 0 speaks of the bucket next, and engines read all ranks' slots.
        dist.barrier()

    def finish(self) -> None:
        """Every rank: wait until all is taken, free the slots. Raises SyncError on rank 0."""
        failure = None
        if self._store is not None:
            try:
                for bucket in range(max(0, len(self._spans) - SLOTS), len(self._spans)):
                    self._wait_for(bucket)
            except SyncError as error:
                failure = error
        dist.barrier()
        self._slots = []
        if failure is not None:
            raise failure

    def _wait_for(self, bucket: int) -> None:
        if bucket < 0 or self._store is None:
            return
        try:
            timeout = datetime.timedelta(seconds=self._timeout_s)
            self._store.wait([f"{self._key}/taken/{bucket}/{self._readers}"], timeout)
        except RuntimeError:
            raise SyncError(
                f"weight channel: bucket {bucket} was not taken by all {self._readers} engine ranks within "
                f"{self._timeout_s:g} s"
            ) from None

    def close(self) -> None:
        self._slots = []


class IpcReader:
    """An engine rank's end of one publication."""

    def __init__(self, location: str, plan: WeightPlan, handles: Handles) -> None:
        self.location, self.plan, self._meeting = location, plan, Meeting.of(location)
        try:
            timeout = datetime.timedelta(seconds=self._meeting.meet_s)
            self._store = TCPStore(self._meeting.host, self._meeting.port, is_master=False, timeout=timeout)
            named = json.loads(self._store.get(f"{self._meeting.key}/handles"))
        except RuntimeError as error:
            where = f"{self._meeting.host}:{self._meeting.port}"
            raise SyncError(f"weight channel: trainer rank 0 does not answer at {where}: {error}") from error
        self._slots = [handles.attach(slot) for slot in named]
        self._start, self._bytes = 0, torch.empty(0, dtype=torch.uint8)

    def fetch(self, index: int) -> None:
        """Copy the bucket, which rank 0 has announced, and let its slot go."""
        self._start, nbytes = bucket_span(self.plan, index)
        self._bytes = self._slots[index % SLOTS][:nbytes].clone()
        if self._bytes.is_cuda:
            torch.cuda.synchronize()
        key = f"{self._meeting.key}/taken/{index}"
        taken = self._store.add(key, 1)
        self._store.set(f"{key}/{taken}", "")

    def view(self, offset: int, nbytes: int) -> Tensor:
        """[nbytes] uint8 of the bucket fetched last, on the device."""
        first = offset - self._start
        if first < 0 or first + nbytes > len(self._bytes):
            raise SyncError(f"weight channel: [{offset}, {offset + nbytes}) is not in the bucket at hand")
        return self._bytes[first : first + nbytes]
