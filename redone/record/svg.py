"""Line and stacked-area charts as inline SVG: no script, no font, no library."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26
COLORS = (
    "#2563a8",
    "#c2571a",
    "#2f7d4f",
    "#7b4fa3",
    "#a8324a",
    "#5b6b7b",
    "#b08a1e",
    "#218a94",
    "#94604a",
    "#444",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    label: str
    points: Sequence[tuple[float, float]]  # (step, value), ascending steps, finite
    dots: bool = False  # few points: show each
    band: Sequence[tuple[float, float, float]] = ()  # (step, low, high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Data ranges of a chart; maps data to pixels."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / max(self.x1 - self.x0, 1e-12) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / max(self.y1 - self.y0, 1e-12) * (HEIGHT - TOP - BOTTOM)


def line_chart(lines: Sequence[Line], *, percent: bool = False, log_scale: bool = False) -> str:
    """An <svg>; "" when there is no point. log_scale drops values <= 0."""
    lines = [_logarithm(line) if log_scale else line for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [
        y for line in lines for _, *b in line.band for y in b
    ]
    frame = _frame(xs, ys)
    parts = [_axes(frame, percent=percent, log_scale=log_scale)]
    for line, color in zip(lines, COLORS, strict=False):
        if line.band:
            edge = [(x, high) for x, _, high in line.band] + [(x, low) for x, low, _ in reversed(line.band)]
            parts.append(f'<path d="{_path(frame, edge)}Z" fill="{color}" opacity=".14"/>')
        parts.append(
            f'<path d="{_path(frame, line.points)}" fill="none" stroke="{color}" stroke-width="1.6"/>'
        )
        if line.dots or len(line.points) == 1:
            parts += [
                f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6" fill="{color}"/>'
                for x, y in line.points
            ]
    legend = _legend([line.label for line in lines]) if len(lines) > 1 else ""
    return _svg(parts) + legend


def stacked_chart(lines: Sequence[Line]) -> str:
    """Areas on top of each other, first line at the bottom; every line has the same steps."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    steps = [x for x, _ in lines[0].points]
    base = [0.0] * len(steps)
    layers = []
    for line in lines:
        top = [b + y for b, (_, y) in zip(base, line.points, strict=True)]
        layers.append((base, top))
        base = top
    frame = _frame(steps, [0.0, *base])
    parts = [_axes(frame)]
    for (low, high), color in zip(layers, COLORS * (len(layers) // len(COLORS) + 1), strict=False):
        edge = [*zip(steps, high, strict=True), *reversed(list(zip(steps, low, strict=True)))]
        parts.append(f'<path d="{_path(frame, edge)}Z" fill="{color}" opacity=".75"/>')
    return _svg(parts) + _legend([line.label for line in lines])


def _frame(xs: Sequence[float], ys: Sequence[float]) -> Frame:
    low, high = min(ys), max(ys)
    if high - low < 1e-12:
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    else:
        low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
        low = 0.0 if min(ys) >= 0 > low else low
    x1 = max(xs)
    return Frame(x0=min(xs), x1=x1 if x1 > min(xs) else x1 + 1, y0=low, y1=high)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) inside [low, high], about `count` of them."""
    span = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(span))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= span * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _axes(frame: Frame, *, percent: bool = False, log_scale: bool = False) -> str:
    parts = []
    for y in ticks(frame.y0, frame.y1, 4):
        if log_scale and y != int(y):
            continue
        text = f"1e{int(y)}" if log_scale else (f"{y:,.6g}" if not percent else f"{y:.0%}")
        at = frame.y(y)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e4e4e0"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{text}</text>')
    for x in ticks(frame.x0, frame.x1, 6):
        if x == int(x):
            parts.append(f'<text x="{frame.x(x):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{int(x)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}" stroke="#999"/>')
    return "".join(parts)


def _path(frame: Frame, points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)


def _logarithm(line: Line) -> Line:
    points = [(x, math.log10(y)) for x, y in line.points if y > 0]
    return Line(label=line.label, points=points, dots=line.dots)


def _svg(parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _legend(labels: Sequence[str]) -> str:
    colors = COLORS * (len(labels) // len(COLORS) + 1)
    items = "".join(
        f'<span><i style="background:{color}"></i>{html.escape(label)}</span>'
        for label, color in zip(labels, colors, strict=False)
    )
    return f'<p class="legend">{items}</p>'
