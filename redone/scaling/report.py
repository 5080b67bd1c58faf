"""scaling.csv, scaling.json and report.html of a sweep's folder, complete or partial."""

from __future__ import annotations

import csv
import html
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redone.record.report import STYLE
from redone.record.svg import Line, line_chart, stacked_chart
from redone.scaling.measured import PHASES, Cell
from redone.scaling.predict import Predicted
from redone.scaling.sweep import Mode, Sweep

Row = dict[str, Any]
SHOWN = {
    "mode": "scaling",
    "nodes": "nodes",
    "gpus": "GPUs",
    "runs": "runs",
    "step_s": "step [s]",
    "step_s_range": "min - max",
    "tokens_s_gpu": "tokens/s/GPU",
    "efficiency": "efficiency",
    "sync_share": "weight update",
    "tail_share": "rollout tail",
    "predicted_s": "predicted [s]",
    "predicted_band": "P10 - P90",
    "refit_s": "re-fitted [s]",
    "gpu_hours_per_mtoken": "GPU h / M tokens",
    "cost_per_mtoken": "cost / M tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Everything that the report shows."""

    sweep: Sweep
    cells: Sequence[Cell]
    predicted: Mapping[tuple[Mode, int], Predicted]
    multiplier: float | None  # fitted to the base's measured seconds
    states: Mapping[str, int]  # state -> runs
    notes: Sequence[str]
    about: Mapping[str, Any]  # commit, versions, device


def row(cell: Cell, found: Findings) -> Row:
    """One line of the CSV: plain numbers, None where there is nothing."""
    step, rate = cell.median("step_s"), cell.median("rate")
    low, high = cell.extent("step_s")
    predicted = found.predicted.get((cell.mode, cell.nodes))
    seconds = predicted.seconds if predicted else None
    hours = 1e6 / rate / 3600 if rate else None
    return {
        "mode": cell.mode,
        "nodes": cell.nodes,
        "gpus": cell.gpus,
        "runs": len(cell.runs),
        "steps": sum(run.steps for run in cell.runs),
        "tokens_per_step": cell.median("tokens"),
        "response_tokens": cell.median("response_tokens"),
        "step_s": step,
        "step_s_low": low,
        "step_s_high": high,
        "tokens_s_gpu": rate,
        "efficiency": cell.efficiency,
        "sync_share": cell.sync_share,
        "tail_share": cell.tail_share,
        **{f"{name}_s": cell.phase(name) for name in PHASES},
        "other_s": cell.other,
        "predicted_s": seconds.step if seconds else None,
        "predicted_low": seconds.step / predicted.band if seconds and predicted else None,
        "predicted_high": seconds.step * predicted.band if seconds and predicted else None,
        "refit_s": seconds.step * found.multiplier if seconds and found.multiplier else None,
        "not_predicted": predicted.refused if predicted else "",
        "gpu_hours_per_mtoken": hours,
        "cost_per_mtoken": hours * found.sweep.price if hours and found.sweep.price else None,
    }


def write(folder: Path, found: Findings) -> Path:
    """Atomically, each file. Returns the path of report.html."""
    rows = [row(cell, found) for cell in found.cells]
    text = io.StringIO()
    if rows:
        table = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    values = {
        "about": dict(found.about),
        "states": dict(found.states),
        "multiplier": found.multiplier,
        "notes": list(found.notes),
        "rows": rows,
    }
    _put(folder / "scaling.csv", text.getvalue())
    _put(folder / "scaling.json", json.dumps(values, indent=1) + "\n")
    _put(folder / "report.html", render(found, rows))
    return folder / "report.html"


def _put(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def render(found: Findings, rows: Sequence[Row]) -> str:
    sweep, states = found.sweep, found.states
    done, total = states.get("done", 0), sum(states.values())
    parts = [f"<h1>Scaling: {html.escape(sweep.config)}</h1>", f'<p class="sub">{_subtitle(found)}</p>']
    if done < total:
        told = ", ".join(f"{count} {state}" for state, count in states.items())
        parts.append(f'<p class="warn">Partial: {done} of {total} runs are done ({told}).</p>')
    if sweep.simulated:
        parts.append(
            '<p class="warn">Simulated nodes: groups of trainer ranks that share the cores of one machine. '
            "This shows that the experiment works; it says nothing about a cluster.</p>"
        )
    if rows:
        parts += ["<h2>Results</h2>", _table(rows), "<h2>Plots</h2>", _plots(found, rows)]
        parts += ["<h2>Seconds of a step by phase</h2>", _phases(rows)]
    parts += ["<h2>How to read it</h2>", _legend(found)]
    parts += ["<h2>Notes</h2><ul>", *(f"<li>{html.escape(note)}</li>" for note in found.notes), "</ul>"]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>scaling</title>'
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _subtitle(found: Findings) -> str:
    told = [f"{k}: {v}" for k, v in found.about.items()]
    sweep = found.sweep
    told.append(f"{len(sweep.seeds)} seed(s) x {sweep.repeats} repeat(s), {sweep.steps} steps, the first "
                f"{sweep.warmup} not counted")  # fmt: skip
    return html.escape(" · ".join(told))


def _legend(found: Findings) -> str:
    refitted = (
        f"One multiplier, {found.multiplier:.3g}, makes it meet the smallest node count (re-fitted)."
        if found.multiplier
        else ""
    )
    return (
        "<p>Strong scaling: the same batch on more nodes. Weak: the batch grows with the nodes. Figures are "
        "medians over steps, then over runs. Efficiency: tokens/s/GPU against the smallest node count. "
        "Weight update: its share of the step. Rollout tail: share of the step in which at most a tenth of "
        f"the groups was still generating. Predicted: redone's planner, not measured. {refitted}</p>"
    )


def _cell(row: Row, name: str) -> str:
    if name == "step_s_range":
        return f"{row['step_s_low']:.3g} - {row['step_s_high']:.3g}"
    if name == "predicted_band":
        if row["predicted_s"] is None:
            return html.escape(row["not_predicted"])
        return f"{row['predicted_low']:.3g} - {row['predicted_high']:.3g}"
    value = row[name]
    if value is None:
        return ""
    if name in ("efficiency", "sync_share", "tail_share"):
        return f"{value:.0%}"
    return f"{value:,.4g}" if isinstance(value, float) else html.escape(str(value))


def _table(rows: Sequence[Row]) -> str:
    shown = [
        n for n in SHOWN if n in ("step_s_range", "predicted_band") or any(r[n] is not None for r in rows)
    ]
    head = "".join(f"<th>{SHOWN[name]}</th>" for name in shown)
    body = "".join(
        "<tr>" + "".join(f'<td class="n">{_cell(row, name)}</td>' for name in shown) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _series(rows: Sequence[Row], mode: str, name: str) -> list[tuple[float, float]]:
    return [(r["nodes"], r[name]) for r in rows if r["mode"] == mode and r[name] is not None]


def _plots(found: Findings, rows: Sequence[Row]) -> str:
    modes = [m for m in found.sweep.modes if any(r["mode"] == m for r in rows)]
    rates = [Line(label=m, points=_series(rows, m, "tokens_s_gpu"), dots=True) for m in modes]
    base = next((r["tokens_s_gpu"] for r in rows if r["nodes"] == found.sweep.base), None)
    if base:
        ends = sorted({r["nodes"] for r in rows})
        rates.append(Line(label="ideal", points=[(n, base) for n in ends]))
    efficiency = [Line(label=m, points=_series(rows, m, "efficiency"), dots=True) for m in modes]
    shares = [
        Line(label=f"{m}: {label}", points=_series(rows, m, name), dots=True)
        for m in modes
        for name, label in (("sync_share", "weight update"), ("tail_share", "rollout tail"))
    ]
    cards = [
        _card("Tokens/s/GPU over nodes", line_chart(rates)),
        _card("Efficiency over nodes", line_chart(efficiency, percent=True)),
        _card("Shares of the step over nodes", line_chart(shares, percent=True)),
    ]
    for mode in modes:
        lines = [
            Line(label="measured", points=_series(rows, mode, "step_s"), dots=True),
            Line(
                label="predicted, P10-P90",
                points=_series(rows, mode, "predicted_s"),
                band=[
                    (r["nodes"], r["predicted_low"], r["predicted_high"])
                    for r in rows
                    if r["mode"] == mode and r["predicted_s"] is not None
                ],
            ),
            Line(label="re-fitted", points=_series(rows, mode, "refit_s"), dots=True),
        ]
        cards.append(_card(f"Step [s] over nodes, {mode}: predicted beside measured", line_chart(lines)))
        cards.append(_card(f"Step [s] by phase over nodes, {mode}", stacked_chart(_stack(rows, mode))))
    return f'<div class="grid">{"".join(cards)}</div>'


def _stack(rows: Sequence[Row], mode: str) -> list[Line]:
    names = [*PHASES, "other"]
    lines = [Line(label=name, points=_series(rows, mode, f"{name}_s")) for name in names]
    return [line for line in lines if any(y for _, y in line.points)]


def _card(title: str, chart: str) -> str:
    return f'<div class="card"><h3>{html.escape(title)}</h3>{chart}</div>'


def _phases(rows: Sequence[Row]) -> str:
    names = [name for name in (*PHASES, "other") if any(row[f"{name}_s"] for row in rows)]
    head = "".join(f"<th>{name}</th>" for name in ("scaling", "nodes", *names))
    body = "".join(
        f"<tr><td>{row['mode']}</td><td>{row['nodes']}</td>"
        + "".join(f'<td class="n">{row[f"{name}_s"]:.3g}</td>' for name in names)
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
