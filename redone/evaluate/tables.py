"""The terminal's view of an evaluation, and the cells that the page shares with it."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from redone.evaluate.paper import AVERAGE, CAVEAT, CITATION, paper_rows
from redone.evaluate.results import PartResult, Ranged, SuiteResult, TableResult

PARTIAL = "*"
FEW = 30  # items below which a bootstrap interval is not to be trusted
HEADS = ("file", "items", "score", "value", "95 % interval", "best without knowledge", "cut")


def ranged(value: Ranged) -> str:
    return f"{value.value:.2f}{PARTIAL if value.partial else ''}"


def part_rows(part: PartResult) -> list[tuple[str, ...]]:
    """A row per metric, its main score: the cells of HEADS."""
    rows: list[tuple[str, ...]] = []
    for metric, scores in part.metrics.items():
        name, main = next(iter(scores.items()))
        best = part.best_policy(metric)
        rows.append(
            (
                part.id,
                str(part.items),
                metric if metric == name else f"{metric} {name}",
                ranged(main),
                f"{main.low:.1f} - {main.high:.1f}",
                f"{best[1]:.2f} ({best[0]})" if best else "",
                f"{part.cut:.0%}",
            )
        )
    return rows


def table_rows(
    name: str, table: TableResult, model: str, paper: str | None
) -> tuple[list[str], list[tuple[str, ...]]]:
    """(heads, rows): the model, its intervals, the best policy per column, and with `paper` its rows."""
    columns = [*table.columns, *([AVERAGE] if table.average else [])]
    values = {**table.columns, **({AVERAGE: table.average} if table.average else {})}
    rows: list[tuple[str, ...]] = [
        (model, *(ranged(values[c]) for c in columns)),
        ("95 % interval", *(f"{values[c].low:.1f}-{values[c].high:.1f}" for c in columns)),
    ]
    if table.policies:
        floor = dict(table.policies)
        if table.average and all(c in floor for c in table.averaged):
            floor[AVERAGE] = sum(floor[c] for c in table.averaged) / len(table.averaged)
        rows.append(("best without knowledge", *(f"{floor[c]:.2f}" if c in floor else "" for c in columns)))
    for row, figures in (paper_rows(paper) if paper else {}).items():
        rows.append((f"paper: {row}", *(f"{figures[c]:.2f}" if c in figures else "" for c in columns)))
    return [name, *columns], rows


def notes(result: SuiteResult) -> list[str]:
    """What stands behind the stars, and what was left out."""
    found = {
        f"{part.id}, {metric}: {value.partial}"
        for part in result.parts
        for metric, scores in part.metrics.items()
        for value in scores.values()
        if value.partial
    }
    found |= {
        f"{name}: average {table.average.partial}"
        for name, table in result.tables.items()
        if table.average and table.average.partial
    }
    lines = [f"{PARTIAL} {text}" for text in sorted(found)]
    if few := sum(part.items < FEW for part in result.parts):
        lines.append(
            f"{few} file(s) with fewer than {FEW} items: their intervals are rough, mostly too narrow"
        )
    for part in result.parts:
        if part.unfit:
            lines.append(f"{part.id}: {part.unfit} prompt(s) fill the context and count as empty answers")
        if part.failed:
            lines.append(f"{part.id}: {part.failed} answer(s) could not be scored and count nowhere")
    return lines


def terminal(results: Sequence[SuiteResult], model: str, like_paper: bool) -> RenderableType:
    """Everything that `redone eval` prints at the end."""
    shown: list[RenderableType] = []
    for result in results:
        rows = [row for part in result.parts for row in part_rows(part)]
        # the policy's name stands on the page; in a terminal the row must stay one line
        short = [(*row[:5], row[5].partition(" (")[0], row[6]) for row in rows]
        shown.append(_grid(result.title or result.name, HEADS, short))
        for name, table in result.tables.items():
            paper = result.paper.get(name) if like_paper else None
            heads, cells = table_rows(name, table, model, paper)
            shown.append(_grid(f"{result.name}: {name}", heads, cells))
            if paper:
                shown.append(Text(f"Paper: {CITATION}. {CAVEAT}", style="dim"))
        shown += [Text(line, style="yellow") for line in notes(result)]
    return Group(*shown)


def _grid(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for n, head in enumerate(heads):
        left = n == 0 or head == "score"
        table.add_column(head, justify="left" if left else "right", no_wrap=n == 0)
    for row in rows:
        table.add_row(*row)
    return table
