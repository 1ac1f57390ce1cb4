"""Charts as inline SVG. Colours are CSS variables of the page (`--c0` ... `--c5`, `--ink`, `--line`), so one chart serves light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 40, 72, 12, 26
NUM_COLOURS = 6


@dataclass(frozen=True)
class Series:
    """A named line; points without a value are left out of it."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval, in [0, 1]."""

    label: str
    mean: float
    low: float
    high: float
    note: str = ""


def line_chart(
    series: Sequence[Series], *, log: bool = False, label: str = "", bounds: tuple[float, float] | None = None
) -> str:
    """Lines over a shared x axis, each named at its right end; a title element gives every point's value on hover."""
    shown = [Series(s.name, *_present(s, log)) for s in series]
    shown = [s for s in shown if s.x]
    if not shown:
        return f'<p class="quiet">{"exactly 0 throughout" if any(s.x for s in series) else "no values yet"}</p>'
    values = [float(v) for s in shown for v in s.y if v is not None]
    low, high = bounds or _span(values, log)
    xs = [x for s in shown for x in s.x]
    first, last = min(xs), max(max(xs), min(xs) + 1)

    def px(x: float) -> float:
        return LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        share = (_scaled(y, log) - _scaled(low, log)) / (_scaled(high, log) - _scaled(low, log))
        return HEIGHT - BOTTOM - min(1.0, max(0.0, share)) * (HEIGHT - TOP - BOTTOM)

    parts = [_open(WIDTH, HEIGHT, label), *_axes(low, high, log, py), *_x_axis(first, last, px)]
    ends = _spread([py(float(s.y[-1] or 0)) for s in shown], 13)
    for number, (line, end) in enumerate(zip(shown, ends, strict=True)):
        colour = f"var(--c{number % NUM_COLOURS})"
        points = " ".join(f"{px(x):.1f},{py(float(y or 0)):.1f}" for x, y in zip(line.x, line.y, strict=True))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>'
        )
        for x, y in zip(line.x, line.y, strict=True):
            hover = f"{line.name}, {x:g}: {_short(float(y or 0))}"
            dot = 2.2 if len(line.x) <= 60 else 1.2
            parts.append(
                f'<circle cx="{px(x):.1f}" cy="{py(float(y or 0)):.1f}" r="{dot}" fill="{colour}"><title>{escape(hover)}</title></circle>'
            )
        name = f"{line.name} {_short(float(line.y[-1] or 0))}" if len(shown) > 1 else _short(float(line.y[-1] or 0))
        parts.append(f'<text x="{WIDTH - RIGHT + 6}" y="{end + 4:.1f}" fill="{colour}">{escape(name[:18])}</text>')
    return "".join([*parts, "</svg>"])


def interval_chart(
    rows: Sequence[Interval], *, mark: float | None = None, mark_label: str = "", label: str = ""
) -> str:
    """Dots with whiskers on a 0-1 axis, one row each; `mark` is a dashed reference line."""
    left, right, step = 92, 48, 26
    width, height = 320, step * len(rows) + 40
    span = width - left - right
    parts = [_open(width, height, label)]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = left + tick * span
        parts.append(f'<line x1="{x}" x2="{x}" y1="8" y2="{height - 24}" stroke="var(--line)"/>')
        parts.append(f'<text x="{x}" y="{height - 8}" text-anchor="middle" class="tick">{tick:g}</text>')
    if mark is not None:
        x = left + mark * span
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 24}" stroke="var(--ink)" stroke-dasharray="3 3" opacity=".55"><title>{escape(mark_label)}</title></line>'
        )
    for number, row in enumerate(rows):
        y, colour = 22 + number * step, f"var(--c{number % NUM_COLOURS})"
        x0, x1, xm = (left + v * span for v in (row.low, row.high, row.mean))
        hover = f"{row.label}: {row.mean:.3f}, 95 % interval {row.low:.3f} to {row.high:.3f}. {row.note}"
        parts.append(
            f'<g><title>{escape(hover)}</title><text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(row.label)}</text>'
        )
        parts.append(
            f'<line x1="{x0:.1f}" x2="{x1:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="3" opacity=".45" stroke-linecap="round"/>'
        )
        parts.append(
            f'<circle cx="{xm:.1f}" cy="{y}" r="5.5" fill="{colour}"/><text x="{width - right + 10}" y="{y + 4}">{row.mean:.3f}</text></g>'
        )
    return "".join([*parts, "</svg>"])


