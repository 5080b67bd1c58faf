"""A saved batch is the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from redone.errors import RunFolderError
from redone.record.batches import FIELDS, read_batch, write_batch
from redone.types import Batch, TrainGroup, Trajectory


def batch(old: bool, routed: bool = False) -> Batch:
    rng = np.random.default_rng(0)

    def trajectory(length: int) -> Trajectory:
        def floats() -> np.ndarray:
            return rng.normal(size=length).astype(np.float32)

        def routes(tokens: int) -> np.ndarray | None:
            return rng.integers(0, 8, (tokens, 3, 2)).astype(np.int16) if routed else None

        return Trajectory(
            token_ids=rng.integers(0, 99, length).astype(np.int32),
            loss_mask=rng.random(length) > 0.3,
            advantages=floats(),
            engine_logprobs=floats(),
            old_logprobs=floats() if old else None,
            version=length,
            routes=routes(length),
        )

    groups = [
        TrainGroup(
            prompt_id=f"p{i}",
            prompt_ids=rng.integers(0, 99, 3 + i).astype(np.int32),
            trajectories=tuple(trajectory(n) for n in lengths),
            prompt_routes=rng.integers(0, 8, (3 + i, 3, 2)).astype(np.int16) if routed else None,
        )
        for i, lengths in enumerate([(4, 1), (7,), (2, 3, 5)])
    ]
    return Batch.of(groups)


@pytest.mark.parametrize(("old", "routed"), [(True, True), (False, False), (True, False)])
def test_round_trip(tmp_path: Path, old: bool, routed: bool) -> None:
    written = batch(old, routed)
    absent = {"ref_logprobs", *([] if old else ["old_logprobs"]), *([] if routed else ["routes"])}
    write_batch(tmp_path / "deep" / "batch.npz", written, parts=3)
    read, parts = read_batch(tmp_path / "deep" / "batch.npz")
    assert parts == 3 and read.num_loss_tokens == written.num_loss_tokens
    for ours, theirs in zip(read.groups, written.groups, strict=True):
        assert ours.prompt_id == theirs.prompt_id and (ours.prompt_ids == theirs.prompt_ids).all()
        assert routed == (ours.prompt_routes is not None)
        if routed:
            assert (ours.prompt_routes == theirs.prompt_routes).all()
        for a, b in zip(ours.trajectories, theirs.trajectories, strict=True):
            assert a.version == b.version
            for field in FIELDS:
                x, y = getattr(a, field), getattr(b, field)
                assert (x is None) == (y is None) == (field in absent)
                if x is not None:
                    assert x.dtype == y.dtype and (x == y).all()


def test_what_is_no_batch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_text("no")
    for name in ("x.npz", "none.npz"):
        with pytest.raises(RunFolderError, match=f"{name} is no saved batch"):
            read_batch(tmp_path / name)
