"""Horizontal bars with intervals as inline SVG: one group per task, one bar per series."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from redone.record.svg import COLORS

WIDTH, LABEL, RIGHT, BAR, GAP, AXIS = 640, 180, 16, 11, 9, 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A value in [0, 1], with its interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


def bar_chart(labels: Sequence[str], series: Sequence[tuple[str, Sequence[Bar | None]]]) -> str:
    """An <svg> and a legend; "" without labels. series: (name, one bar per label, None where it has none)."""
    if not labels:
        return ""
    block = BAR * len(series) + GAP
    height = block * len(labels) + AXIS
    parts = [_axis(height)]
    for i, label in enumerate(labels):
        top = i * block + GAP / 2
        middle = top + BAR * len(series) / 2 + 4
        parts.append(
            f'<text x="{LABEL - 8}" y="{middle:.1f}" text-anchor="end">{html.escape(label[:26])}</text>'
        )
        for j, (_, bars) in enumerate(series):
            bar = bars[i]
            if bar is not None:
                parts.append(_bar(bar, top + j * BAR, COLORS[j % len(COLORS)]))
    names = "".join(
        f'<span><i style="background:{COLORS[j % len(COLORS)]}"></i>{html.escape(name)}</span>'
        for j, (name, _) in enumerate(series)
    )
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'
    return f'{svg}<p class="legend">{names}</p>'


def _x(value: float) -> float:
    return LABEL + min(max(value, 0.0), 1.0) * (WIDTH - LABEL - RIGHT)


def _bar(bar: Bar, top: float, color: str) -> str:
    width = max(_x(bar.value) - LABEL, 0.5)
    box = f'x="{LABEL}" y="{top:.1f}" width="{width:.1f}" height="{BAR - 2}"'
    drawn = f'<rect {box} fill="{color}" opacity=".8"/>'
    if bar.low is not None and bar.high is not None:
        y = top + (BAR - 2) / 2
        drawn += (
            f'<line x1="{_x(bar.low):.1f}" x2="{_x(bar.high):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#222"/>'
        )
    return drawn


def _axis(height: float) -> str:
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _x(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - AXIS}" stroke="#e4e4e0"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{tick:.0%}</text>')
    return "".join(parts)
