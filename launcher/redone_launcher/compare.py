"""`redone eval compare A B`."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from redone.errors import ConfigError
from redone.evaluate.page import document, grid
from redone.evaluate.paired import Difference, Paired, compare_folders
from redone.evaluate.records import EvalFolder, replace
from redone.record.table import p_text

HEADS = ("suite", "what", "items", "A", "B", "B - A", "95 % interval", "p", "p corrected", "verdict")


def compare_command(words: Sequence[str], page: Path | None) -> int:
    """Print the table; write `page` when given. Raises RedoneError."""
    if len(words) != 2:
        raise ConfigError("redone eval compare needs two evaluation folders: redone eval compare A B")
    first, second = (EvalFolder.open(Path(word)) for word in words)
    found = compare_folders(first, second)
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)  # a log file has room
    console.print(f"A: {words[0]} ({_model(first)})\nB: {words[1]} ({_model(second)})", highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for n, head in enumerate(HEADS):
        table.add_column(head, justify="left" if n < 2 or n == len(HEADS) - 1 else "right")
    for row in found.differences:
        real = row.verdict in ("A better", "B better")
        table.add_row(*cells(row), style="bold" if real else "")
    console.print(table)
    for warning in found.warnings:
        console.print(f"! {warning}", style="yellow", highlight=False)
    console.print(reading(found), style="dim", highlight=False)
    if page is not None:
        replace(page, _page(found, first, second))
    return 0


def cells(row: Difference) -> tuple[str, ...]:
    """The cells of HEADS."""
    return (
        row.suite,
        row.what,
        str(row.n),
        f"{row.a:.2f}",
        f"{row.b:.2f}",
        f"{row.b - row.a:+.2f}",
        f"{row.low:+.2f} .. {row.high:+.2f}",
        f"{p_text(row.p)} ({row.test})",
        p_text(row.adjusted),
        row.verdict,
    )


def reading(found: Paired) -> str:
    """How many were looked at, and how many stay."""
    rows = found.differences
    real = sum(row.adjusted < 0.05 for row in rows)
    bare = sum(row.p < 0.05 for row in rows)
    return (
        f"{len(rows)} comparisons: {bare} with p < 0.05, {real} of them after Holm's correction for "
        f"{len(rows)} looks; by chance alone {0.05 * len(rows):.1f} would have p < 0.05. Paired on the same "
        "items; intervals are of each row alone. Prompts and sampling are part of what is compared."
    )


def _page(found: Paired, first: EvalFolder, second: EvalFolder) -> str:
    rows = [cells(row) for row in found.differences]
    marks = ["model" if row.verdict in ("A better", "B better") else "" for row in found.differences]
    body = (
        f"<h1>{html.escape(_model(first))} (A) and {html.escape(_model(second))} (B)</h1>"
        f'<p class="sub">A: {html.escape(str(first.path))}, B: {html.escape(str(second.path))}</p>'
        + "".join(f'<p class="warn">{html.escape(text)}</p>' for text in found.warnings)
        + grid(HEADS, rows, marks)
        + f"<p>{html.escape(reading(found))}</p>"
    )
    return document("Comparison", body)


def _model(folder: EvalFolder) -> str:
    return Path(folder.settings()["model"]["path"]).name
