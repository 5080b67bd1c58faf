"""`redone eval` with a real engine: every suite, one start-up; what is recorded is not asked again."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from redone.data.tiny import make_tiny_model
from redone.errors import RunFolderError
from redone.evaluate.records import EvalFolder

from .conftest import REPO, Workplace

SUITES = ("gsm8k", "humaneval", "ifeval", "mbpp", "sns-bench", "sns-transbench")


def run_folder(root: Path, data: Path) -> Path:
    """What a finished run leaves behind, as far as its held-out split is concerned."""
    root.mkdir()
    (root / "config.yaml").write_text(
        f"run: {{name: before}}\nmodel: {{path: {data}/model}}\n"
        f"data: {{train: [{data}/train.parquet], test: [{data}/val.parquet], max_prompt_length: 96, "
        "max_response_length: 8}\nrewards: {default: {family: exact}}\n"
    )
    return root


@pytest.mark.slow
def test_every_suite_through_the_engine(workplace: Workplace, redone_data: Path, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", "qwen3", max_position_embeddings=4096)
    run = run_folder(tmp_path / "run", workplace.assets / "tiny")
    out = tmp_path / "out"
    args = (
        "eval", "--model", str(model), "--suite", ",".join((*SUITES, f"run:{run}")), "--limit", "1",
        "--max-tokens", "8", "--data", str(redone_data), "--out", str(out), "--like-paper",
        "rollout.engine.in_process=true",
    )  # fmt: skip
    done = workplace.redone(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("SNS-Bench", "released scorer", "corrected scorer", "paper: RedOne 2.0 4B", "best without"):
        assert said in done.stdout
    logs = {path.name for path in (out / "logs").iterdir()}
    assert "engine-0.log" in logs and not any("trainer" in name for name in logs)

    folder = EvalFolder.open(out)
    records = {suite.name: folder.read(suite.name) for suite in folder.suites()}
    assert {name: len(found) for name, found in records.items()} == {
        **dict.fromkeys(SUITES, 1), "sns-bench": 12, "sns-transbench": 2, "run-before": 1,
    }  # fmt: skip
    finishes = [record.finishes[0] for found in records.values() for record in found.values()]
    assert finishes.count("unfit") < 4, "the engine answered nearly all of them"
    summary = json.loads((out / "summary.json").read_text())
    (sns,) = [suite for suite in summary["suites"] if suite["name"] == "sns-bench"]
    assert set(sns["tables"]) == {"released scorer", "corrected scorer"}
    assert all("the scorer's variable" in part["policies"] for part in sns["parts"])
    page = (out / "report.html").read_text()
    assert "<svg" in page and "<script" not in page  # one file; items may well name addresses
    assert not re.search(r"(src|href)=.?http|url\(.?http|@import", page)

    again = workplace.redone(*args)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "19 of 19 items are recorded" in again.stdout and "starting Ray" not in again.stdout
    with pytest.raises(RunFolderError, match="another model"):
        folder.join({**folder.settings(), "model": {"path": str(REPO), "fingerprint": "other"}})
