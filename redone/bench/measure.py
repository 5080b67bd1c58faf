"""Repeat, time, and reduce to a median with its spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from redone.errors import ConfigError

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured quantity. `ceiling`: the most that this machine's roofline allows, in the same unit."""

    name: str  # "train/update"
    unit: str  # "s", "tokens/s", ...
    better: Better
    values: tuple[float, ...]  # one per timed repeat, in order
    ceiling: float | None = None
    ceiling_of: str = ""  # how the ceiling follows from the roofline

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Robust relative standard deviation: 1.4826 x median absolute deviation / median."""
        middle = self.median
        deviation = statistics.median(abs(v - middle) for v in self.values)
        return 1.4826 * deviation / abs(middle) if middle else 0.0

    @property
    def share(self) -> float | None:
        """Median as a share of the ceiling (a time: ceiling / median)."""
        if not self.ceiling or not self.median:
            return None
        return self.median / self.ceiling if self.better == "higher" else self.ceiling / self.median

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "better": self.better,
            "median": self.median,
            "low": min(self.values),
            "high": max(self.values),
            "spread": self.spread,
            "values": list(self.values),
            "ceiling": self.ceiling,
            "ceiling_of": self.ceiling_of,
            "share": self.share,
        }

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Figure:
        return Figure(
            name=found["name"],
            unit=found["unit"],
            better=found["better"],
            values=tuple(found["values"]),
            ceiling=found.get("ceiling"),
            ceiling_of=found.get("ceiling_of", ""),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """How often a benchmark runs: `warmup` untimed calls, then `timed` ones."""

    warmup: int = 1
    timed: int = 5

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.timed < 1:
            raise ConfigError(
                f"--warmup {self.warmup} --repeats {self.timed}: 0 or more warm-up runs, 1 or more repeats"
            )

    def seconds(self, work: Callable[[int], Any]) -> tuple[float, ...]:
        """Wall seconds of `work(i)`; i counts from 0 over warm-up and timed calls."""
        taken = []
        for i in range(self.warmup + self.timed):
            start = time.perf_counter()
            work(i)
            taken.append(time.perf_counter() - start)
        return tuple(taken[self.warmup :])


def rate(name: str, unit: str, amount: float, seconds: tuple[float, ...], **ceiling: Any) -> Figure:
    """`amount` per second."""
    return Figure(name=name, unit=unit, better="higher", values=tuple(amount / s for s in seconds), **ceiling)


def duration(name: str, seconds: tuple[float, ...], **ceiling: Any) -> Figure:
    return Figure(name=name, unit="s", better="lower", values=seconds, **ceiling)
