"""weights.channel=collective: trainer rank 0 broadcasts bucket after bucket to every engine rank.

No file system in common is needed. NCCL where engines have GPUs of their own, gloo otherwise (NCCL takes a
GPU into a group only once). Every publication has a group of its own: engines may have been replaced since
the last one, and NCCL's buffers do not occupy a GPU while its engine generates. The trainer is rank 0, engine
ranks take theirs in the order of arrival. Rank 0 keeps all bytes in host memory for engines that come later.
"""

from __future__ import annotations

import datetime
import itertools
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, cast
from urllib.parse import parse_qs, urlsplit

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from redone.errors import SyncError, first_line
from redone.types import WeightPlan
from redone.weights.channel import ShmWriter

log = logging.getLogger(__name__)

SCHEME = "collective"
MEET_S = 60.0  # for members to arrive: engines are paused and wait for the first bucket
Span = tuple[int, int]  # offset, bytes
CollectiveBackend = Literal["gloo", "nccl", "ipc"]  # ipc: redone.weights.ipc


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """Where the members of one group find each other; as text it is the location of a bucket."""

    host: str
    port: int
    key: str  # differs between groups
    size: int  # trainer rank 0 and the engine ranks
    backend: CollectiveBackend
    timeout_s: float  # for one bucket

    @property
    def meet_s(self) -> float:
        """For the members to arrive."""
        return min(self.timeout_s, MEET_S)

    @property
    def location(self) -> str:
        query = f"size={self.size}&backend={self.backend}&timeout_s={self.timeout_s:g}"
        return f"{SCHEME}://{self.host}:{self.port}/{self.key}?{query}"

    @staticmethod
    def of(location: str) -> Meeting:
        """Raises SyncError for anything but what `location` returns."""
        parts = urlsplit(location)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        try:
            assert parts.hostname and parts.port and query["backend"] in ("gloo", "nccl", "ipc")
            return Meeting(
                host=parts.hostname,
                port=parts.port,
                key=parts.path.removeprefix("/"),
                size=int(query["size"]),
                backend=cast(CollectiveBackend, query["backend"]),
                timeout_s=float(query["timeout_s"]),
            )
        except (AssertionError, KeyError, ValueError):
            raise SyncError(f"{location!r} is not the address of a collective weight channel") from None


def is_collective(location: str) -> bool:
    return location.startswith(f"{SCHEME}://")


def elsewhere(location: str, key: str, engine_ranks: int) -> str:
    """The address of a group of its own, of trainer rank 0 and some engine ranks, at the same store."""
    return replace(Meeting.of(location), key=key, size=1 + engine_ranks).location


def bucket_span(plan: WeightPlan, index: int) -> Span:
    """(offset, bytes) of a bucket in the weight space."""
    first, last = plan.buckets[index]
    start, end = plan.tensors[first], plan.tensors[last - 1]
    return start.offset, end.offset + end.nbytes - start.offset


class _Group:
    """One member's end."""

    def __init__(self, meeting: Meeting, store: TCPStore, rank: int) -> None:
        self.meeting, self.rank = meeting, rank
        self._timeout = datetime.timedelta(seconds=meeting.timeout_s)
        self.device = torch.device("cpu")
        if meeting.backend == "nccl":
            self.device = torch.device("cuda", torch.cuda.current_device())
        try:
            self._group: Any = self._make(PrefixStore(f"{meeting.key}/group", store))
        except RuntimeError as error:
            raise SyncError(
                f"weight channel: not all of {meeting.size} members (trainer rank 0 and every engine rank) "
                f"met at {meeting.host}:{meeting.port} within {meeting.meet_s:g} s: {first_line(error)}"
            ) from error

    def _make(self, store: PrefixStore) -> Any:
        size, timeout = self.meeting.size, datetime.timedelta(seconds=self.meeting.meet_s)
        if self.meeting.backend == "gloo":
            return dist.ProcessGroupGloo(store, self.rank, size, timeout)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, self.rank, size, options)

    def broadcast(self, data: torch.Tensor, what: str) -> None:
        """From rank 0 to all; returns when this member is done. Raises SyncError that says `what` is lost."""
        if self._group is None:
            raise SyncError("weight channel: its group failed before")
        try:
            self._group.broadcast(data, 0, self._timeout).wait()
            if data.is_cuda:
                torch.cuda.current_stream().synchronize()
        except RuntimeError as error:
            self._group = None  # closes its connections, so that the other members need not wait
            side = "could not be sent" if self.rank == 0 else "did not arrive"
            raise SyncError(
                f"weight channel: {what} {side} within {self.meeting.timeout_s:g} s, or a member of the group"
                f" is gone: {first_line(error)}"
            ) from error

    def part(self) -> None:
        """Wait for everybody, so that nobody closes a connection that another still reads from."""
        if self._group is None:
            return
        options = dist.AllreduceOptions()
        options.timeout = self._timeout
        try:
            self._group.allreduce([torch.zeros(1, device=self.device)], options).wait()
        except RuntimeError as error:
            raise SyncError(f"weight channel: a member left before the end: {first_line(error)}") from error


