"""Gather the sharded model on rank 0 under Hugging Face names, and write Hugging Face folders.

Names, shapes and holders are known on every rank, so nothing is negotiated: for each bucket every holder
sends its shards to rank 0 in one message, and rank 0 joins them.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from redone.errors import ModelError
from redone.layout import ModelShape, layer_ranges
from redone.trainer.megatron.convert import INDEX, SINGLE, local_parameters, tensor_group
from redone.trainer.megatron.names import Joined, Rule, from_shards, hf_tensors, rules, shard_shape

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


@dataclass(frozen=True, slots=True)
class Place:
    """Coordinates of one rank."""

    pipeline: int
    tensor: int
    expert: int
    expert_tensor: int


def _own_place() -> Place:
    return Place(
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_rank(),
    )


class Exporter:
    """Streams the full model to rank 0. Construction and iteration are collective."""

    def __init__(self, modules: Sequence[torch.nn.Module], shape: ModelShape) -> None:
        self.shape = shape
        self.parameters = local_parameters(modules, shape)
        self.rules = tuple(r for r in rules(shape) if not r.alias)
        places: list[Place | None] = [None] * dist.get_world_size()
        dist.all_gather_object(places, _own_place())
        self.places = [p for p in places if p is not None]
        self.received_bytes = 0  # from other ranks, since construction
        self.stages = parallel_state.get_pipeline_model_parallel_world_size()
        chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
        ranges = layer_ranges(shape.num_layers, self.stages, chunks)
        self.stage_of = {i: s for s, parts in enumerate(ranges) for part in parts for i in part}
        self.expert_ranks = parallel_state.get_expert_model_parallel_world_size()

    def stream(self, bucket_bytes: int, skip: Container[str] = ()) -> Iterator[tuple[str, Joined | None]]:
        """(Hugging Face name, its shards on rank 0 and None elsewhere), in the order of `names.hf_tensors`.

        Tensors of `skip` (all of a rule or none of it, the same on every rank) are left out. At most about
        `bucket_bytes` are gathered at a time. Every rank must exhaust the iterator.
        """
        for bucket in self._buckets(bucket_bytes, skip):
            received = self._exchange(bucket)
            for rule in bucket:
                if dist.get_rank() == 0:
                    shards = [received[rule.mcore, t] for t in range(self._parts(rule))]
                    yield from zip(rule.hf, from_shards(rule, self.shape, shards), strict=True)
                else:
                    yield from ((name, None) for name in rule.hf)

    def _parts(self, rule: Rule) -> int:
        return 1 if rule.axis is None else tensor_group(rule)[0]

    def _holder(self, rule: Rule, part: int) -> int:
        """Lowest rank that holds part `part`."""
        if rule.layer is not None:
            stage = self.stage_of[rule.layer]
        else:
            stage = self.stages - 1 if rule.last_stage else 0
        for rank, place in enumerate(self.places):
            if place.pipeline != stage:
                continue
            if rule.expert is None:
                if place.tensor == part:
                    return rank
            elif place.expert_tensor == part and place.expert == self._expert_rank(rule.expert):
                return rank
        raise ModelError(f"no rank holds part {part} of {rule.mcore}")

    def _expert_rank(self, expert: int) -> int:
        return expert // (self.shape.num_experts // self.expert_ranks)

    def _buckets(self, bucket_bytes: int, skip: Container[str]) -> Iterator[list[Rule]]:
        width = next(iter(self.parameters.values())).element_size()
        bucket: list[Rule] = []
        size = 0
        for rule in self.rules:
            if rule.hf[0] in skip:
                continue
            bucket.append(rule)
            size += width * sum(torch.Size(s).numel() for s in rule.hf_shapes)
            if size >= bucket_bytes:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket

    @torch.no_grad()
    def _exchange(self, bucket: Sequence[Rule]) -> dict[tuple[str, int], Tensor]:
        """All shards of the bucket on rank 0 (empty elsewhere), keyed by (Megatron name, part)."""
        me = dist.get_rank()
        by_holder: dict[int, list[tuple[Rule, int]]] = {}
        for rule in bucket:
            for part in range(self._parts(rule)):
                by_holder.setdefault(self._holder(rule, part), []).append((rule, part))
        received: dict[tuple[str, int], Tensor] = {}
        for holder, items in sorted(by_holder.items()):
            if holder == 0 and me == 0:
                received |= {(r.mcore, part): self.parameters[r.mcore].detach() for r, part in items}
            elif me == holder:
                dist.send(torch.cat([self.parameters[r.mcore].detach().flatten() for r, _ in items]), dst=0)
            elif me == 0:
                received |= self._receive(holder, items)
        return received

    def _receive(self, holder: int, items: Sequence[tuple[Rule, int]]) -> dict[tuple[str, int], Tensor]:
        shapes = [torch.Size(shard_shape(r, self.shape, tensor_group(r)[0])) for r, _ in items]
        like = next(iter(self.parameters.values()))
        flat = torch.empty(sum(s.numel() for s in shapes), dtype=like.dtype, device=like.device)
        dist.recv(flat, src=holder)
        self.received_bytes += flat.numel() * flat.element_size()
        parts = flat.split([s.numel() for s in shapes])
        return {
            (rule.mcore, part): data.view(size)
            for (rule, part), data, size in zip(items, parts, shapes, strict=True)
        }


def write_folder(
    exporter: Exporter, source: str | Path, target: str | Path, max_shard_bytes: int = 4 * 2**30
) -> None:
    """Write a Hugging Face folder at `target`: `source`'s config and tokenizer files and the current weights.

    Collective. Written under a temporary name and renamed at the end; an existing `target` is replaced only
    then. Raises ModelError on every rank when rank 0 cannot write (a full disk, for instance).
    """
    target = Path(target)
    writer = FolderWriter(Path(source), target, max_shard_bytes) if dist.get_rank() == 0 else None
    for name, joined in exporter.stream(min(max_shard_bytes, 2**30)):
        if writer is not None and joined is not None:
            writer.add(name, joined.tensor())
    failure = [writer.finish(hf_tensors(exporter.shape)) if writer is not None else None]
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise ModelError(f"cannot export to {target}: {failure[0]}")


class FolderWriter:
    """Collects tensors into safetensors files.

    The first error is kept for `finish`, because the other ranks must be drained before anyone may stop.
    """

    def __init__(self, source: Path, target: Path, max_shard_bytes: int) -> None:
        self.source, self.target, self.limit = source, target, max_shard_bytes
        self.part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        self.files: list[list[str]] = []
        self.pending: dict[str, Tensor] = {}
        self.size = self.total = 0
        self.error: str | None = None
        self._guard(self._copy_side_files)

    def _guard(self, action: Callable[[], None]) -> None:
        if self.error is None:
            try:
                action()
            except (OSError, SafetensorError) as error:
                self.error = str(error)

    def _copy_side_files(self) -> None:
        self.part.mkdir(parents=True)
        for file in self.source.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
                shutil.copyfile(file, self.part / file.name)

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.size + size > self.limit:
            self._guard(self._flush)
        # A copy: the parameter may change before the file is written, and shards may share memory.
        self.pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self.size += size
        self.total += size

    def _flush(self) -> None:
        pending, self.pending, self.size = self.pending, {}, 0
        save_file(pending, self.part / f"part-{len(self.files)}", metadata={"format": "pt"})
        self.files.append(list(pending))

    def finish(self, expected: Sequence[tuple[str, tuple[int, ...]]]) -> str | None:
        """Name the files, rename the folder; the reason when that failed."""
        self._guard(self._flush)
        if self.error is None and [n for names in self.files for n in names] != [n for n, _ in expected]:
            self.error = "the exported tensors are not those of the name table"
        self._guard(self._commit)
        if self.error is not None:
            shutil.rmtree(self.part, ignore_errors=True)
        return self.error

    def _commit(self) -> None:
        count, weight_map = len(self.files), {}
        for i, names in enumerate(self.files):
            file = SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self.part / f"part-{i}").rename(self.part / file)
            weight_map |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
            (self.part / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        old = self.target.with_name(self.part.name + ".old")
        if self.target.exists():
            self.target.rename(old)
        self.part.rename(self.target)
        shutil.rmtree(old, ignore_errors=True)