def strip(length: int, rows: Sequence[tuple[str, Sequence[int]]], query: int, label: str = "") -> str:
    """Which of `length` positions each row (a layer) chose: a mark per position; the query's own position is outlined."""
    left, cell_h, width = 54, 16, 1080
    height = cell_h * len(rows) + 20
    cell = (width - left) / max(1, length)
    parts = [_open(width, height, label)]
    for number, (name, chosen) in enumerate(rows):
        y = number * cell_h + 2
        parts.append(f'<text x="{left - 6}" y="{y + 9}" text-anchor="end" class="tick">{escape(name)}</text>')
        parts.append(
            f'<rect x="{left}" y="{y}" width="{width - left}" height="{cell_h - 3}" fill="var(--line)" opacity=".5"/>'
        )
        for position in chosen:
            parts.append(
                f'<rect x="{left + position * cell:.2f}" y="{y}" width="{max(1.0, cell - 0.4):.2f}" height="{cell_h - 3}" fill="var(--c{number % NUM_COLOURS})"/>'
            )
    x = left + query * cell
    parts.append(f'<line x1="{x:.2f}" x2="{x:.2f}" y1="0" y2="{height - 16}" stroke="var(--ink)" stroke-width="1.4"/>')
    for tick in range(0, length, max(10, length // 80 * 10)):
        parts.append(f'<text x="{left + tick * cell:.1f}" y="{height - 3}" class="tick">{tick}</text>')
    return "".join([*parts, "</svg>"])


def _open(width: int, height: int, label: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label, quote=True)}" preserveAspectRatio="xMinYMin meet">'


def _present(series: Series, log: bool) -> tuple[list[float], list[float]]:
    pairs = [
        (x, float(y))
        for x, y in zip(series.x, series.y, strict=True)
        if y is not None and math.isfinite(y) and (y > 0 or not log)
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _span(values: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return 10.0 ** math.floor(math.log10(low)), 10.0 ** max(
            math.ceil(math.log10(high)), math.floor(math.log10(low)) + 1
        )
    if low >= 0 and (high == 0 or 0.05 < high <= 1):
        return 0.0, 1.0
    if low == high:
        return low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
    low = 0.0 if 0 <= low < 0.5 * high else low
    return low, high + 0.05 * (high - low)


def _scaled(value: float, log: bool) -> float:
    return math.log10(max(value, 1e-300)) if log else value


def _axes(low: float, high: float, log: bool, py: object) -> list[str]:
    if log:
        first, last = round(math.log10(low)), round(math.log10(high))
        ticks = [10.0**power for power in range(first, last + 1, max(1, (last - first) // 4))]
    else:
        ticks = [low + (high - low) * i / 4 for i in range(5)]
    parts = []
    for tick in ticks:
        y = py(tick)  # type: ignore[operator]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end" class="tick">{_short(tick)}</text>')
    return parts


def _x_axis(first: float, last: float, px: object) -> list[str]:
    middle = round((first + last) / 2)
    return [
        f'<text x="{px(x):.1f}" y="{HEIGHT - 8}" text-anchor="middle" class="tick">{x:g}</text>'  # type: ignore[operator]
        for x in dict.fromkeys((first, middle, last))
    ]


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """The places moved apart to at least `gap`, in their order, within the chart where there is room."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [0.0] * len(places)
    before = -math.inf
    for i in order:
        moved[i] = before = max(places[i], before + gap)
    over = max([0.0, *(place - (HEIGHT - BOTTOM) for place in moved)])
    return [place - over for place in moved]


def _short(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.3g}"
