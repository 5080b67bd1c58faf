"""Answers that know nothing, scored like the model's: what a score must be read against.

The most frequent right answer and the empty answer come by themselves; a suite names others (`policies`):
an empty list, the whole note, every candidate, the name of the released scorer's own variable.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from redone.api import Scorer
from redone.evaluate.answer import completion_of, score_answers
from redone.evaluate.items import EvalItem, render
from redone.evaluate.measures import Floats, Measure
from redone.evaluate.runner import is_label_set, normalise
from redone.evaluate.suite import Part, runs_code

EMPTY = "empty answer"
COMMONEST = "commonest answer"


def policy_answers(part: Part, items: Sequence[EvalItem]) -> dict[str, list[str]]:
    """Policy -> its answer to every item of `part`."""
    found: dict[str, list[str]] = {}
    if not runs_code(part):
        found[EMPTY] = [""] * len(items)
        label = commonest([item.prompt.reference for item in items])
        if label is not None:
            found[f"{COMMONEST}: {label}"] = [label] * len(items)
    for name, template in part.policies.items():
        found[name] = [
            render(template, item.row, f"policy {name!r} of {part.id}, item {item.index}") for item in items
        ]
    return found


def commonest(references: Sequence[object]) -> str | None:
    """The most frequent one where a few answers repeat; None for free text."""
    texts = [text for text in references if isinstance(text, str)]
    counts = Counter(normalise(text) or text for text in texts)
    if not texts or len(texts) < len(references) or not is_label_set(len(counts), len(texts)):
        return None
    best = min(counts, key=lambda label: (-counts[label], label))
    return next(text for text in texts if (normalise(text) or text) == best)


def score_policies(
    part: Part, items: Sequence[EvalItem], rewards: Scorer | None, measures: Mapping[str, Measure]
) -> dict[str, dict[str, Floats]]:
    """Policy -> metric -> [1, items, k]: one answer per item."""
    return asyncio.run(_score(part, items, rewards, measures))


async def _score(
    part: Part, items: Sequence[EvalItem], rewards: Scorer | None, measures: Mapping[str, Measure]
) -> dict[str, dict[str, Floats]]:
    found: dict[str, dict[str, Floats]] = {}
    for policy, answers in policy_answers(part, items).items():
        found[policy] = {}
        for name, measure in measures.items():
            rows = await asyncio.gather(
                *(
                    score_answers(item, [completion_of(text)], rewards, name, measure)
                    for item, text in zip(items, answers, strict=True)
                )
            )
            found[policy][name] = np.asarray([[stats[0] for stats, _, _ in rows]], dtype=np.float64)
    return found
