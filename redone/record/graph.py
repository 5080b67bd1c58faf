"""The live display of a pipeline: one row per node, with what the running one is doing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from redone.record.console import Display, clock

SYMBOLS = {"waiting": "·", "running": "▶", "done": "✓", "kept": "=", "failed": "✗"}
STYLES = {
    "waiting": "dim",
    "running": "bold cyan",
    "done": "green",
    "kept": "dim green",
    "failed": "bold red",
}


@dataclass(slots=True)
class Row:
    kind: str
    state: str = "waiting"
    text: str = ""
    since: float = 0.0
    seconds: float | None = None


class GraphDisplay:
    """A context manager. On a terminal a live table; elsewhere plain lines with the node's name in front."""

    def __init__(self, nodes: Mapping[str, str], console: Console | None = None) -> None:
        """`nodes`: name -> kind, in the order in which they run."""
        self.console = console or Console()
        self.rows = {name: Row(kind) for name, kind in nodes.items()}
        self._start = time.monotonic()
        self._live = Live(get_renderable=self._table, console=self.console, refresh_per_second=4)

    def __enter__(self) -> GraphDisplay:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live.is_started:
            self._live.stop()

    def state(self, name: str, state: str, text: str = "") -> None:
        """A node starts, ends, or is found finished."""
        row = self.rows[name]
        now = time.monotonic()
        if state == "running":
            row.since = now
        elif row.state == "running":
            row.seconds = now - row.since
        row.state, row.text = state, text
        if not self.console.is_terminal:
            took = f" ({clock(row.seconds)})" if row.seconds is not None else ""
            said = f": {text}" if text else ""
            self._print(f"[{clock(now - self._start)}] {SYMBOLS[state]} {name} {state}{took}{said}")

    def line(self, name: str, text: str, keep: bool = False) -> None:
        """What the running node is doing; keep: also a line of its own, above the table."""
        self.rows[name].text = text
        if keep:
            self._print(f"{name}: {text}")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, row in self.rows.items():
            seconds = time.monotonic() - row.since if row.state == "running" else row.seconds
            took = clock(seconds) if seconds is not None else ""
            table.add_row(
                f"[{STYLES[row.state]}]{SYMBOLS[row.state]} {name}[/]",
                f"[dim]{row.kind}[/]",
                took,
                row.text[:110],
            )
        return table


class NodeDisplay(Display):
    """A training run inside a node: its phases and steps appear in the node's row."""

    def __init__(self, graph: GraphDisplay, name: str, total_steps: int, first_step: int = 1) -> None:
        super().__init__(total_steps, first_step, graph.console)
        self._graph, self._name = graph, name

    def __enter__(self) -> NodeDisplay:
        return self

    def enter(self, phase: str) -> None:
        self._phases.append(phase)
        last = self.line(self._step, self._metrics).partition("] ")[2] if self._metrics else ""
        self._graph.line(self._name, f"{phase}  {last}".strip())

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        self._metrics |= metrics
        if step < self._first:
            self._steps_start = time.monotonic()
        text = self.line(step, metrics).partition("] ")[2]
        self._graph.line(self._name, text, keep=not self._graph.console.is_terminal)

    def note(self, message: str) -> None:
        self._graph.line(self._name, message, keep=True)
