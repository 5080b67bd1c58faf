"""Which Hugging Face tensor lies where in the flat weight space, and how it is cut into buckets."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence

import torch

from redone.errors import SyncError
from redone.types import TensorMeta, WeightPlan

ALIGNMENT = 64  # bytes: a view of any dtype at any offset is aligned, and rows start on cache lines


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`. Raises SyncError when there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise SyncError(f"weight plan: {name!r} is not a torch dtype; use float32, bfloat16, ...")
    return dtype


def make_plan(metas: Sequence[tuple[str, str, tuple[int, ...]]], bucket_bytes: int) -> WeightPlan:
    """Lay tensors out in the given order.

    Args:
        metas: (Hugging Face name, torch dtype name, shape) of every tensor.
        bucket_bytes: a bucket ends before it would grow past this; a larger tensor is a bucket of its own.

    Returns:
        The plan; its hash covers names, dtypes, shapes and offsets, not the cut into buckets.

    Raises:
        SyncError: no tensors, a name that occurs twice, or an unknown dtype.
    """
    if not metas:
        raise SyncError("weight plan: no tensors; the trainer's name table matched nothing of this model")
    tensors: list[TensorMeta] = []
    edges: list[int] = [0]
    offset = bucket_start = 0
    seen: set[str] = set()
    for name, dtype, shape in metas:
        if name in seen:
            raise SyncError(f"weight plan: tensor {name!r} occurs twice")
        seen.add(name)
        nbytes = torch.Size(shape).numel() * torch_dtype(dtype).itemsize
        if tensors and offset + nbytes - bucket_start > bucket_bytes:
            edges.append(len(tensors))
            bucket_start = offset
        tensors.append(TensorMeta(name=name, dtype=dtype, shape=tuple(shape), offset=offset, nbytes=nbytes))
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    edges.append(len(tensors))
    # A bucket must not be empty: the first tensor may itself be larger than bucket_bytes.
    buckets = tuple((a, b) for a, b in itertools.pairwise(edges) if a < b)
    return WeightPlan(tensors=tuple(tensors), buckets=buckets, total_bytes=offset, hash=_hash(tensors))


def _hash(tensors: Sequence[TensorMeta]) -> str:
    rows = [[t.name, t.dtype, list(t.shape), t.offset] for t in tensors]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]


def bucket_tensors(plan: WeightPlan, index: int) -> tuple[TensorMeta, ...]:
    """The tensors of bucket `index`. Raises SyncError when the plan has no such bucket."""
    if not 0 <= index < len(plan.buckets):
        raise SyncError(
            f"bucket {index} is not in the weight plan {plan.hash}, which has {len(plan.buckets)} buckets"
        )
    first, last = plan.buckets[index]
    return plan.tensors[first:last]


def plan_to_json(plan: WeightPlan) -> str:
    """Text form of a plan, for processes that receive only plain values."""
    return json.dumps(dataclasses.asdict(plan))


def plan_from_json(text: str) -> WeightPlan:
    """Inverse of plan_to_json."""
    raw = json.loads(text)
    tensors = tuple(TensorMeta(**{**t, "shape": tuple(t["shape"])}) for t in raw["tensors"])
    buckets = tuple((first, last) for first, last in raw["buckets"])
    return WeightPlan(tensors=tensors, buckets=buckets, total_bytes=raw["total_bytes"], hash=raw["hash"])
