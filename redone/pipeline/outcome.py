"""What came out of a run: baselines of the untrained model, paired comparisons, the summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redone.api import TrainerGroup
from redone.data.chat import Chat
from redone.evaluate.baselines import constant_label, label_logprob, restrict
from redone.evaluate.compare import compare
from redone.evaluate.runner import Evaluation
from redone.pipeline.train import RlRun
from redone.record.summary import EvalResult, PairedResult, RunSummary
from redone.types import Batch, Prompt, TrainGroup, Trajectory

NAMES = {
    "constant": "constant label",
    "label_logprob": "untrained, likeliest label",
    "label_logprob_calibrated": "untrained, likeliest label (calibrated)",
}
BEFORE, AFTER = "untrained, free generation", "trained, free generation"


def baseline_evaluations(run: RlRun, chat: Chat, resumed: bool) -> dict[str, Evaluation]:
    """evaluate.baselines on the test items, by the present weights, which must be the untrained ones.

    After a resume the stored ones are read: the trainer holds other weights then.
    """
    found: dict[str, Evaluation] = {}
    for name in NAMES:
        stored = run.stored_evaluation(f"baseline-{name}") if resumed else None
        if stored is not None:
            found[name] = stored
    if found:
        return found
    wanted = run.cfg.evaluate.baselines
    if "constant" in wanted:
        found["constant"] = constant_label(run.test)
    if "label_logprob" in wanted and not resumed:
        tokenizer = chat.tokenizer
        with run.trainer.awake(), run.observer.phase("baselines"):
            found |= label_logprob(
                run.test,
                run.val,
                lambda prompts, labels: continuation_logprobs(run.trainer, prompts, labels),
                lambda text: tokenizer.encode(text, add_special_tokens=False),
                tokenizer.eos_token_id,
            )
    for name, evaluation in found.items():
        evaluation.write(run.folder.path / "evals", f"baseline-{name}")
    return found


def continuation_logprobs(
    trainer: TrainerGroup, prompts: Sequence[Prompt], continuations: Sequence[Sequence[int]]
) -> NDArray[np.float64]:
    """[prompts, continuations] summed log-probabilities at temperature 1; each prompt is computed once."""
    responses = [np.asarray(ids, np.int32) for ids in continuations]
    groups = [
        TrainGroup(
            prompt_id=prompt.id,
            prompt_ids=prompt.token_ids,
            trajectories=tuple(Trajectory.unscored(ids) for ids in responses),
        )
        for prompt in prompts
    ]
    logprobs = trainer.logprobs(Batch.of(groups), temperature=1.0)
    return np.asarray([[float(r.astype(np.float64).sum()) for r in group] for group in logprobs])


def summarise_run(
    run: RlRun,
    before: Evaluation | None,
    after: Evaluation | None,
    baselines: Mapping[str, Evaluation],
    *,
    seconds: float,
    versions: Mapping[str, str],
    machine: Mapping[str, Any],
) -> RunSummary:
    """Held-out results and paired tests: the trained model against everything else on the same items."""
    results, comparisons = [], []
    sides: list[tuple[str, Evaluation]] = []
    if before is not None:
        items = "evals/test-before.jsonl"
        results.append(EvalResult.of(BEFORE, "before", before.summary(), items=items))
        sides.append((BEFORE, before))
    for name, evaluation in baselines.items():
        items = f"evals/baseline-{name}.jsonl"
        results.append(EvalResult.of(NAMES[name], "baseline", evaluation.summary(), items=items))
        sides.append((NAMES[name], evaluation))
    if after is not None:
        results.append(EvalResult.of(AFTER, "after", after.summary(), items="evals/test-after.jsonl"))
        for name, evaluation in sides:
            comparisons += [
                PairedResult.of(name, c) for c in compare(evaluation, restrict(after, evaluation))
            ]
    steps = run.last_step
    return RunSummary(
        name=run.cfg.run.name,
        status="done" if steps >= run.cfg.algorithm.total_steps else "early stop",
        steps=steps,
        best_step=run.best_step,
        seconds=seconds,
        results=tuple(results),
        comparisons=tuple(comparisons),
        export="export" if run.cfg.checkpoint.export_hf else "",
        versions=versions,
        machine=machine,
        notes=tuple(run.notes),
    )
