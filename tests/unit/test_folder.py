"""The run folder: complete checkpoints or none, and a resume that undoes what came after."""

from __future__ import annotations

from pathlib import Path

import pytest

from redone.config.schema import Config, DataConfig, ExactReward, ModelSection, RunConfig
from redone.errors import RunFolderError
from redone.pipeline.folder import DriverState, RunFolder


def config(root: Path, name: str = "r") -> Config:
    return Config(
        run=RunConfig(name=name, dir=str(root)),
        model=ModelSection(path="m"),
        data=DataConfig(train=("t",)),
        rewards={"default": ExactReward()},
    )


def state(step: int, best: int | None = None, **sizes: int) -> DriverState:
    return DriverState(
        step=step,
        stream={"turn": step},
        val_history=((0, 0.5),),
        best_step=best,
        stream_bytes={f"{k}.jsonl": v for k, v in sizes.items()},
    )


def write_trainer(path: str) -> None:
    Path(path).mkdir()
    (Path(path) / "weights").write_text("w")


def test_save_and_load(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    folder.save(state(3, best=3, metrics=10), write_trainer, keep=2)
    assert folder.steps() == [3]
    assert folder.load_state(3) == state(3, best=3, metrics=10)
    assert (folder.checkpoint(3) / "trainer" / "weights").read_text() == "w"


def test_only_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    for step in (1, 2, 3, 4):
        folder.save(state(step, best=2), write_trainer, keep=2)
    assert folder.steps() == [2, 3, 4]


def test_full_disk_costs_nothing_but_the_new_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    folder.save(state(1), write_trainer, keep=1)

    def full(path: str) -> None:
        write_trainer(path)
        with open("/dev/full", "w") as device:
            device.write("x" * 10_000)

    with pytest.raises(OSError, match="No space left"):
        folder.save(state(2), full, keep=1)
    assert folder.steps() == [1]
    assert [p.name for p in folder.checkpoints.iterdir()] == ["step-000001"]


def test_rewind_cuts_what_came_after(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    metrics, ledger = folder.path / "metrics.jsonl", folder.path / "ledger.jsonl"
    metrics.write_text("one\ntwo\n")
    ledger.write_text("a\n")
    folder.rewind(state(1, metrics=4, ledger=2))
    assert metrics.read_text() == "one\n"
    assert ledger.read_text() == "a\n"


def test_a_run_that_never_began_gives_its_name_back(tmp_path: Path) -> None:
    folder = RunFolder.create(config(tmp_path))
    (folder.path / "logs" / "old.log").write_text("died while starting")
    again = RunFolder.create(config(tmp_path))
    assert not (again.path / "logs" / "old.log").exists()
    (again.path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RunFolderError, match="--resume"):
        RunFolder.create(config(tmp_path))


def test_a_folder_of_somebody_else_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "thesis.txt").write_text("precious")
    with pytest.raises(RunFolderError):
        RunFolder.create(config(tmp_path))
    assert (tmp_path / "r" / "thesis.txt").exists()


def test_unwritable_folder_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"run\.dir"):
        RunFolder.create(config(tmp_path / "file"))
