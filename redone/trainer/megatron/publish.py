"""The trainer's end of the weight exchange: gather, rename, write, digest, bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from redone.trainer.megatron.export import Exporter
from redone.trainer.megatron.names import Joined
from redone.types import TensorMeta, WeightBucket, WeightPlan
from redone.weights.collective import CollectiveWriter, bucket_span
from redone.weights.digest import Writer, digest
from redone.weights.plan import torch_dtype
from redone.weights.quantize import quantized_tensors
from redone.weights.units import unit_of

WRITERS = 2  # threads that copy and hash, so that neither waits for the other


class Publisher:
    """Writes version after version into a channel. Every rank calls publish; rank 0 writes.

    Args:
        delta: leave out units (redone.weights.units) of which no rank's shards changed since the last time.
        open_writer: location -> this rank's end of the channel; None where rank 0 alone has one.
        quantize: the plan is of block-quantised weights (redone.weights.quantize).
    """

    def __init__(
        self,
        exporter: Exporter,
        plan: WeightPlan,
        delta: bool,
        open_writer: Callable[[str], Writer | None],
        quantize: bool = False,
    ) -> None:
        self.exporter, self.plan, self.delta, self._open = exporter, plan, delta, open_writer
        self.quantize = quantize
        self._digests: dict[str, Future[int]] = {}  # of what the channel holds, by Hugging Face name (rank 0)
        self._shards: dict[str, int] = {}  # of this rank's parameters, by Megatron name
        self._last: tuple[str, int] | None = None  # location and version of the last complete publication
        self._writer: tuple[str, Writer | None] | None = None
        self._threads = ThreadPoolExecutor(WRITERS, thread_name_prefix="publish")

    def publish(self, location: str, version: int, bucket_bytes: int) -> Iterator[WeightBucket]:
        """Collective generator: every rank must exhaust it, rank 0 gets the buckets as they are written.

        Raises SyncError when the channel has no room.
        """
        base = self._last[1] if self._last is not None and self._last[0] == location else None
        self._last = None
        skip = self._unchanged_units() if self.delta else frozenset()
        if base is None:
            skip = frozenset()
        address = self._open_channel(location)
        places = {meta.name: meta for meta in self.plan.tensors}
        last_of = {self.plan.tensors[last - 1].name: i for i, (_, last) in enumerate(self.plan.buckets)}
        written = 0
        gathered = self.exporter.received_bytes
        skipped = [meta.name for meta in self.plan.tensors if unit_of(meta.name) in skip]
        stream = self.exporter.stream(bucket_bytes, frozenset(skipped))
        done: Iterator[tuple[str, Joined | Tensor | None]] = stream
        if self.quantize:
            done = quantized_tensors((name, joined and joined.tensor()) for name, joined in stream)
        for name in (meta.name for meta in self.plan.tensors):
            if name not in skipped:
                found, tensor = next(done)
                assert found == name, f"exporter gave {found} in the place of {name}"
                if tensor is not None:
                    self._digests[name] = self._write(places[name], tensor)
                    written += places[name].nbytes
            if name in last_of:
                index = last_of[name]
                first, last = self.plan.buckets[index]
                if dist.get_rank() == 0:
                    for meta in self.plan.tensors[first:last]:
                        self._digests[meta.name].result()  # written; an error goes no further
                if self.writer is not None:
                    self.writer.announce(*bucket_span(self.plan, index))
                if dist.get_rank() != 0:
                    continue
                total = self.exporter.received_bytes
                yield self._bucket(address, version, index, skip, base, written, total - gathered)
                written, gathered = 0, total
        assert next(done, None) is None, "the exporter has more tensors than the plan"
        if self.writer is not None:
            self.writer.finish()
        self._last = (location, version)

    def publish_again(self, location: str) -> None:
        """Rank 0: the last version for engines that missed it (weights.channel=collective)."""
        assert isinstance(self.writer, CollectiveWriter)
        spans = [bucket_span(self.plan, index) for index in range(len(self.plan.buckets))]
        self.writer.send_again(location, spans)

    @property
    def writer(self) -> Writer | None:
        """This rank's end of the channel that was published into last."""
        return None if self._writer is None else self._writer[1]

    def _open_channel(self, location: str) -> str:
        """The address of the publication that begins."""
        if self._writer is None or self._writer[0] != location:
            self._close_writer()
            self._writer = (location, self._open(location))
        return "" if self.writer is None else self.writer.begin()

    def _bucket(
        self,
        location: str,
        version: int,
        index: int,
        skip: frozenset[str],
        base: int | None,
        written: int,
        gathered: int,
    ) -> WeightBucket:
        first, last = self.plan.buckets[index]
        tensors = self.plan.tensors[first:last]
        return WeightBucket(
            version=version,
            index=index,
            location=location,
            digests=tuple(self._digests[meta.name].result() for meta in tensors),
            base=base if skip else None,
            unchanged=tuple(i for i, meta in enumerate(tensors) if unit_of(meta.name) in skip),
            written=written,
            gathered=gathered,
        )

    def _unchanged_units(self) -> frozenset[str]:
        """Units of which no rank's shard has another digest than at the last call."""
        changed: set[str] = set()
        for rule in self.exporter.rules:
            parameter = self.exporter.parameters.get(rule.mcore)
            if parameter is None:
                continue
            now = digest(_bytes(parameter))
            if self._shards.get(rule.mcore) != now:
                changed |= {unit_of(name) for name in rule.hf}
            self._shards[rule.mcore] = now
        everyone: list[set[str]] = [set()] * dist.get_world_size()
        dist.all_gather_object(everyone, changed)
        return frozenset({unit_of(meta.name) for meta in self.plan.tensors} - set().union(*everyone))

    def _write(self, meta: TensorMeta, tensor: Joined | Tensor) -> Future[int]:
        """Copy into the channel, in a thread; the digest of what is there then, while caches hold it."""
        assert self.writer is not None
        view = self.writer.view(meta.offset, meta.nbytes)

        def write() -> int:
            out = view.view(torch_dtype(meta.dtype)).view(meta.shape)
            out.copy_(tensor) if isinstance(tensor, Tensor) else tensor.write(out)
            return digest(view)

        return self._threads.submit(write)

    def close(self) -> None:
        self._threads.shutdown()
        self._close_writer()

    def _close_writer(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self._writer = None


def _bytes(tensor: Tensor) -> Tensor:
    """Flat uint8 view of a tensor, on CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
