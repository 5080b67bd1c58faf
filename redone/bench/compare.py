"""Two results of one benchmark: which figures got worse by more than the noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot
from typing import Any, Literal

from redone.bench.measure import Figure
from redone.bench.result import BenchResult, find

Verdict = Literal["worse", "better", "same"]
SMALLEST = 0.05  # relative; smaller changes are never called
SPREADS = 3.0  # robust standard deviations of the two medians' difference
IGNORED = ("run", "record")  # sections of a configuration that change no work


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    name: str
    unit: str
    before: float
    after: float
    slowdown: float  # > 1: worse; times the ceilings' change where both have one
    noise: float  # relative change that chance explains
    verdict: Verdict
    adjusted: bool  # the slowdown is that of the roofline shares


def compare(a: BenchResult, b: BenchResult, smallest: float = SMALLEST) -> list[Change]:
    """Every figure that both have, a's order. `smallest`: relative change below which nothing is called."""
    pairs = ((x, find(b.figures, x.name)) for x in a.figures)
    return [_change(x, y, smallest) for x, y in pairs if y is not None and y.unit == x.unit]


def _change(a: Figure, b: Figure, smallest: float) -> Change:
    slowdown = b.median / a.median if a.better == "lower" else a.median / b.median
    adjusted = bool(a.share and b.share)
    if a.share and b.share:
        slowdown = a.share / b.share  # a busier or slower machine lowers its ceilings too
    noise = max(smallest, SPREADS * hypot(_error(a), _error(b)))
    verdict: Verdict = "same"
    if slowdown > 1 + noise:
        verdict = "worse"
    elif slowdown < 1 / (1 + noise):
        verdict = "better"
    return Change(
        name=a.name,
        unit=a.unit,
        before=a.median,
        after=b.median,
        slowdown=slowdown,
        noise=noise,
        verdict=verdict,
        adjusted=adjusted,
    )


def _error(figure: Figure) -> float:
    """Relative standard error of the median; of a single repeat nothing is known: a tenth is assumed."""
    count = len(figure.values)
    return 1.25 * figure.spread / count**0.5 if count > 1 else 0.1


def differences(a: BenchResult, b: BenchResult) -> list[str]:
    """What makes the two results hard to compare: work, machine, ceilings, dirty trees."""
    found = [f"{side} was measured on a dirty tree" for side, r in (("A", a), ("B", b)) if r.dirty]
    for title, one, other in (
        ("config", _work(a.config), _work(b.config)),
        ("options", a.options, b.options),
        ("device", _stable(a.device), _stable(b.device)),
    ):
        left, right = dict(_leaves("", one)), dict(_leaves("", other))
        changed = [k for k in sorted(left.keys() | right.keys()) if left.get(k) != right.get(k)]
        found += [f"{title} {k}: {left.get(k)} -> {right.get(k)}" for k in changed]
    for name in a.rooflines.keys() & b.rooflines.keys():
        moved = b.rooflines[name].matmul_flops / a.rooflines[name].matmul_flops
        if not 0.9 < moved < 1.1:
            found.append(f"roofline at the {name}: the matmul ceiling changed by {moved - 1:+.0%}")
    return found


def _work(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: section for name, section in config.items() if name not in IGNORED}


def _stable(device: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in device.items() if name != "load"}


def _leaves(path: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(path, value)]
    return [leaf for k, v in value.items() for leaf in _leaves(f"{path}.{k}" if path else str(k), v)]


def table(changes: list[Change]) -> str:
    lines = [f"{'figure':34s} {'A':>12s} {'B':>12s}  {'unit':14s} {'x slower':>8s} {'noise':>6s}"]
    for c in changes:
        mark = {"worse": "  REGRESSION", "better": "  better", "same": ""}[c.verdict]
        note = " (share of the roofline)" if c.adjusted and c.verdict != "same" else ""
        lines.append(
            f"{c.name:34s} {c.before:>12,.4g} {c.after:>12,.4g}  {c.unit:14s} {c.slowdown:8.2f} "
            f"{c.noise:6.1%}{mark}{note}"
        )
    return "\n".join(lines)
