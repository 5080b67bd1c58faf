"""One RL run from the first evaluation to the exported model: everything around the step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

from redone.api import EngineFleet, TrainerGroup
from redone.config.schema import Config
from redone.data.ledger import Ledger
from redone.data.stream import PromptStream
from redone.errors import RedoneError
from redone.evaluate.runner import Evaluation, evaluate
from redone.pipeline.folder import DriverState, RunFolder
from redone.pipeline.step import StepResult, rl_step
from redone.reward.pool import RewardPool
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
    """The parts of one run. State over time: the stream's cursor, the validation history, the best step."""

    cfg: Config
    folder: RunFolder
    trainer: TrainerGroup
    engines: EngineFleet
    rewards: RewardPool
    stream: PromptStream
    val: Sequence[Prompt]
    test: Sequence[Prompt]
    ledger: Ledger
    observer: Observer
    val_history: list[tuple[int, float]] = field(default_factory=list)
    best_step: int | None = None

    def run(self, resume: DriverState | None) -> tuple[Evaluation | None, Evaluation | None]:
        """Train to algorithm.total_steps. Returns the test evaluations before and after, if any."""
        first, before = self._begin(resume)
        last = self.cfg.algorithm.total_steps
        for step in range(first, last + 1):
            result = rl_step(
                step, self.stream, self.trainer, self.engines, self.rewards, self.cfg, self.observer.phase
            )
            self._account(step, result)
            metrics = {**result.metrics, **self._validate(step, last)}
            stop = self._stalled()
            self._save(step, last=step == last or stop)
            self.observer.step(step, metrics)
            if stop:
                self.observer.note(f"early stop at step {step}: validation has not improved")
                break
        after = self._finish(step if first <= last else last)
        return before, after

    def _begin(self, resume: DriverState | None) -> tuple[int, Evaluation | None]:
        """Parity gate, then the state before the first step. Returns that step and the base evaluation."""
        if resume is not None:
            with self.observer.phase("load"):
                self.trainer.load(str(self.folder.checkpoint(resume.step) / "trainer"))
                self.stream.load_state_dict(resume.stream)
                self.trainer.push(self.engines, version=resume.step)
            self.val_history = list(resume.val_history)
            self.best_step = resume.best_step
            return resume.step + 1, self.stored_evaluation("test-before")
        with self.observer.phase("parity"):
            parity = self.trainer.check_canary(self.engines, version=0)
        metrics = {f"parity/{name.split('/')[-1]}": value for name, value in parity.items()}
        before = None
        if self.cfg.evaluate.before_train:
            before = self._test("test-before")
            metrics |= self._validate(0, last=0)
        self.observer.step(0, metrics)
        return 1, before

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
        self.val_history.append((step, result.mean))
        if result.mean >= max(score for _, score in self.val_history):
            self.best_step = step
        return result.metrics("val-core")

    def _test(self, name: str) -> Evaluation | None:
        if not self.test:
            return None
        with self.engines.awake(), self.observer.phase("testing"):
            return self._evaluate(name, self.test)

    def _evaluate(self, name: str, prompts: Sequence[Prompt]) -> Evaluation:
        result = evaluate(prompts, self.engines, self.rewards, self.cfg, name=name)
        result.save(self.folder.path / "evals")
        return result

    def stored_evaluation(self, name: str) -> Evaluation | None:
        path = self.folder.path / "evals" / f"{name}.jsonl"
        return Evaluation.load(path) if path.exists() else None

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
            stream=self.stream.state_dict(),
            val_history=tuple(self.val_history),
            best_step=self.best_step,
            stream_bytes={},
        )
        with self.observer.phase("save_checkpoint"):
            state = replace(state, stream_bytes=self.folder.stream_bytes())
            try:
                self.folder.save(state, self.trainer.save, self.cfg.checkpoint.keep)
            except OSError as error:
                raise RedoneError(
                    f"cannot save step {step} in {self.folder.checkpoints}: {error.strerror}; the last good "
                    f"checkpoint is step {max(self.folder.steps(), default=0)}. Remedy: free space, then "
                    f"--resume {self.folder.path}"
                ) from None

    def _finish(self, last: int) -> Evaluation | None:
        """Go to the best checkpoint, read the test set, export."""
        best = self.best_step if self.cfg.evaluate.keep_best and self.best_step else last
        if best != last:
            self.observer.note(f"validation was best at step {best}: that model is used")
            self.trainer.load(str(self.folder.checkpoint(best) / "trainer"))
            self.trainer.push(self.engines, version=last + 1)
        after = self._test("test-after")
        if self.cfg.checkpoint.export_hf:
            with self.observer.phase("export"):
                self.trainer.export(str(self.folder.path / "export"))
        return after
