"""report.html of an evaluation: one file, no script, nothing fetched."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from redone.evaluate.paper import CAVEAT, CITATION
from redone.evaluate.results import PartResult, SuiteResult
from redone.evaluate.tables import HEADS, notes, part_rows, table_rows
from redone.record.report import STYLE

ROW, LEFT, WIDTH, RIGHT = 22, 250, 860, 60  # pixels of the plot
MORE = """
.plot{max-width:980px;margin:14px 0}th.n{text-align:right}table{margin:8px 0}
.plot text{font-size:12px}tr.model td{font-weight:600}tr.floor td{color:#9a2c2c}
tr.interval td,tr.paper td{color:#666}.small{font-size:13px;color:#666}
"""


def render(
    results: Sequence[SuiteResult], model: str, facts: Mapping[str, Any], warnings: Sequence[str] = ()
) -> str:
    """The page. `facts`: settings and versions, shown at the end."""
    body = [
        f"<h1>Evaluation of {html.escape(model)}</h1>",
        f'<p class="sub">{html.escape(_headline(facts))}</p>',
        *(f'<p class="warn">{html.escape(text)}</p>' for text in warnings),
        *(_suite(result, model) for result in results),
        _reading(),
        _facts(facts),
    ]
    return document(f"Evaluation of {model}", "".join(body))


def document(title: str, body: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)} - redone'
        f'</title><meta name="viewport" content="width=device-width"><style>{STYLE}{MORE}</style></head>'
        f"<body>{body}</body></html>\n"
    )


def grid(heads: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """A table; columns of numbers to the right."""
    right = [n > 0 and any(_number(row[n]) for row in rows) for n in range(len(heads))]
    marks = [' class="n"' if to_right else "" for to_right in right]
    top = "".join(f"<th{m}>{html.escape(head)}</th>" for m, head in zip(marks, heads, strict=True))
    lines = []
    for n, row in enumerate(rows):
        cells = "".join(f"<td{m}>{html.escape(cell)}</td>" for m, cell in zip(marks, row, strict=True))
        lines.append(f'<tr class="{classes[n] if classes else ""}">{cells}</tr>')
    return f"<table><tr>{top}</tr>{''.join(lines)}</table>"


def plot(parts: Sequence[PartResult]) -> str:
    """A row per main score: its value with the interval, and every knowledge-free policy as a tick."""
    rows = [(part, m, next(iter(s.values()))) for part in parts for m, s in part.metrics.items()]
    height = ROW * len(rows) + 34

    def x(value: float) -> float:
        return LEFT + value / 100 * (WIDTH - LEFT - RIGHT)

    marks = []
    for value in range(0, 101, 20):
        at = f"{x(value):.1f}"
        marks.append(f'<line x1="{at}" x2="{at}" y1="6" y2="{height - 22}" stroke="#e4e4e0"/>')
        marks.append(f'<text x="{at}" y="{height - 6}" text-anchor="middle">{value}</text>')
    for n, (part, metric, score) in enumerate(rows):
        y = 18 + ROW * n
        marks.append(
            f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{html.escape(f"{part.id} {metric}")}</text>'
        )
        for policy, scores in part.policies.items():
            tick = x(next(iter(scores[metric].values())))
            marks.append(
                f'<line x1="{tick:.1f}" x2="{tick:.1f}" y1="{y - 7}" y2="{y + 7}" stroke="#c2571a" '
                f'stroke-width="2" opacity=".7"><title>{html.escape(policy)}</title></line>'
            )
        low, high = x(score.low), x(score.high)
        marks.append(
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="#2563a8" stroke-width="3"/>'
        )
        marks.append(f'<circle cx="{x(score.value):.1f}" cy="{y}" r="4.5" fill="#2563a8"/>')
        marks.append(f'<text x="{WIDTH - RIGHT + 8}" y="{y + 4}">{score.value:.1f}</text>')
    legend = (
        '<p class="legend"><span><i style="background:#2563a8"></i>model, 95 % interval</span>'
        '<span><i style="background:#c2571a"></i>answers that know nothing</span></p>'
    )
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(marks)}</svg>'
    return f'<div class="card plot">{svg}{legend}</div>'


def _headline(facts: Mapping[str, Any]) -> str:
    draw = "greedy" if facts.get("temperature") == 0 else f"temperature {facts.get('temperature')}"
    return f"{draw}, {facts.get('n')} answer(s) per item, seed {facts.get('seed')}, {facts.get('dtype')}"


def _suite(result: SuiteResult, model: str) -> str:
    parts = [f"<h2>{html.escape(result.title or result.name)}</h2>"]
    parts.append(f'<p class="small">{html.escape(result.source)}</p>' if result.source else "")
    for name, table in result.tables.items():
        heads, rows = table_rows(name, table, model, None)
        parts.append(grid(heads, rows, [_class(row[0], n) for n, row in enumerate(rows)]))
        if name in result.paper:
            _, longer = table_rows(name, table, model, result.paper[name])
            said = f'<p class="small">{html.escape(CITATION)}. {html.escape(CAVEAT)}</p>'
            classes = ["model", *("paper" for _ in longer[len(rows) :])]
            below = grid(heads, [rows[0], *longer[len(rows) :]], classes)
            parts.append(f"<details><summary>beside the paper's rows</summary>{said}{below}</details>")
    parts.append(plot(result.parts))
    parts.append(grid(HEADS, [row for part in result.parts for row in part_rows(part)]))
    parts += [f'<p class="small">{html.escape(line)}</p>' for line in notes(result)]
    parts += [_part(part) for part in result.parts]
    return "".join(parts)


def _class(head: str, n: int) -> str:
    return "model" if n == 0 else "floor" if head.startswith("best") else "interval"


def _part(part: PartResult) -> str:
    """Every score, every policy, a few items."""
    scores = [
        (metric, name, f"{v.value:.2f}", f"{v.low:.1f} - {v.high:.1f}")
        for metric, found in part.metrics.items()
        for name, v in found.items()
    ]
    metrics = [*part.metrics]
    policies = [
        (name, *(f"{next(iter(found[m].values())):.2f}" for m in metrics))
        for name, found in part.policies.items()
    ]
    model = ("the model", *(f"{next(iter(part.metrics[m].values())).value:.2f}" for m in metrics))
    shown = [
        "<tr>"
        + "".join(f'<td class="text">{html.escape(s[k])}</td>' for k in ("prompt", "output", "reference"))
        + f"<td>{html.escape(_said(s))}</td></tr>"
        for s in part.samples
    ]
    heads = "<tr><th>last message of the prompt</th><th>answer</th><th>reference</th><th>end</th></tr>"
    return (
        f"<details><summary>{html.escape(part.id)}: all scores, policies, samples</summary>"
        f"{grid(('metric', 'score', 'value', '95 % interval'), scores)}"
        f"<h3>Answers that know nothing</h3>"
        f"{grid(('policy', *metrics), [*policies, model], [*('floor' for _ in policies), 'model'])}"
        f"<h3>Samples</h3><table>{heads}{''.join(shown)}</table></details>"
    )


def _said(sample: Mapping[str, Any]) -> str:
    details = "; ".join(f"{metric}: {text}" for metric, text in sample["details"].items())
    return f"{sample['finish']}. {details}" if details else str(sample["finish"])


def _reading() -> str:
    return (
        "<h2>How to read this</h2><p>Intervals: 95 % percentile bootstrap over items (1,000 resamples; "
        "all answers to an item are drawn together), Wilson's for a score of 0 or 100, where all items "
        "are alike. They hold what other items would change, not what other prompts would. An answer that "
        "knows nothing is scored like the model: a score that is not above the best of them shows no "
        "skill. <b>released</b> is the published scorer's arithmetic with its faults, <b>corrected</b> "
        "the task as it is meant; only the former can be laid beside published figures. <b>cut</b>: "
        "answers ended by the length limit.</p>"
    )


def _facts(facts: Mapping[str, Any]) -> str:
    rows = [(key, str(value)) for key, value in facts.items()]
    return f"<h2>Settings and versions</h2>{grid(('', ''), rows)}"


def _number(cell: str) -> bool:
    return cell.lstrip("+-")[:1].isdigit()
