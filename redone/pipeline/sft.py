"""One supervised fine-tuning run: the trainer alone, in the same run folder as an RL run's."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from redone.api import TrainerGroup
from redone.config.schema import AlgorithmConfig, Config, SftLoss
from redone.data.ledger import Ledger
from redone.data.sft import Example, batches, fingerprint, sft_batch
from redone.errors import RedoneError, RunFolderError
from redone.pipeline.folder import DriverState, RunFolder
from redone.pipeline.space import free_bytes
from redone.pipeline.train import Observer
from redone.types import Batch, UpdateReport

log = logging.getLogger(__name__)

VAL_BATCH = 256  # conversations whose loss is measured at once


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step of the plan."""

    epoch: int
    examples: tuple[int, ...]


def plan_steps(examples: Sequence[Example], cfg: Config) -> tuple[Step, ...]:
    """Every optimizer step of every epoch: a pure function of data, section sft and run.seed."""
    return tuple(
        Step(epoch, tuple(step))
        for epoch in range(cfg.sft.epochs)
        for step in batches(examples, cfg.sft, cfg.run.seed, epoch)
    )


@dataclass(slots=True, kw_only=True)
class SftRun:
    """State over time: the last step, and the history of the validation loss (negated: higher is better)."""

    cfg: Config
    folder: RunFolder
    trainer: TrainerGroup
    train: Sequence[Example]
    val: Sequence[Example]
    ledger: Ledger
    observer: Observer
    last_step: int = 0
    val_history: list[tuple[int, float]] = field(default_factory=list)
    best_step: int | None = None
    notes: list[str] = field(default_factory=list)
    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        self.steps = plan_steps(self.train, self.cfg)

    def begin(self) -> None:
        """The untrained model's validation loss, as step 0."""
        if not self.train:
            raise RedoneError("no conversation to train on; check sft.train")
        self.observer.step(0, self._validate(0))

    def go_on(self, state: DriverState) -> None:
        """Load a checkpoint. Raises RunFolderError when the data or the plan changed."""
        if state.stream.get("fingerprint") != fingerprint(self.train, self.cfg.sft, self.cfg.run.seed):
            raise RunFolderError(
                "the checkpoint belongs to other conversations: sft.train, section sft, run.seed or the chat "
                "template changed; restore them, or start a new run"
            )
        with self.observer.phase("load"):
            self.trainer.load(str(self.folder.checkpoint(state.step) / "trainer"))
        self.val_history, self.best_step = list(state.val_history), state.best_step
        self.last_step = state.step

    def loop(self) -> None:
        """Optimizer steps from where the run stands to the end of the last epoch."""
        algorithm = AlgorithmConfig(loss=SftLoss(), total_steps=len(self.steps))
        last = len(self.steps)
        for step in range(self.last_step + 1, last + 1):
            planned = self.steps[step - 1]
            chosen = [self.train[i] for i in planned.examples]
            batch = sft_batch(chosen, share=self.cfg.trainer.prefix_sharing)
            with self.trainer.awake(), self.observer.phase("update_actor"):
                report = self.trainer.update(batch, algorithm, step)
            for example in chosen:
                self.ledger.trained(step, planned.epoch, example.id)
            metrics = step_metrics(report, batch, chosen, (step - 1) / last * self.cfg.sft.epochs)
            due = step == last or (self.cfg.evaluate.every > 0 and step % self.cfg.evaluate.every == 0)
            self.observer.step(step, {**metrics, **(self._validate(step) if due else {})})
            self.last_step = step
            self._save(step, last=step == last)

    def _validate(self, step: int) -> dict[str, float]:
        if not self.val:
            return {}
        with self.trainer.awake(), self.observer.phase("testing"):
            loss = mean_loss(self.trainer, self.val)
        self.val_history.append((step, -loss))
        if -loss >= max(score for _, score in self.val_history):
            self.best_step = step
        return {"val/loss": loss}

    def _save(self, step: int, last: bool) -> None:
        checkpoint = self.cfg.checkpoint
        every = checkpoint.every
        best = self.cfg.evaluate.keep_best and self.best_step == step
        if not (last or best or (every > 0 and step % every == 0)):
            return
        state = DriverState(
            step=step,
            stream={"fingerprint": fingerprint(self.train, self.cfg.sft, self.cfg.run.seed)},
            val_history=tuple(self.val_history),
            best_step=self.best_step,
            stream_bytes={},
        )
        with self.observer.phase("save_checkpoint"):
            state = replace(state, stream_bytes=self.folder.stream_bytes())
            try:
                self.folder.save(state, self.trainer.save, checkpoint.keep, checkpoint.asynchronous)
            except (OSError, RedoneError) as error:
                raise RedoneError(
                    f"cannot save step {step} in {self.folder.checkpoints} "
                    f"({free_bytes(self.folder.path) / 1e9:.1f} GB are free): {error}. Remedy: mend that, "
                    f"then --resume {self.folder.path}"
                ) from None

    def finish(self) -> None:
        """Go to the checkpoint with the lowest validation loss (evaluate.keep_best), and export."""
        best = self.best_step
        if self.cfg.evaluate.keep_best and best is not None and best not in (0, self.last_step):
            self.notes.append(f"validation loss was lowest at step {best}: that model is used")
            self.observer.note(self.notes[-1])
            self.trainer.load(str(self.folder.checkpoint(best) / "trainer"))
        if self.cfg.checkpoint.export_hf:
            with self.observer.phase("export"):
                self.trainer.export(str(self.folder.path / "export"))


def step_metrics(
    report: UpdateReport, batch: Batch, examples: Sequence[Example], epoch: float
) -> dict[str, float]:
    """sft/loss is the mean over answer tokens of the step; `epoch`: passes made before the step."""
    tokens = sum(e.tokens for e in examples)
    return {
        **report.metrics,
        "sft/loss": report.loss,
        "sft/epoch": epoch,
        "sft/examples": float(len(examples)),
        "sft/loss_tokens": float(batch.num_loss_tokens),
        "actor/grad_norm": report.grad_norm,
        "actor/lr": report.lr,
        "perf/total_num_tokens": float(tokens),
    }


def mean_loss(trainer: TrainerGroup, examples: Sequence[Example]) -> float:
    """Mean negative log-probability per answer token, in nats, at temperature 1."""
    total, count = 0.0, 0
    for start in range(0, len(examples), VAL_BATCH):
        part = examples[start : start + VAL_BATCH]
        for example, (row,) in zip(part, trainer.logprobs(sft_batch(part), temperature=1.0), strict=True):
            total -= float(row[example.loss_mask].sum())
            count += int(example.loss_mask.sum())
    if not math.isfinite(total):
        raise RedoneError(f"the validation loss is {total}; the model is broken: lower trainer.optim.lr")
    return total / max(1, count)
