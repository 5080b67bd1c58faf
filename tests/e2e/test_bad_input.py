"""Wrong input: one clear message naming key, value and remedy; exit code 2; nothing written or started."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from .conftest import Workplace


def refused(place: Workplace, name: str, *overrides: str) -> str:
    """The message of a run that must be refused before anything is written."""
    done = place.redone(*place.run_args(name, *overrides))
    check_refusal(done)
    assert not (place.root / name).exists(), "a refused run must not leave a run folder"
    return done.stderr


def check_refusal(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.startswith("redone: error: ")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.paralel.tensor=2", ("trainer.paralel", "trainer.parallel")),
        ("trainer.parallel.expert=3", ("trainer.parallel.expert", "3", "8")),
        ("trainer.parallel.tensor=8", ("trainer.parallel.tensor", "8")),
        ("actor_rollout_ref.rollout.n=8", ("actor_rollout_ref.rollout.n", "rollout.n")),
        ("rollout.n=zero", ("rollout.n", "zero")),
        ("model.path=nowhere", ("model.path", "nowhere", "redone data prepare")),
        ("data.train=[missing.parquet]", ("missing.parquet", "data.train")),
        ("data.max_prompt_length=8", ("data.max_prompt_length=8", "data.truncation")),
        ("lora.rank=8", ("lora", "not supported")),
    ],
)
def test_bad_configuration(workplace: Workplace, override: str, said: tuple[str, ...]) -> None:
    message = refused(workplace, "bad", override)
    for part in said:
        assert part in message, message


def test_too_long_prompts_can_be_dropped_and_are_counted(workplace: Workplace) -> None:
    message = refused(workplace, "dropped", "data.max_prompt_length=8", "data.truncation=drop")
    assert "no usable prompt" in message and "64 were too long" in message


def test_malformed_row_names_file_and_line(workplace: Workplace, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "hello", "label": "a"})
    rows.write_text(f"{good}\n{good}x\n")
    message = refused(workplace, "row", f"data.train=[{rows}]")
    assert str(rows) in message and "line 2" in message
    rows.write_text(f"{good}\n{json.dumps({'label': 'a'})}\n")
    message = refused(workplace, "row", f"data.train=[{rows}]")
    assert str(rows) in message and "line 2" in message and "prompt" in message


def test_model_folder_without_weights(workplace: Workplace, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(workplace.assets / "tiny" / "model", folder)
    (folder / "model.safetensors").unlink()
    message = refused(workplace, "weightless", f"model.path={folder}")
    assert str(folder) in message and "safetensors" in message


def test_older_run_folder_is_refused(workplace: Workplace, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.yaml").write_text("run: {schema_version: 0}\n")
    done = workplace.redone("run", "--resume", str(folder))
    check_refusal(done)
    assert "schema version 0" in done.stderr and "migration" in done.stderr


def test_no_such_run_folder(workplace: Workplace, tmp_path: Path) -> None:
    done = workplace.redone("run", "--resume", str(tmp_path / "none"))
    check_refusal(done)
    assert "no run folder" in done.stderr
