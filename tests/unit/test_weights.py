"""Weight plan, channel, digests and canary, on plain tensors."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from redone.config.schema import CanaryConfig, WeightsConfig
from redone.errors import SyncError
from redone.types import WeightBucket
from redone.weights.channel import ShmReader, ShmWriter, channel_path, sweep_stale
from redone.weights.digest import bucket_digests, digest, verify
from redone.weights.plan import bucket_tensors, make_plan, plan_from_json, plan_to_json
from redone.weights.sync import Moved, canary_sequences, compare_canary
from redone.weights.units import to_load, unit_of

METAS = [
    ("embed.weight", "float32", (10, 3)),  # 120 bytes
    ("layer.0.weight", "bfloat16", (4, 4)),  # 32 bytes
    ("layer.0.norm", "float32", (4,)),  # 16 bytes
    ("lm_head.weight", "float32", (10, 3)),
]


def test_plan_is_aligned_and_covers_every_tensor_once() -> None:
    plan = make_plan(METAS, bucket_bytes=200)
    assert [t.offset for t in plan.tensors] == [0, 128, 192, 256]
    assert [t.nbytes for t in plan.tensors] == [120, 32, 16, 120]
    assert plan.total_bytes == 384
    assert plan.buckets == ((0, 2), (2, 4))
    assert [t.name for i in range(2) for t in bucket_tensors(plan, i)] == [name for name, _, _ in METAS]


@pytest.mark.parametrize("bucket_bytes", [1, 64, 121, 160, 10_000])
def test_any_bucket_size_gives_the_same_layout(bucket_bytes: int) -> None:
    plan, reference = make_plan(METAS, bucket_bytes), make_plan(METAS, 10_000)
    assert plan.hash == reference.hash and plan.tensors == reference.tensors
    assert [first for first, _ in plan.buckets] == [0, *(last for _, last in plan.buckets[:-1])]
    assert plan.buckets[-1][1] == len(METAS)
    for i, (first, last) in enumerate(plan.buckets):
        size = plan.tensors[last - 1].offset + plan.tensors[last - 1].nbytes - plan.tensors[first].offset
        assert last - first == 1 or size <= bucket_bytes, f"bucket {i} is too large"


def test_hash_covers_names_dtypes_shapes_and_order() -> None:
    changed = [
        [("other.weight", *METAS[0][1:]), *METAS[1:]],
        [METAS[0], ("layer.0.weight", "float16", (4, 4)), *METAS[2:]],
        [("embed.weight", "float32", (3, 10)), *METAS[1:]],
        METAS[::-1],
    ]
    hashes = {make_plan(m, 200).hash for m in [METAS, *changed]}
    assert len(hashes) == 5


def test_plan_refuses_bad_input() -> None:
    with pytest.raises(SyncError, match=r"'lm_head\.weight' occurs twice"):
        make_plan([*METAS, METAS[-1]], 200)
    with pytest.raises(SyncError, match="'float31' is not a torch dtype"):
        make_plan([("a", "float31", (1,))], 200)
    with pytest.raises(SyncError, match="no tensors"):
        make_plan([], 200)
    with pytest.raises(SyncError, match="bucket 2 is not in"):
        bucket_tensors(make_plan(METAS, 200), 2)


def test_plan_survives_json() -> None:
    plan = make_plan(METAS, 200)
    assert plan_from_json(plan_to_json(plan)) == plan


def test_reader_sees_what_the_writer_wrote(tmp_path: Path) -> None:
    location = str(tmp_path / "channel")
    writer = ShmWriter(location, 384)
    writer.view(128, 16).copy_(torch.arange(16, dtype=torch.uint8))
    reader = ShmReader(location, 384)
    assert reader.view(128, 16).tolist() == list(range(16))
    writer.view(128, 1).fill_(77)
    assert int(reader.view(128, 1)) == 77, "the mapping is shared, not a copy"
    with pytest.raises(SyncError, match="outside its 384 bytes"):
        reader.view(380, 5)
    view = reader.view(0, 384)
    writer.close()
    assert not os.path.exists(location)
    assert int(view[128]) == 77, "a view keeps the memory"
    with pytest.raises(SyncError, match="closed"):
        writer.view(0, 1)
    writer.close()


def test_reader_refuses_a_missing_or_foreign_file(tmp_path: Path) -> None:
    with pytest.raises(SyncError, match="does not exist"):
        ShmReader(str(tmp_path / "none"), 64)
    writer = ShmWriter(str(tmp_path / "channel"), 128)
    with pytest.raises(SyncError, match="has 128 bytes, the weight plan says 64"):
        ShmReader(writer.location, 64)
    again = ShmWriter(writer.location, 64)
    assert ShmReader(writer.location, 64).view(0, 64).numel() == 64
    again.close(keep=True)
    assert os.path.exists(writer.location)
    writer.close()


def test_full_channel_names_need_free_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = str(tmp_path / "channel")
    with pytest.raises(SyncError, match=rf"need {2**60}\. Remedy: set weights\.dir or REDONE_SHM_DIR"):
        ShmWriter(location, 2**60)
    assert not os.path.exists(location)
    stat = namedtuple("stat", "f_bavail f_frsize")
    monkeypatch.setattr(os, "fstatvfs", lambda fd: stat(10, 4096))
    with pytest.raises(SyncError, match="has 40960 bytes free, the weights need 65536"):
        ShmWriter(location, 65536)
    monkeypatch.undo()
    full = OSError(28, "No space left on device")

    def refuse(fd: int, offset: int, length: int) -> None:
        raise full

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(SyncError, match="the weights need 65536"):
        ShmWriter(location, 65536)
    assert not os.path.exists(location)
    with pytest.raises(SyncError, match=r"does not exist; create it or change weights\.dir"):
        ShmWriter(str(tmp_path / "no" / "channel"), 64)


def test_channel_path_prefers_environment_then_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDONE_SHM_DIR", raising=False)
    assert channel_path(WeightsConfig(), "7-run") == "/dev/shm/redone-7-run"
    assert channel_path(WeightsConfig(dir="/elsewhere"), "7-run") == "/elsewhere/redone-7-run"
    monkeypatch.setenv("REDONE_SHM_DIR", str(tmp_path))
    assert channel_path(WeightsConfig(dir="/elsewhere"), "7-run") == f"{tmp_path}/redone-7-run"


def test_sweep_removes_only_files_of_dead_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDONE_SHM_DIR", raising=False)
    cfg = WeightsConfig(dir=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead, alive = f"{child.pid}-a", f"{os.getpid()}-b"
    Path(channel_path(cfg, dead)).touch()
    Path(channel_path(cfg, alive)).touch()
    (tmp_path / "redone-notes.txt").touch()
    held = ShmWriter(channel_path(cfg, f"{child.pid}-held"), 64)
    assert sweep_stale(cfg) == [channel_path(cfg, dead)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [f"redone-{alive}", "redone-notes.txt", f"redone-{child.pid}-held"]
    )
    held.close(keep=True)
    assert sweep_stale(cfg) == [held.location]
    assert sweep_stale(WeightsConfig(dir=str(tmp_path / "none"))) == []


def _published(tmp_path: Path) -> tuple[ShmWriter, list[WeightBucket]]:
    plan = make_plan(METAS, 200)
    writer = ShmWriter(str(tmp_path / "channel"), plan.total_bytes)
    writer.view(0, plan.total_bytes).copy_(torch.arange(plan.total_bytes) % 251)
    buckets = [
        WeightBucket(version=5, index=i, location=writer.location, digests=bucket_digests(plan, i, writer))
        for i in range(len(plan.buckets))
    ]
    return writer, buckets


def test_verify_names_tensor_bucket_and_version(tmp_path: Path) -> None:
    writer, buckets = _published(tmp_path)
    plan = make_plan(METAS, 200)
    for bucket in buckets:
        verify(plan, bucket, writer)
    for tensor, index in zip(plan.tensors, (0, 0, 1, 1), strict=True):
        for position in (0, tensor.nbytes - 1):
            byte = writer.view(tensor.offset + position, 1)
            byte.bitwise_xor_(4)
            with pytest.raises(SyncError, match=rf"{tensor.name}' \(bucket {index}, version 5\).*damaged"):
                verify(plan, buckets[index], writer)
            byte.bitwise_xor_(4)
    short = dataclasses.replace(buckets[0], digests=buckets[0].digests[:1])
    with pytest.raises(SyncError, match="carries 1 digests"):
        verify(plan, short, writer)
    writer.close()


def test_digest_is_xxh3_64() -> None:
    assert (
        digest(torch.empty(0, dtype=torch.uint8)) == 0x2D06800538D394C2
    )  # published value of the empty input
    data = torch.arange(100, dtype=torch.uint8)
    assert digest(data) != digest(data.flip(0))


def test_canary_sequences_are_fixed() -> None:
    cfg = CanaryConfig(prompts=3, length=8)
    first = canary_sequences(cfg, 100, seed=0)
    assert first == canary_sequences(cfg, 100, seed=0)
    assert first != canary_sequences(cfg, 100, seed=1)
    assert [len(s) for s in first] == [8, 8, 8]
    assert all(0 <= t < 100 for s in first for t in s)


def _scores(*rows: list[float]) -> list[np.ndarray]:
    return [np.asarray(r, np.float32) for r in rows]


def test_canary_reports_the_largest_and_mean_difference() -> None:
    trainer = _scores([-1.0, -2.0], [-3.0])
    close = _scores([-1.0, -2.0005], [-3.0])
    metrics = compare_canary([trainer, trainer], [trainer, close], tolerance=1e-3, version=4)
    assert metrics["sync/canary_max_abs_diff"] == pytest.approx(5e-4, rel=1e-3)
    assert metrics["sync/canary_mean_abs_diff"] == pytest.approx(5e-4 / 6, rel=1e-3)


@pytest.mark.parametrize("bad", [-2.5, float("nan"), float("inf")])
def test_canary_names_engine_prompt_token_values_and_tolerance(bad: float) -> None:
    trainer = _scores([-1.0, -2.0], [-3.0, -2.0])
    wrong = _scores([-1.0, -2.0], [-3.0, bad])
    expected = (
        rf"version 4: engine 1 .*prompt 1, token 2: trainer -2\.0+, engine {bad:.6f},.*tolerance=0\.001"
    )
    with pytest.raises(SyncError, match=expected):
        compare_canary([trainer, trainer], [trainer, wrong], tolerance=1e-3, version=4)


def test_canary_refuses_missing_scores() -> None:
    trainer = _scores([-1.0, -2.0])
    with pytest.raises(SyncError, match="scored 1 tokens of prompt 0, the trainer 2"):
        compare_canary([trainer], [_scores([-1.0])], tolerance=1.0, version=1)
    with pytest.raises(SyncError, match="no engine scored anything"):
        compare_canary([], [], tolerance=1.0, version=1)


def test_every_flipped_bit_is_named(tmp_path: Path) -> None:
    """A random bit of a random tensor, 300 times: the digest names that tensor, and passes when mended."""
    plan = make_plan(METAS, 200)
    writer = ShmWriter(str(tmp_path / "w"), plan.total_bytes)
    rng = np.random.default_rng(5)
    writer.view(0, plan.total_bytes).copy_(torch.from_numpy(rng.integers(0, 256, plan.total_bytes, np.uint8)))
    buckets = [
        WeightBucket(version=1, index=i, location=writer.location, digests=bucket_digests(plan, i, writer))
        for i in range(len(plan.buckets))
    ]
    for _ in range(300):
        i = int(rng.integers(len(buckets)))
        victim = bucket_tensors(plan, i)[int(rng.integers(len(buckets[i].digests)))]
        byte = writer.view(victim.offset + int(rng.integers(victim.nbytes)), 1)
        bit = 1 << int(rng.integers(8))
        byte.bitwise_xor_(bit)
        with pytest.raises(SyncError, match=f"tensor '{victim.name}'"):
            verify(plan, buckets[i], writer)
        byte.bitwise_xor_(bit)
        verify(plan, buckets[i], writer)
    writer.close()


def test_units_of_a_delta_update() -> None:
    assert unit_of("model.layers.12.mlp.experts.3.up_proj.weight") == "model.layers.12."
    assert unit_of("model.layers.1.input_layernorm.weight") != unit_of("model.layers.12.mlp.gate.weight")
    assert unit_of("lm_head.weight") == "lm_head.weight"
    plan = make_plan(METAS, 10_000)
    bucket = WeightBucket(version=5, index=0, location="x", digests=(0,) * 4, base=4, unchanged=(1, 2))
    tensors = bucket_tensors(plan, 0)
    assert [t.name for t in to_load(bucket, tensors, held=4)] == ["embed.weight", "lm_head.weight"]
    for held in (3, None):  # an engine that holds anything else loads everything
        assert to_load(bucket, tensors, held) == list(tensors)
    whole = dataclasses.replace(bucket, base=None)
    assert to_load(whole, tensors, held=None) == list(tensors)


def test_moved_bytes_are_counted() -> None:
    plan = make_plan(METAS, 200)
    moved = Moved(plan)
    buckets = [
        WeightBucket(version=2, index=0, location="x", digests=(0, 0), base=1, unchanged=(1,), written=120),
        WeightBucket(version=2, index=1, location="x", digests=(0, 0), written=272, gathered=60),
    ]
    assert list(moved.watch(buckets)) == buckets
    metrics = moved.metrics()
    assert metrics["sync/bytes_needed"] == 120 + 16 + 120 and metrics["sync/bytes_written"] == 392
    assert metrics["sync/bytes_ratio"] == pytest.approx(392 / 256)
    assert metrics["sync/bytes_gathered"] == 60
