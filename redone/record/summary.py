"""summary.json: what came out of a run, for the final table, the report and whoever compares runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from redone.errors import RunFolderError

Role = Literal["before", "after", "baseline"]


class TaskSummaryLike(Protocol):
    """What evaluate.runner.TaskSummary offers (this package stands below evaluate)."""

    @property
    def n(self) -> int: ...
    @property
    def accuracy(self) -> float: ...
    @property
    def interval(self) -> tuple[float, float]: ...
    @property
    def mean_score(self) -> float: ...
    @property
    def format_errors(self) -> float: ...
    @property
    def per_class(self) -> Mapping[str, tuple[int, float]]: ...
    @property
    def common_answer(self) -> str: ...
    @property
    def common_share(self) -> float: ...
    @property
    def mean_tokens(self) -> float: ...


class ComparisonLike(Protocol):
    """What evaluate.compare.Comparison offers."""

    @property
    def task(self) -> str: ...
    @property
    def n(self) -> int: ...
    @property
    def before(self) -> float: ...
    @property
    def after(self) -> float: ...
    @property
    def gained(self) -> int: ...
    @property
    def lost(self) -> int: ...
    @property
    def test(self) -> str: ...
    @property
    def p_value(self) -> float: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """One policy or baseline on the held-out items."""

    name: str  # "free generation, before", "constant label", ...
    role: Role
    task: str  # "all", or one task
    n: int
    accuracy: float
    low: float  # Wilson, 95 %
    high: float
    mean_score: float
    format_errors: float | None  # share of answers; None where the question does not arise (baselines)
    per_class: Mapping[str, tuple[int, float]] = field(default_factory=dict)  # label -> (items, accuracy)
    common_answer: str = ""
    common_share: float = 0.0
    mean_tokens: float = 0.0
    items: str = ""  # the evaluation's file, relative to the run folder

    @staticmethod
    def of(
        name: str, role: Role, summary: TaskSummaryLike, *, task: str = "all", items: str = ""
    ) -> EvalResult:
        low, high = summary.interval
        return EvalResult(
            name=name,
            role=role,
            task=task,
            n=summary.n,
            accuracy=summary.accuracy,
            low=low,
            high=high,
            mean_score=summary.mean_score,
            format_errors=None if role == "baseline" else summary.format_errors,
            per_class=dict(summary.per_class),
            common_answer=summary.common_answer,
            common_share=summary.common_share,
            mean_tokens=summary.mean_tokens,
            items=items,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedResult:
    """The trained model against something else, paired on the same items."""

    against: str  # EvalResult.name of the other side
    task: str
    n: int
    before: float
    after: float
    gained: int
    lost: int
    test: str  # "mcnemar" | "bootstrap"
    p_value: float
    low: float  # 95 % interval of after - before
    high: float

    @staticmethod
    def of(against: str, comparison: ComparisonLike) -> PairedResult:
        return PairedResult(
            against=against,
            task=comparison.task,
            n=comparison.n,
            before=comparison.before,
            after=comparison.after,
            gained=comparison.gained,
            lost=comparison.lost,
            test=comparison.test,
            p_value=comparison.p_value,
            low=comparison.low,
            high=comparison.high,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    name: str
    status: Literal["done", "early stop"]
    steps: int
    best_step: int | None
    seconds: float
    results: tuple[EvalResult, ...] = ()
    comparisons: tuple[PairedResult, ...] = ()
    export: str = ""  # relative to the run folder; "" when nothing was exported
    versions: Mapping[str, str] = field(
        default_factory=dict
    )  # package -> version, "python", "redone", "commit"
    machine: Mapping[str, Any] = field(default_factory=dict)  # device, cores, nodes ...
    notes: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        """Atomically."""
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)


def read_summary(path: Path) -> RunSummary:
    """The inverse of save. Raises RunFolderError when the file is no summary."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        results = tuple(
            EvalResult(**{**r, "per_class": {k: (int(n), float(a)) for k, (n, a) in r["per_class"].items()}})
            for r in values.pop("results")
        )
        comparisons = tuple(PairedResult(**c) for c in values.pop("comparisons"))
        notes = tuple(values.pop("notes"))
        return RunSummary(results=results, comparisons=comparisons, notes=notes, **values)
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{path} is not a summary of this version: {error}; remedy: finish the run again"
        ) from error
