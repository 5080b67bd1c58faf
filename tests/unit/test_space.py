"""A disk that cannot hold the run's checkpoint is refused before anything is written or started."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.numpy import load_file

from redone.config.load import load_config
from redone.data.tiny import make_tiny_model
from redone.errors import RunFolderError
from redone.pipeline.space import check_space, parameter_count, space_needed

CONFIG = "model: {path: MODEL, dtype: DTYPE}\ndata: {train: [t]}\nrewards: {default: {family: exact}}\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("space") / "model", "qwen3")


def config(model: Path, place: Path, dtype: str, *overrides: str) -> Any:
    (place / "c.yaml").write_text(CONFIG.replace("MODEL", str(model)).replace("DTYPE", dtype))
    return load_config(place / "c.yaml", [f"run.dir={place / 'not' / 'there'}", *overrides])


def test_the_bytes_of_a_run(model: Path, tmp_path: Path) -> None:
    count = sum(tensor.size for tensor in load_file(model / "model.safetensors").values())
    assert parameter_count(model) == count > 0
    assert space_needed(config(model, tmp_path, "float32")) == count * (4 + 8 + 4)
    assert space_needed(config(model, tmp_path, "bfloat16")) == count * (2 + 4 + 8 + 2)
    nothing = ("checkpoint.at_end=false", "checkpoint.export_hf=false")
    assert space_needed(config(model, tmp_path, "float32", *nothing)) == 0
    assert parameter_count(tmp_path) == 0
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert parameter_count(tmp_path) == 0


def test_too_little_room_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(model, tmp_path, "float32")
    need = space_needed(cfg)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need))
    check_space(cfg)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need - 1))
    with pytest.raises(
        RunFolderError, match=r"run\.dir=.*not/there: .* MB are free; free some, or use another"
    ):
        check_space(cfg)
    assert not (tmp_path / "not").exists()
