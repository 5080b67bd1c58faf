"""The conversations of the targeted stage: failing tasks, by capability, clean, without copies."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from redone.config.pipeline import SftSetNode
from redone.config.schema import Config
from redone.data.allot import allot
from redone.data.overlap import Decontaminator, NearDuplicates
from redone.data.prompts import parse_messages, read_rows
from redone.data.sft import as_turn, conversation
from redone.errors import DataError
from redone.pipeline.rows import Known, known_rows, rank


@dataclass(slots=True, kw_only=True)
class SftSet:
    rows: list[dict[str, Any]]
    manifest: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class _Sieve:
    """What was left out, and a few examples of it."""

    counts: Counter[str] = field(default_factory=Counter)
    overlaps: list[dict[str, Any]] = field(default_factory=list)


def build_sft_set(
    node: SftSetNode,
    tasks: Sequence[str] | None,
    files: Sequence[str],
    evaluation: Sequence[str],
    cfg: Config,
    seed: int,
) -> SftSet:
    """`tasks`: the bucket (None: every task). `evaluation`: files whose items no row may hold.

    Raises DataError on an unusable row, and on an overlap when decontaminate.on_overlap=error.
    """
    texts = [evaluation_text(values, place, cfg) for f in evaluation for place, values in read_rows(f)]
    decontaminate = node.decontaminate
    guard = Decontaminator(texts, decontaminate.ngram, decontaminate.share)
    wanted = None if tasks is None else set(tasks)
    sieve = _Sieve()
    by_task: dict[str, list[tuple[Known, dict[str, Any]]]] = defaultdict(list)
    copies = NearDuplicates(node.near_duplicate) if node.near_duplicate is not None else None
    chosen = [k for k in known_rows(files, cfg) if wanted is None or k.row.task in wanted]
    sieve.counts["rows of the bucket"] = len(chosen)
    for known in sorted(chosen, key=lambda k: rank(seed, "sft_set", k.id)):
        row = as_conversation(known, cfg)
        if row is None:
            sieve.counts["no answer to imitate"] += 1
        elif _overlaps(known, row, guard, texts, decontaminate.on_overlap, sieve):
            sieve.counts["overlap with evaluation"] += 1
        elif copies is not None and not copies.add(_key_text(row)):
            sieve.counts["near duplicate"] += 1
        else:
            by_task[known.row.task].append((known, row))
    parts = shares_of(by_task, node)
    rows = []
    for task in sorted(by_task):
        members = _balanced(by_task[task], node.balance_key)[: parts[task]]
        rows += [row for _, row in members]
    manifest = {
        "rows": len(rows),
        "seed": seed,
        "bucket": sorted(wanted) if wanted is not None else "all",
        "tasks": {
            task: {
                "capability": capability(by_task[task], task, node),
                "weight": node.weights.get(task, 1.0),
                "available": len(by_task[task]),
                "drawn": parts[task],
            }
            for task in sorted(by_task)
        },
        "tasks_without_rows": sorted((wanted or set()) - set(by_task)),
        "left_out": dict(sieve.counts),
        "evaluation_items": len(texts),
        "overlaps": sieve.overlaps[:50],
    }
    return SftSet(rows=rows, manifest=manifest)


def shares_of(by_task: Mapping[str, Sequence[tuple[Known, Any]]], node: SftSetNode) -> dict[str, int]:
    """task -> conversations: capabilities share alike (as far as they have rows), tasks by weight."""
    groups: dict[str, list[str]] = defaultdict(list)
    for task, members in by_task.items():
        groups[capability(members, task, node)].append(task)
    weight = {t: node.weights.get(t, 1.0) for t in by_task}
    sizes = {c: sum(len(by_task[t]) for t in tasks) for c, tasks in groups.items()}
    # Equal sizes make equal shares; a capability counts as much as its weightiest task.
    heavy = {c: max(weight[t] for t in tasks) for c, tasks in groups.items()}
    even = {c: heavy[c] / sizes[c] for c in sizes}
    per_group = allot(sizes, node.size, weights=even, caps={})
    parts: dict[str, int] = {}
    for name, tasks in groups.items():
        inner = {t: len(by_task[t]) for t in tasks}
        parts |= allot(
            inner, per_group[name], weights={t: weight[t] for t in tasks}, caps={}, temperature=2.0
        )
    return parts


def capability(members: Sequence[tuple[Known, Any]], task: str, node: SftSetNode) -> str:
    if task in node.capabilities:
        return node.capabilities[task]
    found = members[0][0].row.extra.get("capability") if members else None
    return str(found) if found else task


def as_conversation(known: Known, cfg: Config) -> dict[str, Any] | None:
    """The row as an SFT example: its own answer column, else a text reference; None without either."""
    values = dict(known.values)
    place = known.row.place
    if values.get("messages") is None and not values.get(cfg.sft.response_key):
        reference = known.row.reference
        if not isinstance(reference, str) or not reference.strip():
            return None
        values[cfg.sft.response_key] = reference
    turns = conversation(values, cfg, place)
    return {
        "task": known.row.task,
        "domain": known.row.domain,
        "messages": [as_turn(m) for m in turns],
        "prompt_id": known.id,
        "drawn_from": known.values.get("drawn_from", place),
    }


def evaluation_text(values: Mapping[str, Any], place: str, cfg: Config) -> str:
    """What identifies an evaluation item: its last user message (instructions and examples come before)."""
    turns = parse_messages(values.get(cfg.data.prompt_key), cfg.data.prompt_key, place)
    return turns[-1].content


def _key_text(row: Mapping[str, Any]) -> str:
    """The question and the answer: what makes two conversations alike, without shared examples before."""
    return "\n".join(m["content"] for m in row["messages"][-2:])


def _overlaps(
    known: Known,
    row: Mapping[str, Any],
    guard: Decontaminator,
    texts: Sequence[str],
    on_overlap: str,
    sieve: _Sieve,
) -> bool:
    for message in row["messages"]:
        found = guard.find(message["content"])
        if found is not None:
            break
    else:
        return False
    if on_overlap == "error":
        raise DataError(
            f"{known.row.place}: holds {found.share:.0%} of the evaluation item "
            f"{texts[found.item]!r:.80}; remove the row, or set decontaminate.on_overlap=drop"
        )
    sieve.overlaps.append(
        {"row": known.row.place, "evaluation_item": texts[found.item][:200], "share": round(found.share, 3)}
    )
    return True


def _balanced(
    members: Sequence[tuple[Known, dict[str, Any]]], key: str | None
) -> Sequence[tuple[Known, dict[str, Any]]]:
    """Values of the balance key in turn, as long as each has rows; then the rest."""
    if key is None:
        return members
    queues: dict[str, list[tuple[Known, dict[str, Any]]]] = defaultdict(list)
    for member in members:
        row = member[0].row
        value = row.reference if key == "reference" else row.extra.get(key)
        queues[str(value)].append(member)
    found = []
    longest = max(len(q) for q in queues.values())
    for turn in range(longest):
        found += [queues[v][turn] for v in queues if turn < len(queues[v])]
    return found
