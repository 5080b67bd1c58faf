"""`redone run`: check everything that can be checked, then start the cluster, train, and always clean up."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from redone.config.load import load_config
from redone.config.schema import Config
from redone.errors import ConfigError, RunFolderError
from redone.pipeline.folder import RunFolder
from redone.pipeline.space import check_space
from redone.record.table import print_result
from redone_launcher.session import Session, log_folder
from redone_launcher.training import Inputs, SftInputs, load_inputs, load_sft_inputs, train_rl, train_sft


def run_command(
    config: Path | None,
    overrides: Sequence[str],
    resume: Path | None,
    choice: Sequence[tuple[str, str]] = (),
) -> None:
    """Do as `config` says, or go on with run folder `resume`. Raises RedoneError with what to do.

    `choice`: (--from | --until | --only, node) of a pipeline.
    """
    folder = RunFolder.open(resume) if resume is not None else None
    source = folder.path / "config.yaml" if folder is not None else config
    assert source is not None
    cfg = load_config(source, overrides)
    if cfg.kind == "pipeline":
        from redone_launcher.pipeline import run_pipeline

        run_pipeline(cfg, dict(choice), resume)
        return
    if choice:
        raise ConfigError(f"{choice[0][0]} chooses nodes of a pipeline, and {source} has no pipeline.nodes")
    if folder is not None:
        _check_resumable(cfg, folder)
    inputs = _inputs(cfg)
    resumed = folder is not None
    _train(cfg, folder or RunFolder.create(cfg), inputs, resumed)


def attempt_command(path: Path) -> None:
    """What a job runs: begin the run of a folder that `redone submit` made, or go on from its last
    checkpoint. A finished run is left as it is."""
    folder = RunFolder.open(path)
    if (path / "summary.json").exists():
        sys.stdout.write(f"{path} is finished\n")
        return
    cfg = load_config(path / "config.yaml")
    if cfg.kind == "pipeline":
        from redone_launcher.pipeline import run_pipeline

        run_pipeline(cfg, {}, path)
        return
    resumed = bool(folder.steps())
    _train(cfg, folder, _inputs(cfg), resumed)


def _inputs(cfg: Config) -> Inputs | SftInputs:
    """After all that can be checked before anything is written."""
    check_space(cfg)
    return load_sft_inputs(cfg) if cfg.kind == "sft" else load_inputs(cfg)


def _train(cfg: Config, folder: RunFolder, inputs: Inputs | SftInputs, resumed: bool) -> None:
    """The run itself, in a folder that exists."""
    if not resumed:
        folder.begin_again()
    session = Session(log_folder(folder.path))
    finished = False
    try:
        if isinstance(inputs, SftInputs):
            summary = train_sft(cfg, folder, inputs, resumed, session)
        else:
            summary = train_rl(cfg, folder, inputs, resumed, session)
        finished = True
    finally:
        session.close(graceful=finished)
    print_result(summary)


def _check_resumable(cfg: Config, folder: RunFolder) -> None:
    steps = folder.steps()
    if not steps:
        raise RunFolderError(
            f"{folder.path} has no complete checkpoint; start the run anew under another run.name"
        )
    if (
        cfg.kind == "rl"
        and steps[-1] >= cfg.algorithm.total_steps
        and (folder.path / "summary.json").exists()
    ):
        raise RunFolderError(
            f"{folder.path} is finished (step {steps[-1]}); to go on: algorithm.total_steps={2 * steps[-1]}"
        )
    if cfg.kind == "sft" and (folder.path / "summary.json").exists():
        raise RunFolderError(f"{folder.path} is finished (step {steps[-1]})")
