"""weights.channel=file: a name that belongs to the run folder, bytes that others read from the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from redone.config.load import config_from_dict
from redone.config.schema import WeightsConfig
from redone.errors import ConfigError, SyncError
from redone.weights.channel import FileWriter, ShmReader, location_of, sweep_stale


def test_the_name_belongs_to_the_run_folder(tmp_path: Path) -> None:
    cfg = WeightsConfig(channel="file", dir=str(tmp_path / "new" / "folder"))
    first = location_of(cfg, tmp_path / "runs/a", "a")
    assert first == location_of(cfg, tmp_path / "runs/a", "a"), (
        "the next attempt takes over what a dead one left"
    )
    assert first != location_of(cfg, tmp_path / "others/a", "a")
    assert Path(first).parent.is_dir()
    assert str(os.getpid()) in location_of(WeightsConfig(), tmp_path / "runs/a", "a")


def test_files_of_other_nodes_are_not_swept(tmp_path: Path) -> None:
    (tmp_path / "redone-1-dead").touch()
    (tmp_path / "redone-999999999-dead").touch()
    assert sweep_stale(WeightsConfig(channel="file", dir=str(tmp_path))) == []


def test_flushed_bytes_are_in_the_file(tmp_path: Path) -> None:
    location = location_of(WeightsConfig(channel="file", dir=str(tmp_path)), tmp_path / "runs/a", "a")
    writer = FileWriter(location, 64)
    for value in (1, 2):
        writer.view(0, 64).copy_(torch.full((64,), value, dtype=torch.uint8))
        writer.announce(0, 64)
        assert Path(location).read_bytes() == bytes([value]) * 64
        assert int(ShmReader(location, 64).view(0, 64).sum()) == 64 * value
    writer.close()
    writer.announce(0, 64)
    assert not Path(location).exists()


def test_it_needs_a_folder(tmp_path: Path) -> None:
    values = {"model": {"path": "m"}, "data": {"train": ["t"]}, "rewards": {"default": {"family": "exact"}}}
    with pytest.raises(ConfigError, match="weights: channel=file needs dir"):
        config_from_dict({**values, "weights": {"channel": "file"}})
    (tmp_path / "file").touch()
    with pytest.raises(SyncError, match=r"weights\.dir=.*name a folder that all nodes share"):
        location_of(WeightsConfig(channel="file", dir=str(tmp_path / "file")), tmp_path, "a")
