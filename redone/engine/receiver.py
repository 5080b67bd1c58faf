"""What one rank of an engine receives of a weight update: the same for every engine, and without one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from torch import Tensor

from redone.engine.rollout import START_FAILURES
from redone.errors import SyncError
from redone.types import TensorMeta, WeightBucket
from redone.weights.channel import ShmReader
from redone.weights.digest import verify
from redone.weights.plan import bucket_tensors, plan_from_json, torch_dtype


class Receiver:
    """One update, bucket by bucket, out of the file that the trainer writes."""

    def __init__(self, plan_json: str) -> None:
        self._plan = plan_from_json(plan_json)
        self._reader: ShmReader | None = None

    def load(
        self,
        bucket: WeightBucket,
        names: Collection[str],
        install: Callable[[ShmReader, Sequence[TensorMeta]], object],
    ) -> str | None:
        """Verify every byte of `bucket`, then install its tensors that are among `names`.

        Returns what went wrong, in one sentence, because engines carry plain values between processes.
        """
        tensors = bucket_tensors(self._plan, bucket.index)
        try:
            if self._reader is None or self._reader.location != bucket.location:
                self._reader = ShmReader(bucket.location, self._plan.total_bytes)
            verify(self._plan, bucket, self._reader)
            wanted = [t for t in tensors if t.name in names]
            if wanted:
                install(self._reader, wanted)
        except SyncError as error:
            return str(error)
        except (*START_FAILURES, IndexError) as error:
            span = f"{tensors[0].name!r} .. {tensors[-1].name!r}"
            return (
                f"bucket {bucket.index} of version {bucket.version} ({span}): {type(error).__name__}: {error}"
            )
        return None


def named_tensors(reader: ShmReader, tensors: Sequence[TensorMeta]) -> Iterator[tuple[str, Tensor]]:
    """(name, view of the mapped bytes) of each tensor."""
    for t in tensors:
        yield t.name, reader.view(t.offset, t.nbytes).view(torch_dtype(t.dtype)).view(t.shape)
