"""The last thing a run prints: held-out accuracy before and after, and what it must be compared to."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from redone.record.summary import EvalResult, PairedResult, RunSummary

ORDER = {"baseline": 0, "before": 1, "after": 2}


COLUMNS = ("", "task", "items", "accuracy", "95 % interval", "format errors", "commonest answer")


def result_table(summary: RunSummary) -> RenderableType:
    """Results by task, and under them the paired tests."""
    if not summary.results:
        return Text("no held-out evaluation (data.test is empty)")
    table = Table(title=f"held-out accuracy: {summary.name}", title_justify="left", box=box.SIMPLE_HEAD)
    one_task = len({r.task for r in summary.results}) == 1
    hidden = {"task", "commonest answer"} if one_task else {"commonest answer"}  # 80 columns
    for column in COLUMNS:
        if column not in hidden:
            table.add_column(column, justify="left" if column in ("", "task") else "right")
    for result in ordered(summary.results):
        cells = zip(COLUMNS, result_cells(result), strict=True)
        table.add_row(
            *(c for name, c in cells if name not in hidden), style="bold" if result.role == "after" else ""
        )
    lines = [Text(comparison_line(c), style="green" if better(c) else "yellow") for c in summary.comparisons]
    return Group(table, *lines)


def ordered(results: Sequence[EvalResult]) -> list[EvalResult]:
    """By task as they come, in each the baselines, then before, then after."""
    tasks = list(dict.fromkeys(r.task for r in results))
    return sorted(results, key=lambda r: (tasks.index(r.task), ORDER[r.role]))


def result_cells(result: EvalResult) -> tuple[str, ...]:
    """The cells of COLUMNS."""
    errors = "" if result.format_errors is None else f"{result.format_errors:.1%}"
    common = f"{result.common_answer[:16]} {result.common_share:.0%}" if result.common_answer else ""
    interval = f"{result.low:.1%} - {result.high:.1%}"
    return (result.name, result.task, str(result.n), f"{result.accuracy:.1%}", interval, errors, common)


def better(comparison: PairedResult) -> bool:
    """Better, and not by chance (p < 0.05)."""
    return comparison.after > comparison.before and comparison.p_value < 0.05


def comparison_line(c: PairedResult) -> str:
    """One sentence per paired test."""
    verdict = (
        "better"
        if better(c)
        else ("worse" if c.after < c.before and c.p_value < 0.05 else "no clear difference")
    )
    test = "exact McNemar" if c.test == "mcnemar" else "paired bootstrap"
    where = "" if c.task == "all" else f" ({c.task})"
    return (
        f"against {c.against}{where}: {c.after - c.before:+.1%} [{c.low:+.1%}, {c.high:+.1%}], "
        f"{c.gained} gained, {c.lost} lost of {c.n}, p = {p_text(c.p_value)} ({test}): {verdict}"
    )


def p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def print_result(summary: RunSummary, console: Console | None = None) -> None:
    (console or Console()).print(result_table(summary))
