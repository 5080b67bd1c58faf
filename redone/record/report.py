"""report.html of a run folder: one self-contained file, written from what the run left there."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from redone.errors import RunFolderError
from redone.record.summary import RunSummary, read_summary
from redone.record.svg import Line, line_chart, stacked_chart
from redone.record.table import COLUMNS, better, comparison_line, ordered, result_cells

Rows = Sequence[Mapping[str, Any]]  # metrics.jsonl, by step

# title, [(label, candidate metrics)], percent, logarithmic
CHARTS: tuple[tuple[str, tuple[tuple[str, tuple[str, ...]], ...], bool, bool], ...] = (
    (
        "Supervised loss (nats per answer token)",
        (("training", ("sft/loss",)), ("validation", ("val/loss",))),
        False,
        False,
    ),
    ("Reward", (("all generated", ("reward/mean",)), ("trained on", ("critic/score/mean",))), False, False),
    (
        "Response length (tokens)",
        (("mean", ("response_length/mean",)), ("longest", ("response_length/max",))),
        False,
        False,
    ),
    ("Entropy (nats)", (("entropy", ("actor/entropy", "actor/entropy_loss")),), False, False),
    ("Clip fraction", (("clipped tokens", ("actor/pg_clipfrac",)),), True, False),
    ("Gradient norm", (("before clipping", ("actor/grad_norm",)),), False, False),
    (
        "Groups that teach",
        (("informative share", ("rollout/informative_share",)),),
        True,
        False,
    ),
    (
        "Trainer against engine (log-probability)",
        (
            ("canary, largest difference", ("sync/canary_max_abs_diff", "parity/canary_max_abs_diff")),
            ("rollouts, largest difference", ("training/rollout_logprobs_diff_max",)),
        ),
        False,
        True,
    ),
    ("Throughput (tokens/s per device)", (("throughput", ("perf/throughput",)),), False, False),
)
MAX_SAMPLES = 60
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fbfbf9;
  margin:0 auto;max-width:1360px;padding:24px}
h1{font-size:24px;margin:0}
h2{font-size:18px;margin:36px 0 10px;border-bottom:1px solid #ddd;padding-bottom:4px}
h3{font-size:14px;margin:0 0 4px;font-weight:600}.sub{color:#666;margin:4px 0 0}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(400px,1fr));gap:16px}
.card{background:#fff;border:1px solid #e4e4e0;border-radius:6px;padding:12px}
svg{width:100%;height:auto;display:block}svg text{font:11px system-ui,sans-serif;fill:#666}
.legend{margin:4px 0 0;font-size:12px;color:#555}.legend span{margin-right:12px;white-space:nowrap}
.legend i{display:inline-block;width:10px;height:10px;margin-right:4px;border-radius:2px}
table{border-collapse:collapse;width:100%;background:#fff;font-size:14px}
th,td{text-align:left;padding:6px 10px;border-bottom:1px solid #eee;vertical-align:top}
th{color:#555;font-weight:600}
td.n{text-align:right;font-variant-numeric:tabular-nums}tr.after td{font-weight:600}
td.text{white-space:pre-wrap;overflow-wrap:anywhere;max-width:520px}.good{color:#1f6b3d}.bad{color:#9a2c2c}
pre{background:#fff;border:1px solid #e4e4e0;padding:12px;overflow:auto;font-size:13px}
summary{cursor:pointer;color:#555}
.warn{background:#fff4e0;border:1px solid #e6c88a;padding:8px 12px;border-radius:6px}
"""


def write_report(folder: Path) -> Path:
    """Render `folder`/report.html (atomically) and return its path. Works on unfinished runs.

    Raises RunFolderError when the folder holds no run.
    """
    if not (folder / "config.yaml").is_file():
        raise RunFolderError(
            f"{folder} is no run folder: it has no config.yaml; give the folder that `redone run` made"
        )
    target = folder / "report.html"
    partial = folder / ".report.html.partial"
    partial.write_text(render(folder), encoding="utf-8")
    os.replace(partial, target)
    return target


def render(folder: Path) -> str:
    """The page."""
    rows = read_rows(folder / "metrics.jsonl")
    samples = read_jsonl(folder / "samples.jsonl")
    summary = read_summary(folder / "summary.json") if (folder / "summary.json").is_file() else None
    name = summary.name if summary else folder.name
    body = [
        f"<h1>{html.escape(name)}</h1>",
        _head(rows, summary),
        _results(summary) if summary else "",
        _charts(rows),
        _samples(samples),
        _appendix(folder, summary),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(name)} - redone</title>"
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every complete line; a last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    found = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise RunFolderError(f"{path}:{number} is not JSON: {error}") from None
    return found


def read_rows(path: Path) -> Rows:
    """metrics.jsonl by step; of a step written twice the later row counts."""
    return [row for _, row in sorted({row["step"]: row for row in read_jsonl(path)}.items())]


def series(rows: Rows, name: str) -> list[tuple[float, float]]:
    """(step, value) where the metric is there and finite."""
    found = ((row["step"], row.get(name)) for row in rows)
    return [(s, float(v)) for s, v in found if isinstance(v, int | float) and math.isfinite(v)]


def _head(rows: Rows, summary: RunSummary | None) -> str:
    if summary is None:
        steps = rows[-1]["step"] if rows else 0
        return f'<p class="warn">This run is not finished: {steps} steps are recorded.</p>'
    best = f", best validation at step {summary.best_step}" if summary.best_step else ""
    notes = "".join(f"<br>{html.escape(note)}" for note in summary.notes)
    return (
        f'<p class="sub">{summary.steps} steps in {summary.seconds / 60:.1f} minutes, '
        f"{html.escape(summary.status)}"
        f"{best}{notes}</p>"
    )


