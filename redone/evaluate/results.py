"""From records to what a person reads: scores with intervals, policies beside them, tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from redone.algo.stats import wilson_interval
from redone.evaluate.answer import UNFIT, Measures
from redone.evaluate.items import EvalItem
from redone.evaluate.measures import Floats, Measure
from redone.evaluate.records import Record
from redone.evaluate.resample import interval, mean_of, resampled, scores_of, weights
from redone.evaluate.suite import Part, Suite

Policies = Callable[[Part, Sequence[EvalItem]], Mapping[str, Mapping[str, Floats]]]
SAMPLES = 4  # items of a part that the page shows
SHOWN = 700  # characters of each text there
FLAT = 1e-9  # an interval of no width


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranged:
    value: float  # 0..100
    low: float
    high: float
    partial: str = ""  # why this is not the published score


@dataclass(frozen=True, slots=True, kw_only=True)
class PartResult:
    id: str
    items: int
    unfit: int  # prompts that fill the context: scored as empty answers
    cut: float  # share of answers that the length limit ended
    failed: int  # answers whose reward failed: they count nowhere
    tokens: float  # mean of an answer
    metrics: Mapping[str, Mapping[str, Ranged]]  # metric -> score -> value; main ones first
    policies: Mapping[str, Mapping[str, Mapping[str, float]]]  # policy -> metric -> score -> value
    samples: Sequence[Mapping[str, Any]] = ()

    def best_policy(self, metric: str) -> tuple[str, float] | None:
        """The knowledge-free policy with the highest main score."""
        found = [(n, next(iter(scores[metric].values()))) for n, scores in self.policies.items()]
        return max(found, key=lambda pair: pair[1]) if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TableResult:
    columns: Mapping[str, Ranged]
    average: Ranged | None  # plain mean of the complete columns; None when there are fewer than two
    averaged: tuple[str, ...]
    policies: Mapping[str, float]  # column -> mean over its files of the best knowledge-free policy


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteResult:
    name: str
    title: str
    source: str
    parts: tuple[PartResult, ...]
    tables: Mapping[str, TableResult]
    paper: Mapping[str, str] = field(default_factory=dict)


def suite_result(
    suite: Suite,
    items: Sequence[EvalItem],
    records: Mapping[str, Record],
    measures: Measures,
    policies: Policies,
) -> SuiteResult:
    """Items without a record (an interrupted evaluation) are left out, and so counted nowhere."""
    parts, drawn_scores = [], {}
    for part in suite.parts:
        asked = [item for item in items if item.part.id == part.id and item.prompt.id in records]
        if not asked:
            continue
        kept = [records[item.prompt.id] for item in asked]
        drawn = weights(part.id, len(kept))
        ranges: dict[str, dict[str, Ranged]] = {}
        for name, measure in measures[part.id].items():
            numbers = stacked(kept, name)
            values, spread = scores_of(measure, numbers), resampled(measure, numbers, drawn)
            ranges[name] = _ranges(measure, len(kept), values, spread)
            for score, value in values.items():
                drawn_scores[f"{part.id}/{name}/{score}"] = (value, spread[score])
        found = policies(part, asked)
        known = {
            policy: {m: scores_of(measures[part.id][m], numbers) for m, numbers in by_metric.items()}
            for policy, by_metric in found.items()
        }
        parts.append(_part(part, asked, kept, ranges, known))
    tables = {
        name: table
        for name, columns in suite.tables.items()
        if (table := _table(columns, parts, drawn_scores)) is not None
    }
    return SuiteResult(
        name=suite.name,
        title=suite.title,
        source=suite.source,
        parts=tuple(parts),
        tables=tables,
        paper={k: v for k, v in suite.paper.items() if k in tables},
    )


def stacked(records: Sequence[Record], metric: str) -> Floats:
    """[samples, items, k]"""
    return np.asarray([r.stats[metric] for r in records], dtype=np.float64).transpose(1, 0, 2)


def plain(results: Sequence[SuiteResult]) -> list[dict[str, Any]]:
    """As JSON."""
    return [asdict(result) for result in results]


def _ranges(
    measure: Measure, items: int, values: Mapping[str, float], spread: Mapping[str, Floats]
) -> dict[str, Ranged]:
    found = {}
    for name, value in values.items():
        low, high = interval(spread[name])
        if high - low < FLAT and (value < FLAT or value > 100 - FLAT):
            # All items alike: resampling them says nothing about others. Wilson's interval of the share of
            # items that earn anything (or everything) stands in.
            low, high = (100 * edge for edge in wilson_interval(items if value > 50 else 0, items))
        found[name] = Ranged(value=value, low=low, high=high, partial=measure.partial)
    return found


def _mean_interval(spread: Floats, members: Sequence[Ranged]) -> tuple[float, float]:
    """Of a mean of scores; where resampling has no width, the mean of their own intervals, which is wider
    than needed."""
    low, high = interval(spread)
    if high - low < FLAT:
        return float(np.mean([m.low for m in members])), float(np.mean([m.high for m in members]))
    return low, high


def _part(
    part: Part,
    items: Sequence[EvalItem],
    records: Sequence[Record],
    ranges: Mapping[str, Mapping[str, Ranged]],
    policies: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> PartResult:
    finishes = [finish for record in records for finish in record.finishes]
    tokens = [count for record in records for count in record.tokens]
    return PartResult(
        id=part.id,
        items=len(records),
        unfit=sum(record.finishes[0] == UNFIT for record in records),
        cut=sum(finish == "length" for finish in finishes) / len(finishes),
        failed=sum(sum(record.failed.values()) for record in records),
        tokens=sum(tokens) / len(tokens),
        metrics=ranges,
        policies=policies,
        samples=[
            {
                "prompt": _cut(items[n].prompt.messages[-1].content),
                "output": _cut(records[n].outputs[0]),
                "reference": _cut(str(items[n].prompt.reference)),
                "finish": records[n].finishes[0],
                "details": {m: texts[0] for m, texts in records[n].details.items() if texts[0]},
            }
            for n in range(0, len(records), max(1, len(records) // SAMPLES))
        ][:SAMPLES],
    )


def _table(
    columns: Mapping[str, Sequence[str]],
    parts: Sequence[PartResult],
    drawn: Mapping[str, tuple[float, Floats]],
) -> TableResult | None:
    by_id = {part.id: part for part in parts}
    found: dict[str, Ranged] = {}
    spreads: dict[str, Floats] = {}
    floor: dict[str, float] = {}
    for column, names in columns.items():
        paths = [_path(name, by_id) for name in names]
        if any(path is None for path in paths):
            continue
        full = [path for path in paths if path is not None]
        spread = mean_of({path: drawn[path][1] for path in full})
        keys = [path.split("/", 2) for path in full]
        members = [by_id[part].metrics[metric][score] for part, metric, score in keys]
        low, high = _mean_interval(spread, members)
        why = "; ".join(dict.fromkeys(m.partial for m in members if m.partial))
        found[column] = Ranged(
            value=float(np.mean([drawn[p][0] for p in full])), low=low, high=high, partial=why
        )
        best = [_best_policy(by_id, path) for path in full]
        if all(value is not None for value in best):
            floor[column] = float(np.mean(best))  # type: ignore[arg-type]
        if not why:
            spreads[column] = spread
    if not found:
        return None
    average = None
    if len(spreads) > 1:
        low, high = _mean_interval(mean_of(spreads), [found[column] for column in spreads])
        value = float(np.mean([found[column].value for column in spreads]))
        left_out = [column for column in columns if column not in spreads]
        note = (
            f"of {len(spreads)} of {len(columns)} columns, without {', '.join(left_out)}" if left_out else ""
        )
        average = Ranged(value=value, low=low, high=high, partial=note)
    return TableResult(columns=found, average=average, averaged=tuple(spreads), policies=floor)


def _path(name: str, parts: Mapping[str, PartResult]) -> str | None:
    """part/metric -> part/metric/its main score; None when the part was not asked or lacks the score."""
    part, metric, *score = name.split("/", 2)
    if part not in parts or metric not in parts[part].metrics:
        return None
    scores = parts[part].metrics[metric]
    chosen = score[0] if score else next(iter(scores))
    return f"{part}/{metric}/{chosen}" if chosen in scores else None


def _best_policy(parts: Mapping[str, PartResult], path: str) -> float | None:
    part, metric, score = path.split("/", 2)
    values = [scores[metric][score] for scores in parts[part].policies.values() if score in scores[metric]]
    return max(values) if values else None


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} [...] {text[-SHOWN // 2 :]}"
