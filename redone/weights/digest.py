"""Digests of the bytes that really arrived: what names a flipped, stale or misplaced tensor."""

from __future__ import annotations

from typing import Protocol

import torch
import xxhash

from redone.errors import SyncError
from redone.types import WeightBucket, WeightPlan
from redone.weights.plan import bucket_tensors


class Channel(Protocol):
    """What both ends of a channel offer."""

    def view(self, offset: int, nbytes: int) -> torch.Tensor: ...


class Writer(Channel, Protocol):
    """A trainer rank's end. Every rank that has one calls begin, announce (per bucket) and finish alike."""

    def begin(self) -> str:
        """Before a publication; on rank 0 the address that its buckets carry."""

    def announce(self, offset: int, nbytes: int) -> None:
        """A bucket is complete: make it visible to those who will hear of it."""

    def finish(self) -> None:
        """After a publication's last bucket."""

    def close(self) -> None: ...


class Reader(Channel, Protocol):
    """An engine rank's end."""

    location: str

    def fetch(self, index: int) -> None:
        """Wait until `view` shows bucket `index`. Raises SyncError."""


def digest(data: torch.Tensor) -> int:
    """xxh3_64 of a contiguous [n] uint8 tensor, in host memory without copying it."""
    return xxhash.xxh3_64_intdigest(memoryview(data.cpu().numpy()))  # type: ignore[arg-type]


def bucket_digests(plan: WeightPlan, index: int, channel: Channel) -> tuple[int, ...]:
    """One digest per tensor of bucket `index`, in plan order: the sender's side of verify()."""
    return tuple(digest(channel.view(t.offset, t.nbytes)) for t in bucket_tensors(plan, index))


def verify(plan: WeightPlan, bucket: WeightBucket, reader: Channel) -> None:
    """Compare the received bytes with the sender's digests.

    Raises:
        SyncError: naming tensor, bucket and version of the first mismatch; or the bucket has another number
            of tensors than the plan.
    """
    tensors = bucket_tensors(plan, bucket.index)
    if len(tensors) != len(bucket.digests):
        raise SyncError(
            f"bucket {bucket.index} of version {bucket.version} carries {len(bucket.digests)} digests, the "
            f"weight plan {plan.hash} has {len(tensors)} tensors there"
        )
    for tensor, expected in zip(tensors, bucket.digests, strict=True):
        found = digest(reader.view(tensor.offset, tensor.nbytes))
        if found != expected:
            raise SyncError(
                f"tensor {tensor.name!r} (bucket {bucket.index}, version {bucket.version}) arrived damaged: "
                f"digest {found:016x}, the trainer sent {expected:016x}"
            )
