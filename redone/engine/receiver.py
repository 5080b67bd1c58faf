"""What one rank of an engine receives of a weight update: the same for every engine, and without one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from torch import Tensor

from redone.engine.rollout import START_FAILURES
from redone.errors import SyncError
from redone.types import TensorMeta, WeightBucket
from redone.weights.digest import Channel, Reader, verify
from redone.weights.open import open_reader
from redone.weights.plan import bucket_tensors, plan_from_json, torch_dtype


class Receiver:
    """One update, bucket by bucket, out of the channel that the trainer writes."""

    def __init__(self, plan_json: str) -> None:
        self._plan = plan_from_json(plan_json)
        self._reader: Reader | None = None

    def load(
        self,
        bucket: WeightBucket,
        names: Collection[str],
        install: Callable[[Reader, Sequence[TensorMeta]], object],
    ) -> str | None:
        """Verify every byte of `bucket`, then install its tensors that are among `names`.

        Returns what went wrong, in one sentence, because engines carry plain values between processes.
        """
        tensors = bucket_tensors(self._plan, bucket.index)
        try:
            if self._reader is None or self._reader.location != bucket.location:
                self._reader = open_reader(bucket.location, self._plan)
            self._reader.fetch(bucket.index)
            verify(self._plan, bucket, self._reader)
            wanted = [t for t in tensors if t.name in names]
            if wanted:
                install(self._reader, wanted)
        except SyncError as error:
            self._reader = None  # leaves a collective channel, whose other members then need not wait
            return str(error)
        except (*START_FAILURES, IndexError) as error:
            self._reader = None
            span = f"{tensors[0].name!r} .. {tensors[-1].name!r}"
            return (
                f"bucket {bucket.index} of version {bucket.version} ({span}): {type(error).__name__}: {error}"
            )
        return None


def named_tensors(reader: Channel, tensors: Sequence[TensorMeta]) -> Iterator[tuple[str, Tensor]]:
    """(name, view of the received bytes) of each tensor."""
    for t in tensors:
        yield t.name, reader.view(t.offset, t.nbytes).view(torch_dtype(t.dtype)).view(t.shape)
