"""A run that is asked to stop saves its last step and says so; what a job's next attempt starts from."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from redone_launcher.main import EXIT_STOPPED, main
from redone_launcher.session import StopRequest

from redone.config.load import config_from_dict
from redone.errors import RunFolderError, Stopped
from redone.pipeline.folder import JOB_FILE, RunFolder, write_json
from redone.pipeline.train import RlRun


class Silent:
    """Trainer, stream and observer of a run that takes no step."""

    def save(self, path: str) -> None:
        Path(path).mkdir()

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": 7}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield


def folder(tmp_path: Path) -> RunFolder:
    values = {
        "model": {"path": "m"},
        "data": {"train": ["t"]},
        "rewards": {"default": {"family": "exact"}},
        "run": {"dir": str(tmp_path)},
    }
    return RunFolder.create(config_from_dict(values))


def stopped_at(tmp_path: Path, step: int) -> RunFolder:
    from redone.config.load import load_config

    place, part = folder(tmp_path), Silent()
    run: Any = RlRun(
        cfg=load_config(place.path / "config.yaml"), folder=place, trainer=part, engines=None, rewards=None,
        stream=part, val=(), test=(), stop_token_ids=(), ledger=None, observer=part,
        stop_requested=lambda: True, last_step=step,
    )  # type: ignore[arg-type]  # fmt: skip
    with pytest.raises(Stopped, match=f"after step {step}; redone run --resume"):
        run.loop()
    return place


def test_the_last_step_is_saved(tmp_path: Path) -> None:
    place = stopped_at(tmp_path, 3)
    assert place.steps() == [3]
    assert place.load_state(3).stream == {"cursor": 7}


def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path) -> None:
    assert stopped_at(tmp_path, 0).steps() == []


def test_a_stop_is_asked_for_by_signal_or_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDONE_STOP_FILE", str(tmp_path / "stop"))
    by_file, by_signal = StopRequest(), StopRequest()
    before = signal.signal(signal.SIGUSR1, by_signal.on_signal)
    try:
        assert not by_file() and not by_signal()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert by_signal() and not by_file()
    finally:
        signal.signal(signal.SIGUSR1, before)
    (tmp_path / "stop").touch()
    assert by_file()


def test_its_exit_code_is_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(path: Path) -> None:
        raise Stopped("stopped as requested after step 3")

    monkeypatch.setattr("redone_launcher.run.attempt_command", stop)
    with pytest.raises(SystemExit) as ended:
        main(["attempt", "runs/x"])
    assert ended.value.code == EXIT_STOPPED == 75
    assert capsys.readouterr().err == "redone: stopped as requested after step 3\n"


def test_a_folder_whose_job_waits_in_the_queue_is_not_taken(tmp_path: Path) -> None:
    place = folder(tmp_path)
    assert folder(tmp_path).path == place.path, "a run that never began may be started again"
    (place.path / "slurm").mkdir()
    write_json(place.path / JOB_FILE, {"job": "1"})
    with pytest.raises(RunFolderError, match="--resume"):
        folder(tmp_path)


def test_an_attempt_without_a_checkpoint_is_undone(tmp_path: Path) -> None:
    place = folder(tmp_path)
    (place.path / "metrics.jsonl").write_text('{"step": 1}\n')
    (place.path / "tensorboard").mkdir()
    place.begin_again()
    assert not (place.path / "metrics.jsonl").exists() and not (place.path / "tensorboard").exists()


def test_overrides_may_follow_options(capsys: pytest.CaptureFixture[str]) -> None:
    from redone_launcher.main import parse

    args = parse(["submit", "c.yaml", "a.b=1", "--nodes", "2", "run.name=x"])
    assert args.overrides == ["a.b=1", "run.name=x"] and args.nodes == 2
    with pytest.raises(SystemExit):
        parse(["submit", "c.yaml", "--nodes", "2", "--nods", "x=1"])
    assert "unrecognized arguments: --nods" in capsys.readouterr().err
