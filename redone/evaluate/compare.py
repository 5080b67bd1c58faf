"""Two evaluations of the same items: is the difference more than chance?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from redone.algo.stats import mcnemar_exact, paired_bootstrap
from redone.evaluate.runner import Evaluation, Item

Test = Literal["mcnemar", "bootstrap"]
ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`after` against `before`. With 0/1 outcomes: accuracies, exact McNemar (two-sided) and the discordant
    counts;
    otherwise mean scores and a paired bootstrap. `low`, `high`: 95 % bootstrap interval of the difference."""

    task: str
    n: int  # items that both evaluations could score
    before: float
    after: float
    gained: int  # items that got better
    lost: int  # items that got worse
    test: Test
    p_value: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        return self.after - self.before

    def significant(self, alpha: float = 0.05) -> bool:
        """Better, and not by chance."""
        return self.difference > 0 and self.p_value < alpha


def compare(before: Evaluation, after: Evaluation) -> tuple[Comparison, ...]:
    """One comparison of all items together, then one per task (no correction for their number).

    Items whose reward failed in either evaluation are left out of both.
    Raises ValueError when the evaluations are not of the same items.
    """
    pairs = _paired(before, after)
    tasks = list(dict.fromkeys(a.task for a, _ in pairs))
    found = [_compare(ALL, pairs)]
    if len(tasks) > 1:
        found += [_compare(task, [pair for pair in pairs if pair[0].task == task]) for task in tasks]
    return tuple(found)


def _paired(before: Evaluation, after: Evaluation) -> list[tuple[Item, Item]]:
    later = {item.prompt_id: item for item in after.items}
    ids = [item.prompt_id for item in before.items]
    if len(later) != len(after.items) or len(set(ids)) != len(ids) or set(ids) != set(later):
        different = sorted(set(ids) ^ set(later))[:3]
        example = ", ".join(different) or "repeated ids"
        raise ValueError(f"the evaluations hold different items, e.g. {example}")
    pairs = [(item, later[item.prompt_id]) for item in before.items]
    usable = [(a, b) for a, b in pairs if a.usable and b.usable]
    if not usable:
        raise ValueError("no item could be scored in both evaluations")
    return usable


def _compare(task: str, pairs: list[tuple[Item, Item]]) -> Comparison:
    binary = all(item.score in (0.0, 1.0) and item.correct in (0.0, 1.0) for pair in pairs for item in pair)
    old = [a.correct if binary else a.score for a, _ in pairs]
    new = [b.correct if binary else b.score for _, b in pairs]
    gained = sum(b > a for a, b in zip(old, new, strict=True))
    lost = sum(b < a for a, b in zip(old, new, strict=True))
    interval = paired_bootstrap(old, new)
    return Comparison(
        task=task,
        n=len(pairs),
        before=sum(old) / len(old),
        after=sum(new) / len(new),
        gained=gained,
        lost=lost,
        test="mcnemar" if binary else "bootstrap",
        p_value=mcnemar_exact(gained, lost) if binary else interval.p_value,
        low=interval.low,
        high=interval.high,
    )
