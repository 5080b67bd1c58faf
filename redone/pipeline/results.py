"""What came out of a pipeline: task x stage, macro averages, paired tests; and the ablation."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from redone.algo.stats import Interval, paired_bootstrap
from redone.evaluate.compare import Comparison, compare
from redone.pipeline.answers import Answers, domains, evaluation_of
from redone.pipeline.diagnose import mean_interval
from redone.pipeline.folder import write_json
from redone.record.bars import Bar, bar_chart
from redone.record.report import STYLE
from redone.record.table import p_text

RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A mean score with its 95 % interval."""

    n: int
    score: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """columns: stage names, the base first. Cells and tests by task, and by domain for macro averages."""

    columns: tuple[str, ...]
    tasks: Mapping[str, Mapping[str, Cell]]  # task -> column -> cell
    macros: Mapping[str, Mapping[str, Cell]]  # domain (and "all") -> column -> mean over its tasks
    tests: Mapping[str, Mapping[str, Comparison]]  # task -> column -> against the first column
    domains: Mapping[str, str]
    notes: tuple[str, ...] = ()  # sentences under the table


def collect_results(columns: Mapping[str, Sequence[Answers]]) -> Results:
    """All columns must answer the same prompts; the first one is what the others are compared with.

    Raises ValueError otherwise.
    """
    names = tuple(columns)
    evaluations = {name: evaluation_of(found) for name, found in columns.items()}
    of_domain = domains(next(iter(columns.values())))
    tests: dict[str, dict[str, Comparison]] = {task: {} for task in of_domain}
    for name in names[1:]:
        for c in compare(evaluations[names[0]], evaluations[name]):
            task = next(iter(of_domain)) if c.task == "all" and len(of_domain) == 1 else c.task
            if task in tests:
                tests[task][name] = c
    scores = {name: _scores(found) for name, found in columns.items()}
    tasks = {task: {name: _cell(scores[name][task]) for name in names} for task in of_domain}
    groups = {d: [t for t in of_domain if of_domain[t] == d] for d in sorted(set(of_domain.values()))}
    if len(groups) > 1:
        groups["all"] = list(of_domain)
    macros = {g: {name: _macro([scores[name][t] for t in ts]) for name in names} for g, ts in groups.items()}
    return Results(columns=names, tasks=tasks, macros=macros, tests=tests, domains=of_domain)