def _results(summary: RunSummary) -> str:
    if not summary.results:
        return ""
    head = "".join(f"<th>{title}</th>" for title in COLUMNS)
    rows = []
    for result in ordered(summary.results):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in result_cells(result))
        rows.append(f'<tr class="{result.role}">{cells}</tr>')
    tests = "".join(
        f'<li class="{"good" if better(c) else "bad"}">{html.escape(comparison_line(c))}</li>'
        for c in summary.comparisons
    )
    table = f"<table><tr>{head}</tr>{''.join(rows)}</table>"
    return f"<h2>Held-out accuracy</h2>{table}<ul>{tests}</ul>{_per_class(summary)}"


def _per_class(summary: RunSummary) -> str:
    shown = [r for r in summary.results if r.per_class]
    labels = sorted({label for r in shown for label in r.per_class})
    if not labels:
        return ""
    head = "<th>accuracy by label</th>" + "".join(f"<th>{html.escape(label)}</th>" for label in labels)
    rows = []
    for result in shown:
        cells = (result.per_class.get(label) for label in labels)
        texts = "".join(f"<td>{c[1]:.1%} of {c[0]}</td>" if c else "<td></td>" for c in cells)
        rows.append(f"<tr><td>{html.escape(result.name)}</td>{texts}</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _charts(rows: Rows) -> str:
    cards = []
    for title, wanted, percent, logarithmic in CHARTS:
        lines = []
        for label, names in wanted:
            points = next((p for name in names if (p := series(rows, name))), [])
            lines.append(Line(label=label, points=points))
        cards.append((title, line_chart(lines, percent=percent, log_scale=logarithmic)))
        if title == "Reward":
            cards.append(("Validation accuracy", line_chart(_validation(rows))))
    cards.append(("Seconds per step", stacked_chart(_timings(rows))))
    shown = "".join(
        f'<div class="card"><h3>{html.escape(title)}</h3>{chart}</div>' for title, chart in cards if chart
    )
    return f'<h2>Curves</h2><div class="grid">{shown}</div>' if shown else ""


def _validation(rows: Rows) -> list[Line]:
    """One line per task: accuracy (or mean score) with its 95 % band."""
    names = sorted({name for row in rows for name in row if name.startswith("val-core/")})
    scores = [name for name in names if "/acc/" in name] or names
    lines = []
    for name in scores[:6]:
        task = name.split("/")[1]
        low = dict(series(rows, f"val-aux/{task}/acc_low"))
        high = dict(series(rows, f"val-aux/{task}/acc_high"))
        points = series(rows, name)
        band = [(step, low[step], high[step]) for step, _ in points if step in low and step in high]
        lines.append(Line(label=task, points=points, dots=True, band=band))
    return lines


def _timings(rows: Rows) -> list[Line]:
    """Seconds of every phase for steps >= 1, the longest phase first, the rest of the step last."""
    trained = [row for row in rows if row["step"] >= 1 and "timing_s/step" in row]
    names = sorted({n for row in trained for n in row if n.startswith("timing_s/") and n != "timing_s/step"})
    if not trained:
        return []
    total = {name: sum(row.get(name) or 0.0 for row in trained) for name in names}
    lines = [
        Line(
            label=name.removeprefix("timing_s/"),
            points=[(row["step"], row.get(name) or 0.0) for row in trained],
        )
        for name in sorted(names, key=lambda n: -total[n])
    ]
    rest = [
        (r["step"], max(0.0, (r["timing_s/step"] or 0.0) - sum(r.get(n) or 0.0 for n in names)))
        for r in trained
    ]
    return [*lines, Line(label="other", points=rest)]


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    steps = sorted({sample["step"] for sample in samples})
    shown_steps = set(steps[:: math.ceil(len(samples) / MAX_SAMPLES)])
    head = (
        "<th>step</th><th>last message of the prompt</th><th>response</th><th>reference</th><th>reward</th>"
    )
    rows = []
    for sample in samples:
        if sample["step"] not in shown_steps:
            continue
        prompt = str(sample["messages"][-1]["content"]) if sample.get("messages") else ""
        mark = "good" if sample["correct"] else "bad"
        rows.append(
            f'<tr><td class="n">{sample["step"]}</td><td class="text">{html.escape(_short(prompt))}</td>'
            f'<td class="text">{html.escape(_short(str(sample["response"])))}</td>'
            f'<td class="text">{html.escape(_short(str(sample["reference"]), 200))}</td>'
            f'<td class="n {mark}">{sample["raw"]:.2f}</td></tr>'
        )
    count = f"{len(rows)} of {len(samples)} recorded rollouts"
    table = f"<table><tr>{head}</tr>{''.join(rows)}</table>"
    return f"<h2>Samples</h2><details open><summary>{count}</summary>{table}</details>"


def _short(text: str, limit: int = 600) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} [...] {text[-limit // 2 :]}"


def _appendix(folder: Path, summary: RunSummary | None) -> str:
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    parts = [
        f"<h2>Configuration</h2><details><summary>config.yaml</summary><pre>{html.escape(config)}</pre></details>"
    ]
    if summary and summary.versions:
        facts = {**{k: str(v) for k, v in summary.machine.items()}, **summary.versions}
        rows = "".join(
            f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in facts.items()
        )
        parts.append(f"<h2>Machine and versions</h2><table>{rows}</table>")
    return "".join(parts)
