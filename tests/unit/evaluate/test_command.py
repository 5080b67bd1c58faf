"""Wrong input to `redone eval`: one message that names what was given and what to do; nothing is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from redone_launcher.eval import eval_command
from redone_launcher.main import parse

from redone.errors import RedoneError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Passes as a model folder until somebody reads its weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def refused(*words: str) -> str:
    with pytest.raises(RedoneError) as caught:
        eval_command(parse(["eval", *words]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_suite_and_no_suite(model: Path) -> None:
    assert "did you mean ifeval" in refused("--model", str(model), "--suite", "ifevall")
    assert "--suite NAME" in refused("--model", str(model))


def test_data_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDONE_DATA", raising=False)
    assert "--data FOLDER, or REDONE_DATA" in refused("--model", str(model), "--suite", "gsm8k")
    nowhere = str(tmp_path / "nowhere")
    assert f"--data {nowhere}: no such folder" in refused(
        "--model", str(model), "--suite", "gsm8k", "--data", nowhere
    )


def test_model_folder(model: Path, tmp_path: Path) -> None:
    rest = ("--suite", "gsm8k", "--data", str(tmp_path))
    assert "--model nowhere: no such folder" in refused("--model", "nowhere", *rest)
    (model / "model.safetensors").unlink()
    said = refused("--model", str(model), *rest)
    assert f"--model {model}" in said and "no weights (*.safetensors)" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--n", "4"), "--n 4: greedy answers would be equal"),
        (("--limit", "0"), "--limit 0: it must be at least 1"),
        (("--top-p", "0"), "--top-p 0.0"),
        (("rollout.replica=2",), "rollout.replicas"),
        (("model.path=elsewhere",), "named by --model"),
    ],
)
def test_settings(model: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    assert said in refused("--model", str(model), "--suite", "gsm8k", "--data", str(tmp_path), *words)


def test_held_out_split_of_no_run(model: Path, tmp_path: Path) -> None:
    assert "is no run folder" in refused("--model", str(model), "--suite", f"run:{tmp_path}")


def test_comparing_needs_two_folders(tmp_path: Path) -> None:
    assert "two evaluation folders" in refused("compare", "a")
    assert "no settings.json" in refused("compare", str(tmp_path), str(tmp_path))


def test_engine_settings_may_stand_anywhere() -> None:
    args = parse(["eval", "--model", "m", "a.b=1", "--suite", "s", "c.d=2", "--limit", "3"])
    assert args.words == ["a.b=1", "c.d=2"] and args.limit == 3
    with pytest.raises(SystemExit):
        parse(["eval", "--model", "m", "--limits", "3"])
