"""diagnosis.json and diagnosis.html: one self-contained page."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from redone.config.pipeline import DiagnoseNode
from redone.pipeline.diagnose import TaskReport, failing
from redone.pipeline.folder import write_json
from redone.record.bars import Bar, bar_chart
from redone.record.report import STYLE

HEAD = (
    "task", "prompts", "pass rate", "pass@k", "mean score", "against base", "constant answer", "verdict",
    "flags",
)  # fmt: skip
DETAILS = (
    "task", "reward min / mean / max (std)", "spread within prompts", "prompts RL can use", "tokens",
    "cut by length", "commonest answer", "answer entropy",
)  # fmt: skip


def write_diagnosis(folder: Path, reports: Sequence[TaskReport], node: DiagnoseNode) -> None:
    bucket = [r.task for r in failing(reports, node.max_tasks)]
    write_json(
        folder / "diagnosis.json",
        {
            "fail_below": node.fail_below,
            "score": node.score,
            "failing": bucket,
            "tasks": [asdict(r) for r in reports],
        },
    )
    partial = folder / ".diagnosis.html.partial"
    partial.write_text(page(reports, node, bucket), encoding="utf-8")
    os.replace(partial, folder / "diagnosis.html")


def page(reports: Sequence[TaskReport], node: DiagnoseNode, bucket: Sequence[str]) -> str:
    """The page; tasks stand weakest first."""
    k = max((r.k for r in reports), default=1)
    measure = "pass rate" if node.score == "pass_rate" else "mean score"
    lead = (
        f"{len(bucket)} of {len(reports)} tasks go to the failure bucket ({measure} below "
        f"{node.fail_below:.0%}, a regression against base, or no better than a constant answer), from {k} "
        "answers per prompt."
    )
    rates = bar_chart(
        [r.task for r in reports],
        [
            (f"pass rate (mean@{k})", [Bar(value=r.pass_rate, low=r.low, high=r.high) for r in reports]),
            (f"pass@{k}", [Bar(value=r.pass_at_k) for r in reports]),
        ],
    )
    scores = bar_chart(
        [r.task for r in reports],
        [
            ("mean score", [Bar(value=r.mean_score) for r in reports]),
            ("base", [Bar(value=r.base_score) if r.base_score is not None else None for r in reports]),
            ("best constant answer", [Bar(value=r.constant_score) for r in reports]),
        ],
    )
    body = [
        "<h1>Diagnosis</h1>",
        f'<p class="sub">{html.escape(lead)}</p>',
        "<h2>What the model can do</h2>",
        '<div class="grid">'
        f'<div class="card"><h3>Solved on average, and solved at least once</h3>{rates}</div>'
        f'<div class="card"><h3>Against the base model and constant answers</h3>{scores}</div></div>',
        "<h2>Tasks, weakest first</h2>",
        _table(HEAD, [_row(r) for r in reports]),
        '<p class="sub">learnable by RL: sampling finds correct answers that the average misses. '
        "missing knowledge: hardly any of the samples is right, so there is nothing to reinforce.</p>",
        "<h2>Rewards, lengths, answers</h2>",
        _table(DETAILS, [_details(r) for r in reports]),
        "<h2>Slices</h2>",
        _table(("task", "slice", "prompts", "pass rate"), [row for r in reports for row in _slices(r)]),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Diagnosis - redone</title>'
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return '<p class="sub">none</p>'
    top = "".join(f"<th>{html.escape(t)}</th>" for t in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _row(r: TaskReport) -> tuple[str, ...]:
    against = ""
    if r.difference is not None and r.p_value is not None:
        mean, low, high = r.difference
        against = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}], p = {r.p_value:.3g}"
    return (
        f"{r.task}{' (failing)' if r.failing else ''}",
        str(r.n),
        f"{r.pass_rate:.1%} [{r.low:.1%}, {r.high:.1%}]",
        f"{r.pass_at_k:.1%}",
        f"{r.mean_score:.3f}",
        against,
        f"{r.constant_score:.3f} {r.constant_answer[:20]!r}",
        r.verdict,
        "; ".join(r.flags),
    )


def _details(r: TaskReport) -> tuple[str, ...]:
    low, high, mean, std = r.reward_scale
    return (
        r.task,
        f"{low:.2f} / {mean:.3f} / {high:.2f} ({std:.3f})",
        f"{r.group_std:.3f}",
        f"{r.informative:.0%}",
        f"{r.mean_tokens:.1f}",
        f"{r.cut:.1%}",
        f"{r.common_answer[:24]!r} {r.common_share:.0%}",
        f"{r.entropy:.2f}",
    )


def _slices(r: TaskReport) -> list[tuple[str, ...]]:
    return [(r.task, s.name, str(s.n), f"{s.pass_rate:.1%} [{s.low:.1%}, {s.high:.1%}]") for s in r.slices]
