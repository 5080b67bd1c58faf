"""One RL run from the first evaluation to the exported model: everything around the step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

from redone.api import EngineFleet, TrainerGroup
from redone.config.schema import Config
from redone.data.ledger import Ledger
from redone.data.stream import PromptStream
from redone.errors import RedoneError, Stopped
from redone.evaluate.runner import Evaluation, evaluate, read_evaluation, sampling_of
from redone.pipeline.collapse import CollapseWatch
from redone.pipeline.folder import DriverState, RunFolder
from redone.pipeline.replay import save_step
from redone.pipeline.space import free_bytes
from redone.pipeline.step import Keep, StepResult, rl_step
from redone.reward.pool import RewardPool
from redone.rollout.source import Source, open_source
from redone.types import Group, Prompt

log = logging.getLogger(__name__)


class Observer(Protocol):
    """What the user sees (redone.record)."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Times what runs inside it, as timing_s/<name> of the current step, and shows it."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The step is done: write its metrics and the timings of its phases."""

    def samples(self, step: int, groups: Sequence[Group]) -> None: ...

    def note(self, message: str) -> None: ...


@dataclass(slots=True, kw_only=True)
class RlRun:
    """The parts of one run. State over time: the stream's cursor, the validation history, the best step.

    `source` exists within `loop` only.
    """

    cfg: Config
    folder: RunFolder
    trainer: TrainerGroup
    engines: EngineFleet
    rewards: RewardPool
    stream: PromptStream
    val: Sequence[Prompt]
    test: Sequence[Prompt]
    stop_token_ids: tuple[int, ...]
    ledger: Ledger
    observer: Observer
    stop_requested: Callable[[], bool] = lambda: False  # asked between steps: a time limit, a user
    label_tasks: Collection[str] = ()  # classification tasks: watched for collapse
    val_history: list[tuple[int, float]] = field(default_factory=list)
    best_step: int | None = None
    last_step: int = 0
    notes: list[str] = field(default_factory=list)
    watch: CollapseWatch = field(init=False)
    source: Source = field(init=False)

    def __post_init__(self) -> None:
        self.watch = CollapseWatch(self.label_tasks, self.cfg.evaluate.collapse)

    def begin(self) -> Evaluation | None:
        """The parity gate, then the untrained model's evaluations: returns that of the test items."""
        with self.engines.awake("weights"), self.observer.phase("parity"):
            parity = self.trainer.check_canary(self.engines, version=0)
        metrics = {f"parity/{name.split('/')[-1]}": value for name, value in parity.items()}
        before = None
        if self.cfg.evaluate.before_train:
            before = self._test("test-before")
            metrics |= self._validate(0, last=0)
        self.observer.step(0, metrics)
        return before

    def go_on(self, state: DriverState) -> Evaluation | None:
        """Load a checkpoint, bring the engines to it; returns the untrained model's stored evaluation."""
        with self.observer.phase("load"):
            self.trainer.load(str(self.folder.checkpoint(state.step) / "trainer"))
            self.stream.load_state_dict(state.stream)
            with self.engines.awake("weights"):
                self.trainer.push(self.engines, version=state.step)
        self.val_history = list(state.val_history)
        self.best_step = state.best_step
        self.last_step = state.step
        return self.stored_evaluation("test-before")

    def loop(self) -> None:
        """Steps from where the run stands to algorithm.total_steps, or to an early stop.

        Raises Stopped, with the last step saved, when a stop was requested.
        """
        with open_source(
            self.stream, self.engines, self.rewards, self.cfg, self.stop_token_ids, self.last_step
        ) as self.source:
            self._steps()

    def _steps(self) -> None:
        last = self.cfg.algorithm.total_steps
        for step in range(self.last_step + 1, last + 1):
            if self.stop_requested():
                self._stop_here()
            result = rl_step(
                step,
                self.source,
                self.trainer,
                self.engines,
                self.cfg,
                self.observer.phase,
                self._keeper(step),
            )
            self._account(step, result)
            metrics = {**result.metrics, **self.trainer.memory()}
            self.observer.step(step, {**metrics, **self._validate(step, last)})
            self.last_step = step
            stalled = self._stalled()
            collapsed = self._collapsed(step, result.metrics)
            at_end = self.cfg.checkpoint.at_end and (step == last or stalled or collapsed)
            self._save(step, last=at_end)
            if stalled:
                self._note(f"early stop at step {step}: validation has not improved since {self.best_step}")
            if stalled or collapsed:
                break

    def _keeper(self, step: int) -> Keep | None:
        every = self.cfg.record.save_batches
        if not every or step % every:
            return None
        return lambda batch, parts: save_step(self.folder, step, batch, parts, self.trainer)

    def _stop_here(self) -> None:
        if self.last_step > 0:
            self._save(self.last_step, last=True)
        raise Stopped(
            f"stopped as requested after step {self.last_step}; "
            f"redone run --resume {self.folder.path} goes on"
        )

    def _collapsed(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Says every sign of collapse; whether the run ends for it."""
        signs = self.watch.step(metrics)
        for sentence in signs:
            self._note(f"step {step}: {sentence}")
        return bool(signs) and self.cfg.evaluate.collapse.action == "stop"

    def _note(self, message: str) -> None:
        self.notes.append(message)
        self.observer.note(message)

    def _account(self, step: int, result: StepResult) -> None:
        trained = {group.prompt_id for group in result.batch.groups}
        for group in result.collected.groups:
            if group.prompt.id in trained:
                self.ledger.trained(step, group.epoch, group.prompt.id)
            else:
                self.ledger.dropped(step, group.epoch, group.prompt.id, "uninformative")
        for drop in result.collected.drops:
            self.ledger.dropped(step, drop.epoch, drop.prompt_id, drop.reason)
        self.observer.samples(step, result.collected.groups)

    def _validate(self, step: int, last: int) -> dict[str, float]:
        every = self.cfg.evaluate.every
        due = step == last or (every > 0 and step % every == 0)
        if not (self.val and due):
            return {}
        with self.engines.awake(), self.observer.phase("testing"):
            result = self._evaluate(f"val-{step:06d}", self.val)
        self.val_history.append((step, result.mean_score))
        if result.mean_score >= max(score for _, score in self.val_history):
            self.best_step = step
        return validation_metrics(result, self.cfg.evaluate.sampling.n)

    def _test(self, name: str) -> Evaluation | None:
        if not self.test:
            return None
        with self.engines.awake(), self.observer.phase("testing"):
            return self._evaluate(name, self.test)

    def _evaluate(self, name: str, prompts: Sequence[Prompt]) -> Evaluation:
        wanted = self.cfg.evaluate.sampling
        sampling = sampling_of(wanted, self.cfg.data.max_response_length, self.stop_token_ids)
        result = evaluate(
            prompts,
            self.engines,
            self.rewards,
            sampling,
            n=wanted.n,
            seed=self.cfg.run.seed,
            meta={"name": name},
        )
        result.write(self.folder.path / "evals", name)
        return result

    def stored_evaluation(self, name: str) -> Evaluation | None:
        path = self.folder.path / "evals" / f"{name}.jsonl"
        return read_evaluation(path) if path.exists() else None

    def _stalled(self) -> bool:
        stop = self.cfg.evaluate.early_stop
        if not stop.enable or self.best_step is None:
            return False
        return sum(step > self.best_step for step, _ in self.val_history) >= stop.patience

    def _save(self, step: int, last: bool) -> None:
        every = self.cfg.checkpoint.every
        is_best = self.cfg.evaluate.keep_best and self.best_step == step
        if not (last or is_best or (every > 0 and step % every == 0)):
            return
        state = DriverState(
            step=step,
            stream=self.source.state_dict(),
            val_history=tuple(self.val_history),
            best_step=self.best_step,
            stream_bytes={},
        )
        with self.observer.phase("save_checkpoint"):
            state = replace(state, stream_bytes=self.folder.stream_bytes())
            try:
                checkpoint = self.cfg.checkpoint
                self.folder.save(state, self.trainer.save, checkpoint.keep, checkpoint.asynchronous)
            except (OSError, RedoneError) as error:
                raise RedoneError(
                    f"cannot save step {step} in {self.folder.checkpoints} "
                    f"({free_bytes(self.folder.path) / 1e9:.1f} GB are free): {error}; the last good "
                    f"checkpoint is step {max(self.folder.steps(), default=0)}. Remedy: mend that, then "
                    f"--resume {self.folder.path}"
                ) from None

    def finish(self) -> Evaluation | None:
        """Go to the best checkpoint, read the test set, export."""
        last, best = self.last_step, self.last_step
        if self.cfg.evaluate.keep_best and self.best_step == 0:
            self._note("no validation was better than the untrained model's: the last model is used")
        elif self.cfg.evaluate.keep_best and self.best_step is not None:
            best = self.best_step
        if best != last:
            self._note(f"validation was best at step {best}: that model is used")
            self.trainer.load(str(self.folder.checkpoint(best) / "trainer"))
            with self.engines.awake("weights"):
                self.trainer.push(self.engines, version=last + 1)
        after = self._test("test-after")
        if self.cfg.checkpoint.export_hf:
            with self.observer.phase("export"):
                self.trainer.export(str(self.folder.path / "export"))
        return after


def validation_metrics(result: Evaluation, n: int) -> dict[str, float]:
    """verl's names: val-core/<task>/acc/mean@<n> and what helps to read it."""
    metrics = {"val-core/mean_score": result.mean_score}
    for task in result.tasks():
        summary = result.summary(task)
        metrics[f"val-core/{task}/acc/mean@{n}"] = summary.accuracy
        metrics[f"val-core/{task}/reward/mean@{n}"] = summary.mean_score
        metrics[f"val-aux/{task}/format_errors"] = summary.format_errors
        metrics[f"val-aux/{task}/common_share"] = summary.common_share
        metrics[f"val-aux/{task}/acc_low"], metrics[f"val-aux/{task}/acc_high"] = summary.interval
    return metrics