class CollectiveWriter(ShmWriter):
    """Rank 0's end: the bytes stay in a file in shared memory, and a thread broadcasts them from there.

    A failure to send is the engines' to report: the bytes are complete here, and `send_again` serves whoever
    missed them.

    Args:
        host: an address of this process that engines reach.
        size: members of a publication's group: this rank and every engine rank.
    """

    def __init__(
        self,
        path: str,
        total_bytes: int,
        *,
        host: str,
        size: int,
        backend: CollectiveBackend,
        timeout_s: float,
    ) -> None:
        super().__init__(path, total_bytes)
        meet = datetime.timedelta(seconds=min(timeout_s, MEET_S))
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=meet)
        self._template = dict(
            host=host, port=self._store.port, size=size, backend=backend, timeout_s=timeout_s
        )
        self._device = torch.cuda.current_device() if backend == "nccl" else None
        self._keys = itertools.count(1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="broadcast")
        self._group: _Group | None = None
        self._sent: list[Future[None]] = []

    def begin(self) -> str:
        meeting = Meeting(key=f"p{next(self._keys)}", **self._template)  # type: ignore[arg-type]
        self._sent = [self._thread.submit(self._meet, meeting)]
        return meeting.location

    def announce(self, offset: int, nbytes: int) -> None:
        self._sent.append(self._thread.submit(self._send, offset, nbytes))

    def finish(self) -> None:
        """Wait for the last bucket, leave the group."""
        sent, self._sent = self._sent, []
        sent.append(self._thread.submit(self._leave))
        errors = [error for future in sent if (error := future.exception()) is not None]
        self._group = None
        if errors:
            log.warning("%s", errors[0])

    def send_again(self, location: str, spans: list[Span]) -> None:
        """Everything once more, to the members of another group. Raises SyncError."""
        meeting = Meeting.of(location)
        self._thread.submit(self._meet, meeting).result()
        try:
            for span in spans:
                self._thread.submit(self._send, *span).result()
            self._thread.submit(self._leave).result()
        finally:
            self._group = None

    def _meet(self, meeting: Meeting) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)  # per thread
        self._group = _Group(meeting, self._store, 0)

    def _send(self, offset: int, nbytes: int) -> None:
        if self._group is None:
            return
        data = self.view(offset, nbytes).to(self._group.device)
        try:
            self._group.broadcast(data, f"bytes {offset} .. {offset + nbytes}")
        except SyncError:
            self._group = None
            raise

    def _leave(self) -> None:
        if self._group is not None:
            self._group.part()

    def close(self, keep: bool = False) -> None:
        self._thread.shutdown()
        self._group = None
        super().close(keep)


class CollectiveReader:
    """An engine rank's end of one publication. Buckets arrive in plan order, each in memory of its own."""

    def __init__(self, location: str, plan: WeightPlan) -> None:
        self.location, self.plan = location, plan
        meeting = Meeting.of(location)
        timeout = datetime.timedelta(seconds=meeting.meet_s)
        try:
            self._store = TCPStore(meeting.host, meeting.port, is_master=False, timeout=timeout)
            rank = self._store.add(f"{meeting.key}/arrived", 1)
        except RuntimeError as error:
            raise SyncError(
                f"weight channel: trainer rank 0 does not answer at {meeting.host}:{meeting.port}: "
                f"{first_line(error)}"
            ) from error
        if rank >= meeting.size:
            raise SyncError(f"weight channel: a group of {meeting.size} members has no place for one more")
        self._group = _Group(meeting, self._store, rank)
        self._next = 0
        self._waiting: dict[int, torch.Tensor] = {}  # received, not yet asked for
        self._start, self._bytes = 0, torch.empty(0, dtype=torch.uint8)

    def fetch(self, index: int) -> None:
        """Receive up to bucket `index`, which `view` then shows. Raises SyncError when it does not come."""
        while self._next <= index:
            data = torch.empty(
                bucket_span(self.plan, self._next)[1], dtype=torch.uint8, device=self._group.device
            )
            self._group.broadcast(data, f"bucket {self._next} of {len(self.plan.buckets)}")
            self._waiting[self._next] = data
            self._next += 1
            if self._next == len(self.plan.buckets):
                self._group.part()
        if index not in self._waiting:
            raise SyncError(f"weight channel: bucket {index} was asked for twice")
        self._start, self._bytes = bucket_span(self.plan, index)[0], self._waiting.pop(index)

    def view(self, offset: int, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8 of the bucket fetched last; on NCCL's device with NCCL."""
        first = offset - self._start
        if first < 0 or first + nbytes > len(self._bytes):
            raise SyncError(
                f"weight channel: [{offset}, {offset + nbytes}) is not in the bucket that arrived"
            )
        return self._bytes[first : first + nbytes]
