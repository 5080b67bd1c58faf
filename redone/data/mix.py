"""A stage's rows, drawn from many tasks: two passes over the files, memory for the counts of tasks only.

The first pass counts rows per stratum (domain, task, with or without rationale); `allot` decides how many of
each are drawn; the second pass draws exactly that many by selection sampling (Knuth, TAOCP 2, 3.4.2 S).
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redone.config.pipeline import DrawConfig, MixSource
from redone.data.allot import allot
from redone.data.prompts import read_rows
from redone.errors import DataError

Check = Callable[
    [Mapping[str, Any], str], None
]  # (row, place): raises DataError on a row that cannot be used


@dataclass(frozen=True, slots=True, order=True)
class Stratum:
    """Rows that are alike to the draw."""

    domain: str
    task: str
    source: int
    rationale: bool


@dataclass(slots=True, kw_only=True)
class Drawn:
    """The manifest of a draw. Counts by stratum; `skipped`: unusable rows and the first few reasons."""

    available: Counter[Stratum] = field(default_factory=Counter)
    drawn: Counter[Stratum] = field(default_factory=Counter)
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)

    def manifest(self, sources: Sequence[MixSource], draw: DrawConfig, seed: int) -> dict[str, Any]:
        """JSON: what was drawn from where."""
        tasks: dict[str, dict[str, Any]] = {}
        for stratum in sorted(self.available):
            entry = tasks.setdefault(
                f"{stratum.domain}/{stratum.task}",
                {"domain": stratum.domain, "task": stratum.task, "available": 0, "drawn": 0, "sources": {}},
            )
            entry["available"] += self.available[stratum]
            entry["drawn"] += self.drawn[stratum]
            files = ", ".join(sources[stratum.source].files)
            entry["sources"][files] = entry["sources"].get(files, 0) + self.drawn[stratum]
        rows = self.drawn.total()
        by_domain: Counter[str] = Counter()
        for stratum, count in self.drawn.items():
            by_domain[stratum.domain] += count
        rationales = sum(count for stratum, count in self.drawn.items() if stratum.rationale)
        return {
            "rows": rows,
            "seed": seed,
            "draw": draw.model_dump(mode="json", include=set(DrawConfig.model_fields)),
            "domains": {d: {"rows": n, "share": n / max(1, rows)} for d, n in sorted(by_domain.items())},
            "rationales": {"rows": rationales, "share": rationales / max(1, rows)},
            "tasks": list(tasks.values()),
            "skipped": self.skipped,
            "skipped_reasons": self.reasons,
        }


def mix(
    sources: Sequence[MixSource],
    draw: DrawConfig,
    seed: int,
    target: Path,
    check: Check = lambda row, place: None,
    skip_bad: bool = False,
) -> Drawn:
    """Write the drawn rows to `target` (jsonl, in the files' order) and return what was drawn.

    Rows get `task`, `domain` and `drawn_from`. Raises DataError on an unusable row (skip_bad: it is counted
    and left out), when nothing is left, or when files changed between the two passes.
    """
    found = Drawn()
    for stratum, _, _ in _rows(sources, draw, check, skip_bad, found):
        found.available[stratum] += 1
    wanted = _wanted(found.available, sources, draw)
    pick = _Picker(found.available, wanted, draw.max_repeat, seed)
    partial = target.with_name(f".{target.name}.partial")
    with partial.open("w", encoding="utf-8") as out:
        for stratum, row, place in _rows(sources, draw, check, skip_bad, Drawn()):
            for _ in range(pick(stratum)):
                found.drawn[stratum] += 1
                origin = row.get("drawn_from", place)  # rows of an earlier draw keep theirs
                line = {**row, "task": stratum.task, "domain": stratum.domain, "drawn_from": origin}
                out.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
    if found.drawn.total() != sum(wanted.values()):
        raise DataError(f"{target}: files changed while they were read; run the node again")
    if not found.drawn:
        raise DataError(f"{target}: no usable row in {', '.join(f for s in sources for f in s.files)}")
    os.replace(partial, target)
    return found


class _Picker:
    """Selection sampling: of the next row, how many copies are taken."""

    def __init__(
        self, available: Mapping[Stratum, int], wanted: Mapping[Stratum, int], max_repeat: int, seed: int
    ) -> None:
        self._left = dict(available)
        self._wanted = dict(wanted)
        self._whole = {
            s: wanted[s] // available[s] if max_repeat > 1 else 0 for s in available if available[s]
        }
        for stratum, copies in self._whole.items():
            self._wanted[stratum] -= copies * available[stratum]
        self._chance = {
            s: random.Random(f"{seed}/{s.domain}/{s.task}/{s.source}/{s.rationale}") for s in available
        }

    def __call__(self, stratum: Stratum) -> int:
        left, wanted = self._left.get(stratum, 0), self._wanted.get(stratum, 0)
        if left == 0:
            return 0
        taken = int(self._chance[stratum].random() * left < wanted)
        self._left[stratum] -= 1
        self._wanted[stratum] -= taken
        return taken + self._whole[stratum]


def _rows(
    sources: Sequence[MixSource], draw: DrawConfig, check: Check, skip_bad: bool, found: Drawn
) -> Iterator[tuple[Stratum, Mapping[str, Any], str]]:
    for number, source in enumerate(sources):
        for file in source.files:
            for place, values in read_rows(file):
                row = dict(values)
                row["task"] = row.get("task") or source.task or row.get("data_source") or "default"
                row["domain"] = row.get("domain") or source.domain or "sns"
                try:
                    check(row, place)
                except DataError as error:
                    if not skip_bad:
                        raise
                    found.skipped += 1
                    found.reasons = [*found.reasons, str(error)][:10]
                    continue
                rationale = has_rationale(row, draw.rationale_key)
                yield Stratum(str(row["domain"]), str(row["task"]), number, rationale), row, place


def has_rationale(row: Mapping[str, Any], key: str) -> bool:
    """Whether the column, or the extra_info key, is there and says something."""
    extra = row.get("extra_info") or row.get("metadata") or {}
    return bool(row.get(key) or (isinstance(extra, Mapping) and extra.get(key)))


def _wanted(
    available: Counter[Stratum], sources: Sequence[MixSource], draw: DrawConfig
) -> dict[Stratum, int]:
    """Rows of every stratum: domains by share, tasks by temperature, sources and rationales inside a task."""
    by_domain: dict[str, Counter[Stratum]] = defaultdict(Counter)
    for stratum, count in available.items():
        by_domain[stratum.domain][stratum] = count
    unknown = sorted(set(draw.shares) - set(by_domain))
    if unknown:
        raise DataError(
            f"shares name the domain {unknown[0]!r}, but rows are of {', '.join(sorted(by_domain))}"
        )
    totals: dict[str, int | None] = dict.fromkeys(by_domain)
    if draw.shares:
        whole = draw.total or _largest(by_domain, draw)
        norm = sum(draw.shares.values())
        totals = {d: round(whole * draw.shares.get(d, 0.0) / norm) for d in by_domain}
    elif draw.total is not None:
        sizes = {d: c.total() * draw.max_repeat for d, c in by_domain.items()}
        totals = dict(allot(sizes, draw.total, weights={}, caps={}))
    tasks: dict[str, dict[Stratum, int]] = {}  # domain/task -> rows that its strata offer
    parts: dict[str, int] = {}
    for domain, strata in by_domain.items():
        offered, sizes = _of_tasks(strata, totals[domain], sources, draw)
        tasks |= {f"{domain}/{t}": members for t, members in offered.items()}
        parts |= {f"{domain}/{t}": n for t, n in sizes.items()}
    with_rationale = _rationales(tasks, parts, draw.rationale_share)
    wanted: dict[Stratum, int] = {}
    for name, members in tasks.items():
        wanted |= _inside_task(members, parts[name], with_rationale.get(name))
    return wanted


def _largest(by_domain: Mapping[str, Counter[Stratum]], draw: DrawConfig) -> int:
    """Without a total: as many rows as keep the shares without repeating one."""
    norm = sum(draw.shares.values())
    return int(min(by_domain[d].total() * norm / s for d, s in draw.shares.items() if s > 0))


def _of_tasks(
    strata: Counter[Stratum], total: int | None, sources: Sequence[MixSource], draw: DrawConfig
) -> tuple[dict[str, dict[Stratum, int]], dict[str, int]]:
    """(task -> rows that its strata offer, task -> rows to draw)."""
    tasks: dict[str, dict[Stratum, int]] = defaultdict(dict)
    for stratum, count in strata.items():
        cap = sources[stratum.source].cap
        tasks[stratum.task][stratum] = min(count * draw.max_repeat, cap or count * draw.max_repeat)
    sizes = {t: sum(members.values()) for t, members in tasks.items()}
    weights = {t: max(sources[s.source].weight for s in members) for t, members in tasks.items()}
    caps = {t: draw.cap for t in tasks} if draw.cap else {}
    parts = allot(sizes, total, weights=weights, caps=caps, floor=draw.floor, temperature=draw.temperature)
    return tasks, parts


def _rationales(
    tasks: Mapping[str, Mapping[Stratum, int]], parts: Mapping[str, int], share: float | None
) -> dict[str, int]:
    """task -> rows with a rationale, so that the share holds over all rows as far as tasks have them."""
    if share is None:
        return {}
    having = {t: sum(n for s, n in m.items() if s.rationale) for t, m in tasks.items()}
    lacking = {t: sum(n for s, n in m.items() if not s.rationale) for t, m in tasks.items()}
    least = {t: max(0, n - lacking[t]) for t, n in parts.items()}
    room = {t: min(n, having[t]) - least[t] for t, n in parts.items()}
    more = max(0, round(share * sum(parts.values())) - sum(least.values()))
    added = allot(room, more, weights={}, caps={})
    return {t: least[t] + added[t] for t in parts}


def _inside_task(
    members: Mapping[Stratum, int], total: int, with_rationale: int | None
) -> dict[Stratum, int]:
    """Sources in proportion, rationales as decided."""
    names = {f"{i}": s for i, s in enumerate(sorted(members))}
    sizes = {k: members[s] for k, s in names.items()}
    if with_rationale is None:
        parts = allot(sizes, total, weights={}, caps={})
    else:
        yes = {k: n for k, n in sizes.items() if names[k].rationale}
        no = {k: n for k, n in sizes.items() if not names[k].rationale}
        parts = allot(yes, with_rationale, weights={}, caps={})
        parts |= allot(no, total - with_rationale, weights={}, caps={})
    return {names[k]: n for k, n in parts.items()}