def _scores(answers: Sequence[Answers]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for a in answers:
        if a.usable():
            found.setdefault(a.task, []).append(a.mean_score)
    return found


def _cell(values: Sequence[float]) -> Cell:
    low, high = mean_interval(values)
    return Cell(n=len(values), score=float(np.mean(values)), low=low, high=high)


def _macro(tasks: Sequence[Sequence[float]]) -> Cell:
    """Mean over tasks; the interval resamples prompts inside every task (percentile bootstrap)."""
    rng = np.random.default_rng(0)
    means = np.mean(
        [np.asarray(v)[rng.integers(0, len(v), (RESAMPLES, len(v)))].mean(axis=1) for v in tasks], axis=0
    )
    low, high = np.quantile(means, [0.025, 0.975])
    score = float(np.mean([np.mean(v) for v in tasks]))
    return Cell(n=sum(len(v) for v in tasks), score=score, low=float(low), high=float(high))


def macro_difference(before: Sequence[Answers], after: Sequence[Answers]) -> Interval:
    """Of the mean over prompts, paired by prompt."""
    old = {a.prompt_id: a.mean_score for a in before if a.usable()}
    pairs = [(old[a.prompt_id], a.mean_score) for a in after if a.usable() and a.prompt_id in old]
    return paired_bootstrap([b for b, _ in pairs], [a for _, a in pairs])


def results_table(results: Results, title: str) -> RenderableType:
    """For the terminal."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("task")
    table.add_column("items", justify="right")
    for column in results.columns:
        table.add_column(column, justify="right")
    for task, cells in results.tasks.items():
        first = cells[results.columns[0]]
        shown = [_lines(cells[c], _mark(results, task, c)) for c in results.columns]
        table.add_row(task, str(first.n), *shown)
    for group, cells in results.macros.items():
        label = f"mean ({group})"
        shown = [_lines(cells[c]) for c in results.columns]
        table.add_row(label, str(cells[results.columns[0]].n), *shown, style="bold")
    note = f"mean score, 95 % interval; + better, - worse than {results.columns[0]} (paired test, p < 0.05)"
    return Group(table, *(Text(line, style="dim") for line in (note, *results.notes)))


def _mark(results: Results, name: str, column: str) -> str:
    """Of a task; means are not tested."""
    test = results.tests.get(name, {}).get(column)
    if test is None or test.p_value >= 0.05 or test.difference == 0:
        return ""
    return " +" if test.difference > 0 else " -"


def _lines(cell: Cell, mark: str = "") -> str:
    """Score above interval: four stages side by side fit a terminal of 80 columns."""
    return f"{cell.score:.3f}{mark}\n{cell.low:.2f}-{cell.high:.2f}"


def ablation_table(results: Results) -> RenderableType:
    """Rows are runs, columns are domains: the form of the paper's Table 3."""
    groups = list(results.macros)
    table = Table(
        title="ablation: mean over tasks [95 % interval]", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("run")
    for group in groups:
        table.add_column(group, justify="right")
    for column in results.columns:
        cells = [results.macros[g][column] for g in groups]
        table.add_row(column, *(f"{c.score:.3f} [{c.low:.3f}, {c.high:.3f}]" for c in cells))
    return table


def write_results(folder: Path, results: Results, title: str, name: str = "results") -> Path:
    """<name>.json and <name>.html; returns the page."""
    write_json(folder / f"{name}.json", asdict(results))
    page = folder / f"{name}.html"
    partial = folder / f".{name}.html.partial"
    partial.write_text(_page(results, title, _nodes(folder)), encoding="utf-8")
    os.replace(partial, page)
    return page


def _nodes(folder: Path) -> list[tuple[str, str, str]]:
    """(name, folder, facts) of every finished node."""
    current = folder / "current.json"
    if not current.is_file():
        return []
    found = []
    for name, place in json.loads(current.read_text(encoding="utf-8")).items():
        done = folder / place / "node.json"
        if done.is_file():
            values = json.loads(done.read_text(encoding="utf-8"))
            facts = ", ".join(f"{k}: {v}" for k, v in values["facts"].items())
            found.append((name, place, f"{facts} ({values['seconds']:.0f} s)"))
    return found


def _page(results: Results, title: str, nodes: Sequence[tuple[str, str, str]]) -> str:
    names = [*results.tasks, *(f"mean ({g})" for g in results.macros)]
    cells = [*results.tasks.values(), *results.macros.values()]
    chart = bar_chart(
        names,
        [
            (c, [Bar(value=row[c].score, low=row[c].low, high=row[c].high) for row in cells])
            for c in results.columns
        ],
    )
    head = "".join(f"<th>{html.escape(c)}</th>" for c in ("task", "items", *results.columns))
    body = []
    for name, row in zip(names, cells, strict=True):
        shown = [
            f"{row[c].score:.3f}{_mark(results, name, c)} [{row[c].low:.3f}, {row[c].high:.3f}]"
            for c in results.columns
        ]
        texts = (name, str(row[results.columns[0]].n), *shown)
        body.append("<tr>" + "".join(f"<td>{html.escape(t)}</td>" for t in texts) + "</tr>")
    tests = [
        f"<li>{html.escape(task)}, {html.escape(column)}: {c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}], "
        f"{c.gained} gained, {c.lost} lost of {c.n}, p = {p_text(c.p_value)} ({c.test})</li>"
        for task, columns in results.tests.items()
        for column, c in columns.items()
    ]
    rows = "".join(
        f'<tr><td>{html.escape(n)}</td><td><a href="{html.escape(p)}/">{html.escape(p)}</a></td>'
        f"<td>{html.escape(f)}</td></tr>"
        for n, p, f in nodes
    )
    base = html.escape(results.columns[0])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)} - redone</title><style>{STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>"
        f'<p class="sub">mean score [95 % interval]; + better, - worse than {base} (paired test, '
        f"p &lt; 0.05, no correction for the number of tasks)</p><div class='card'>{chart}</div>"
        f"<table><tr>{head}</tr>{''.join(body)}</table>"
        f"{''.join(f'<p>{html.escape(note)}</p>' for note in results.notes)}"
        f"<h2>Paired tests against {base}</h2><ul>{''.join(tests)}</ul><h2>Nodes</h2>"
        f"<table><tr><th>node</th><th>folder</th><th>what it says</th></tr>{rows}</table></body></html>\n"
    )
