"""Where metrics go. A sink takes the metrics of one step at a time and never changes them."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from redone.errors import ConfigError

REMEDY = 'pip install "redone[track]", or take it out of record.loggers'


class Sink(Protocol):
    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """metrics.jsonl: one object per step, {"step", "time" (Unix s), metrics}; non-finite values are null."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorboardSink:
    """Event files under `folder`, written with the tensorboard package alone: no torch in the driver."""

    def __init__(self, folder: Path) -> None:
        _require("tensorboard")
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))
        self._fresh = True

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        now = time.time()
        if self._fresh:
            # after a resume: TensorBoard forgets what the interrupted run wrote from this step on
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=now, step=step, session_log=start))
            self._fresh = False
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.add_event(Event(wall_time=now, step=step, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases; WANDB_MODE=offline writes under the run folder only."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        _require("wandb")
        import wandb

        self._run = wandb.init(
            project=project,
            name=name,
            id=f"{name}-{_stamp(folder)}",
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """MLflow; without MLFLOW_TRACKING_URI it writes files under the run folder (`mlflow ui` reads them)."""

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        _require("mlflow")
        import os

        import mlflow

        if not os.environ.get("MLFLOW_TRACKING_URI"):
            # MLflow would rather have a database, which its slim package cannot open
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri((folder / "mlflow").resolve().as_uri())
        mlflow.set_experiment(project)
        self._mlflow = mlflow
        known = folder / ".mlflow-id"
        if known.exists():  # a resumed run goes on under its own id
            mlflow.start_run(run_id=known.read_text(encoding="ascii"))
            return
        run = mlflow.start_run(run_name=name)
        known.write_text(run.info.run_id, encoding="ascii")
        mlflow.log_params({key: str(value)[:500] for key, value in _flatten(config).items()})

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        # MLflow refuses some characters that verl's names do not use, "@" is the one that occurs
        self._mlflow.log_metrics(
            {name.replace("@", "_at_"): value for name, value in metrics.items()}, step=step
        )

    def close(self) -> None:
        self._mlflow.end_run()


def build_sinks(
    loggers: tuple[str, ...], folder: Path, *, project: str, name: str, config: Mapping[str, Any]
) -> list[Sink]:
    """The sinks of record.loggers (console is not one: see console.py).

    Raises ConfigError when a logger's package is missing.
    """
    sinks: list[Sink] = []
    for logger in loggers:
        match logger:
            case "jsonl":
                sinks.append(JsonlSink(folder / "metrics.jsonl"))
            case "tensorboard":
                sinks.append(TensorboardSink(folder / "tensorboard"))
            case "wandb":
                sinks.append(WandbSink(folder, project, name, config))
            case "mlflow":
                sinks.append(MlflowSink(folder, project, name, config))
            case "console":
                pass
            case _:
                raise ConfigError(
                    f"record.loggers={logger!r} is unknown; use console, jsonl, tensorboard, wandb, mlflow"
                )
    return sinks


def check_loggers(loggers: tuple[str, ...]) -> None:
    """Raises ConfigError when a logger's package is missing: to be called before anything is started."""
    for logger in loggers:
        if logger in ("tensorboard", "wandb", "mlflow"):
            _require(logger)


def _require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"record.loggers={package}: the package {package} is not installed; remedy: {REMEDY}"
        )


def _stamp(folder: Path) -> str:
    """An id that a resumed run finds again."""
    path = folder / ".wandb-id"
    if not path.exists():
        path.write_text(f"{time.time_ns():x}", encoding="ascii")
    return path.read_text(encoding="ascii")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
