"""What a model must beat to have learned anything: one constant label, and the untrained model's likeliest
label.

Both are paired with the model's own evaluation: they yield the same items. Tasks without a label set are
left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from redone.errors import DataError
from redone.evaluate.runner import Evaluation, Item, label_sets, normalise, reference_text
from redone.types import Prompt

Encode = Callable[[str], Sequence[int]]  # text -> token ids, nothing added
# (prompts, label token ids) -> [prompts, labels] summed log-probabilities of each label after each prompt
Continuations = Callable[[Sequence[Prompt], Sequence[Sequence[int]]], NDArray[np.float64]]

LABEL_LOGPROB = "label_logprob"
CALIBRATED = "label_logprob_calibrated"
CONSTANT = "constant"


def constant_label(test: Sequence[Prompt]) -> Evaluation:
    """Always the label that is most frequent in the TEST items: no constant answer can score higher than
    this.

    Raises DataError when no task has a label set.
    """
    items = []
    for prompts in _classification(test).values():
        labels = Counter(normalise(reference_text(p.reference)) for p in prompts)
        best = min(labels, key=lambda label: (-labels[label], label))
        items += [_item(p, best) for p in prompts]
    return Evaluation(items=tuple(items), meta={"baseline": CONSTANT})


def label_logprob(
    test: Sequence[Prompt],
    val: Sequence[Prompt],
    continuations: Continuations,
    encode: Encode,
    stop_token_id: int,
) -> dict[str, Evaluation]:
    """For each test item the label whose tokens, stop token included, are likeliest after the prompt.

    The labels are the texts of `val`'s references, as written there: no test label is looked at.
    CALIBRATED subtracts from each label its mean log-probability over the validation prompts, so a label
    that the model always prefers loses that advantage. Report both; the better one is the one to beat.
    Raises DataError when no task has a label set, or a task of `test` has none in `val`.
    """
    plain: list[Item] = []
    calibrated: list[Item] = []
    validation = _classification(val)
    for task, prompts in _classification(test).items():
        if task not in validation:
            raise DataError(f"task {task!r}: data.val has no label set for it to take labels from")
        labels = _spellings(validation[task])
        ids = [[*encode(label), stop_token_id] for label in labels]
        prior = continuations(validation[task], ids).mean(axis=0)
        logprobs = continuations(prompts, ids)
        for prompt, row in zip(prompts, logprobs, strict=True):
            plain.append(_item(prompt, labels[int(row.argmax())]))
            calibrated.append(_item(prompt, labels[int((row - prior).argmax())]))
    return {
        LABEL_LOGPROB: Evaluation(items=tuple(plain), meta={"baseline": LABEL_LOGPROB}),
        CALIBRATED: Evaluation(items=tuple(calibrated), meta={"baseline": CALIBRATED}),
    }


def restrict(evaluation: Evaluation, to: Evaluation) -> Evaluation:
    """The items of `evaluation` that `to` holds too: a baseline covers classification tasks only."""
    ids = {item.prompt_id for item in to.items}
    return replace(evaluation, items=tuple(item for item in evaluation.items if item.prompt_id in ids))


def _classification(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    labelled = label_sets(prompts)
    if not labelled:
        raise DataError(
            "no task has a label set (2 to 20 repeating references); set evaluate.baselines=[] for such data"
        )
    tasks: dict[str, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        if prompt.task in labelled:
            tasks[prompt.task].append(prompt)
    return dict(tasks)


def _spellings(prompts: Sequence[Prompt]) -> list[str]:
    """One text per label, the most frequent spelling; sorted, so that ties fall the same way every time."""
    counts: Mapping[str, Counter[str]] = defaultdict(Counter)
    for prompt in prompts:
        text = reference_text(prompt.reference)
        counts[normalise(text)][text] += 1
    return [counts[label].most_common(1)[0][0] for label in sorted(counts)]


def _item(prompt: Prompt, answer: str) -> Item:
    correct = float(normalise(answer) == normalise(reference_text(prompt.reference)))
    return Item(
        prompt_id=prompt.id,
        task=prompt.task,
        reference=reference_text(prompt.reference),
        outputs=(answer,),
        correct=correct,
        score=correct,
        finishes=("stop",),
    )
