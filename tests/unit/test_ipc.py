"""weights.channel=ipc without CUDA: slots, answers and faults, with mapped files in place of GPU memory.

CudaHandles itself needs a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from redone.config.check import check_config
from redone.config.load import config_from_dict
from redone.errors import ConfigError, SyncError
from redone.types import WeightBucket
from redone.weights.collective import bucket_span
from redone.weights.digest import bucket_digests, digest, verify
from redone.weights.ipc import SLOTS, IpcReader, IpcWriter
from redone.weights.plan import make_plan

PLAN = make_plan([(f"layers.{i}.w", "float32", (3 + i, 50)) for i in range(9)], 2000)


class FileHandles:
    """Memory of a "device": files that both ends map."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.names: dict[int, str] = {}

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.count += 1
        name = str(self.folder / f"slot{self.count}")
        data = torch.from_file(name, shared=True, size=nbytes, dtype=torch.uint8)
        self.names[data.data_ptr()] = name
        return data

    def export(self, data: torch.Tensor) -> dict[str, str]:
        return {"gpu-0": f"{self.names[data.data_ptr()]} {data.numel()}"}

    def attach(self, handles: dict[str, str]) -> torch.Tensor:
        name, size = handles["gpu-0"].split()
        return torch.from_file(name, shared=True, size=int(size), dtype=torch.uint8)


@pytest.fixture
def writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[IpcWriter]:
    """Trainer rank 0 of 1, for two engine ranks."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        yield IpcWriter(PLAN, host="127.0.0.1", readers=2, timeout_s=60.0, handles=FileHandles(tmp_path))
    finally:
        dist.destroy_process_group()


def publish(writer: IpcWriter, seed: int) -> Iterator[WeightBucket]:
    """As the trainer does: tensor by tensor, a bucket's digests before its slot is filled again."""
    generator = torch.Generator().manual_seed(seed)
    location = writer.begin()
    for index, (first, last) in enumerate(PLAN.buckets):
        digests = []
        for t in PLAN.tensors[first:last]:
            view = writer.view(t.offset, t.nbytes)
            view.copy_(torch.randn(t.shape, generator=generator).view(torch.uint8).flatten())
            digests.append(digest(view))
        writer.announce(*bucket_span(PLAN, index))
        yield WeightBucket(version=seed, index=index, location=location, digests=tuple(digests))
    writer.finish()


class Engines:
    """Two engine ranks, the second one slow; what it took, as vLLM keeps a layer's tensors until the last."""

    def __init__(self, writer: IpcWriter) -> None:
        self.handles, self.readers = writer._handles, list[IpcReader]()
        self.kept: list[tuple[WeightBucket, list[torch.Tensor]]] = []

    def take(self, bucket: WeightBucket) -> None:
        if not self.readers:
            self.readers = [IpcReader(bucket.location, PLAN, self.handles) for _ in range(2)]
        for rank, reader in enumerate(self.readers):
            time.sleep(0.02 * rank)
            reader.fetch(bucket.index)
            verify(PLAN, bucket, reader)
        first, last = PLAN.buckets[bucket.index]
        self.kept.append((bucket, [reader.view(t.offset, t.nbytes) for t in PLAN.tensors[first:last]]))


def test_slots_are_filled_again_only_when_all_have_taken_them(writer: IpcWriter) -> None:
    """Two versions; copies outlive the slots."""
    assert len(PLAN.buckets) > 2 * SLOTS
    for version in (1, 2):
        engines = Engines(writer)
        with ThreadPoolExecutor(1) as thread:
            taken = [thread.submit(engines.take, bucket) for bucket in publish(writer, version)]
            for one in taken:
                one.result()
        assert len(engines.kept) == len(PLAN.buckets) and writer._slots == []
        for bucket, views in engines.kept:
            assert tuple(map(digest, views)) == bucket.digests


def test_an_engine_that_takes_nothing_is_reported(writer: IpcWriter) -> None:
    began, writer._timeout_s = time.monotonic(), 2.0
    with pytest.raises(SyncError, match=r"bucket 0 was not taken by all 2 engine ranks within 2 s"):
        for bucket in publish(writer, 1):  # one of the two answers
            if bucket.index == 0:
                reader = IpcReader(bucket.location, PLAN, writer._handles)
            reader.fetch(bucket.index)
    assert time.monotonic() - began < 20


def test_a_changed_bit_is_named(writer: IpcWriter) -> None:
    location = writer.begin()
    slot = writer._slots[0].fill_(7)
    digests = bucket_digests(PLAN, 0, writer)
    bucket = WeightBucket(version=1, index=0, location=location, digests=digests)
    slot[3] ^= 1
    reader = IpcReader(location, PLAN, writer._handles)
    reader.fetch(0)
    with pytest.raises(SyncError, match=f"tensor '{PLAN.tensors[0].name}'.*arrived damaged"):
        verify(PLAN, bucket, reader)


def test_it_needs_shared_gpus() -> None:
    values = {"model": {"path": "m"}, "data": {"train": ["t"]}, "rewards": {"default": {"family": "exact"}},
              "weights": {"channel": "ipc"}}  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"channel=ipc needs engines and trainer on the same GPUs \(there is no"
    ):
        check_config(config_from_dict(values), None, "generate")
    own = {**values, "cluster": {"device": "cuda"}, "rollout": {"gpus_per_node": 1}}
    with pytest.raises(ConfigError, match=r"\(rollout.gpus_per_node=1\); use collective"):
        check_config(config_from_dict(own), None, "generate")
    check_config(config_from_dict({**values, "cluster": {"device": "cuda"}}), None, "generate")
    with pytest.raises(ConfigError, match="delta=true with channel=ipc"):
        config_from_dict({**values, "weights": {"channel": "ipc", "delta": True}})
