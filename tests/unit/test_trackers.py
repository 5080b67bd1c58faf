"""W&B (offline) and MLflow for real, in processes of their own: both start threads and read the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # importing them takes 5 to 20 s

WRITE = """
import sys
from pathlib import Path
from redone.record.sinks import build_sinks
for steps in ((1, 2), (3,)):  # the second sink is a resumed run
    (sink,) = build_sinks((sys.argv[1],), Path(sys.argv[2]), project="p", name="n", config={"a": {"b": 1}})
    for step in steps:
        sink.write(step, {"actor/loss": float(step), "val-core/acc@1": 0.5})
    sink.close()
"""


def run(*arguments: str, folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "MLFLOW"))}
    return subprocess.run(
        [sys.executable, "-c", *arguments],
        cwd=folder,
        env={**environment, "WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    ).stdout


def test_mlflow_keeps_one_run_across_a_resume(tmp_path: Path) -> None:
    run(WRITE, "mlflow", str(tmp_path), folder=tmp_path)
    read = """
import sys
from pathlib import Path
from mlflow import MlflowClient
client = MlflowClient(Path(sys.argv[1], "mlflow").as_uri())
(run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
print(run.data.params, run.info.run_name, run.data.metrics["val-core/acc_at_1"])
print([(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "actor/loss")])
"""
    read = "import os; os.environ['MLFLOW_ALLOW_FILE_STORE'] = 'true'" + read
    facts, history = run(read, str(tmp_path), folder=tmp_path).strip().splitlines()[-2:]
    assert facts == "{'a.b': '1'} n 0.5"
    assert history == "[(1, 1.0), (2, 2.0), (3, 3.0)]"
    assert {p.name for p in tmp_path.iterdir()} == {"mlflow", ".mlflow-id"}


def test_wandb_offline_keeps_one_id_across_a_resume(tmp_path: Path) -> None:
    run(WRITE, "wandb", str(tmp_path), folder=tmp_path)
    written = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    ids = {path.stem.removeprefix("run-") for path in written}
    assert ids == {f"n-{(tmp_path / '.wandb-id').read_text()}"}
    content = b"".join(path.read_bytes() for path in written)
    assert content.count(b"actor/loss") >= 3 and b"val-core/acc@1" in content
    assert {p.name for p in tmp_path.iterdir()} == {"wandb", ".wandb-id"}
