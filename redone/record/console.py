"""The live display: one row that says where the run is, one line per finished step above it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

REWARD = ("reward/mean", "critic/score/mean")
SPEED = ("perf/throughput",)
LENGTH = ("response_length/mean",)
VALIDATION = ("val-core/mean_score",)


def first(metrics: Mapping[str, float], names: tuple[str, ...]) -> float | None:
    """The first of `names` that is there."""
    return next((metrics[name] for name in names if name in metrics), None)


def clock(seconds: float) -> str:
    """75 -> 1:15; 3700 -> 1:01:40."""
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Display:
    """A context manager. On a terminal a live row; elsewhere plain lines, so that log files stay readable."""

    def __init__(self, total_steps: int, first_step: int = 1, console: Console | None = None) -> None:
        self._console = console or Console()
        self._total = total_steps
        self._first = first_step
        self._step = first_step - 1  # last finished step
        self._phases: list[str] = []
        self._metrics: dict[str, float] = {}
        self._start = time.monotonic()
        self._steps_start = self._start  # when step `first_step` began: start-up must not enter the estimate
        self._live = Live(
            get_renderable=self._row, console=self._console, refresh_per_second=4, transient=True
        )

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._live.is_started:
            self._live.stop()

    def enter(self, phase: str) -> None:
        self._phases.append(phase)
        if not self._console.is_terminal and self._step < self._first:
            self._console.print(f"[{clock(self.elapsed)}] {phase} ...", markup=False, highlight=False)

    def leave(self) -> None:
        self._phases.pop()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step `step` is done."""
        self._step = step
        self._metrics |= metrics
        if step < self._first:
            self._steps_start = time.monotonic()
        self._console.print(self.line(step, metrics), markup=False, highlight=False, soft_wrap=True)

    def note(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def eta(self) -> float | None:
        """Seconds to the last step, from the mean of the steps of this session."""
        done = self._step - self._first + 1
        if done < 1:
            return None
        return (time.monotonic() - self._steps_start) / done * (self._total - self._step)

    def line(self, step: int, metrics: Mapping[str, float]) -> str:
        parts = [f"step {step}/{self._total}"]
        shown = (
            ("reward", first(metrics, REWARD), "{:.3f}"),
            ("loss", metrics.get("sft/loss"), "{:.4f}"),
            ("val loss", metrics.get("val/loss"), "{:.4f}"),
            ("length", first(metrics, LENGTH), "{:.1f}"),
            ("clipped", metrics.get("actor/pg_clipfrac"), "{:.1%}"),
            ("grad", metrics.get("actor/grad_norm"), "{:.3g}"),
            ("val", first(metrics, VALIDATION), "{:.3f}"),
            ("sync diff", metrics.get("sync/canary_max_abs_diff"), "{:.1e}"),
            ("tokens/s", first(metrics, SPEED), "{:,.0f}"),
            ("s", metrics.get("timing_s/step"), "{:.1f}"),
        )
        parts += [f"{name} {style.format(value)}" for name, value, style in shown if value is not None]
        return f"[{clock(self.elapsed)}] " + "  ".join(parts)

    def _row(self) -> Table:
        table = Table.grid(padding=(0, 2))
        eta = self.eta()
        cells = [
            f"[bold]step {min(self._step + 1, self._total)}/{self._total}[/]",
            f"[cyan]{self._phases[-1] if self._phases else 'waiting'}[/]",
            *(
                f"{name} {value:{style}}"
                for name, value, style in (
                    ("reward", first(self._metrics, REWARD), ".3f"),
                    ("length", first(self._metrics, LENGTH), ".1f"),
                    ("tokens/s", first(self._metrics, SPEED), ",.0f"),
                    ("val", first(self._metrics, VALIDATION), ".3f"),
                )
                if value is not None
            ),
            f"elapsed {clock(self.elapsed)}",
            f"eta {clock(eta) if eta is not None else '-'}",
        ]
        table.add_row(*cells)
        return table
