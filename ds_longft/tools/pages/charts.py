"""Charts as SVG inside the page: colours from the page's own style, so that dark mode and print work, no library.

A plotting library's pictures have their colours fixed, and an interactive one weighs megabytes in a page that should
open from a mail on a phone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 70, 14, 14, 44
EDGE = 24  # half of a label
X_LABELS = 8  # about as many, of numbers below a line chart
LONG_TOKENS = 8192  # an axis of tokens as long as this is marked in powers of two
SMALL = 0.01  # an axis of numbers below this is written in powers of ten
COLOURS = 5  # of the page
MOST_LABELS = 12  # below columns; of more every second, third, ... is written
MAX_POINTS = 400  # of a line; of more, the lowest and highest of each stretch are drawn: a screen shows no others


@dataclass(frozen=True)
class Line:
    """One line of a chart: points in order of x."""

    label: str
    points: Sequence[tuple[float, float]]
    style: int = 0  # 0 to 4: a colour of the page; 4 is pale, for what lies behind another line


def line_chart(
    lines: Sequence[Line], *, name: str, x_label: str, y_label: str, level: tuple[str, float] | None = None,
    from_zero: bool = False,
) -> str:  # fmt: skip
    """A figure with axes, legend and a readout that follows the arrow keys; "" where all points stand at one x.

    `level`: a horizontal line with a name, e.g. what was planned.
    """
    drawn = (Line(line.label, thin(line.points), line.style) for line in lines)
    lines = [line for line in drawn if line.points]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + ([level[1]] if level else [])
    if len(set(xs)) < 2:
        return ""
    x0, x1 = min(xs), max(xs)
    y_ticks = ticks(0.0 if from_zero else min(ys), max(ys))
    y0, y1 = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / ((x1 - x0) or 1)
        up = (y - y0) / ((y1 - y0) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = _grid([at(x0, tick)[1] for tick in y_ticks], y_ticks)
    powers = "tokens" in x_label and x1 >= LONG_TOKENS
    x_ticks = ticks(x0, x1, count=X_LABELS, whole=all(x == int(x) for x in xs), powers=powers)
    for tick, number in zip(x_ticks, numbers(x_ticks), strict=True):
        if x0 <= tick <= x1:
            x, _ = at(tick, y0)
            anchor = "end" if x > WIDTH - RIGHT - EDGE else "middle"  # the last label stays inside the picture
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="{anchor}">{number}</text>')
    if level:  # named at its left, where what grows towards it has not come yet
        _, y = at(x0, level[1])
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT + 6}" y="{y + 16:.1f}">{escape(level[0])}</text>')
    for line in lines:
        places = [at(x, y) for x, y in line.points]
        data = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line c{line.style}" points="{data}"/>')
        if len(places) <= 40:
            size = 3 if len(places) > 1 else 5  # alone it has no line that leads to it
            parts += [f'<circle class="dot c{line.style}" cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>' for x, y in places]
    facts = [
        (line.label, [(round(at(x, y)[0], 1), float(f"{x:.6g}"), float(f"{y:.4g}")) for x, y in line.points])
        for line in lines
    ]
    return _figure(parts, facts, [line.style for line in lines], name=name, x_label=x_label, y_label=y_label)


def column_chart(
    labels: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], *, name: str, x_label: str, y_label: str,
    stacked: bool = False,
) -> str:  # fmt: skip
    """Columns over labels, each series in a colour of its own: beside each other, or on top of each other.

    Of more than five series the fifth and later ones are one, "others". "" where there is nothing to see; under a
    single label stand nothing but the sums.
    """
    if len(labels) < 2:
        return ""
    if len(series) > COLOURS:
        rest = [sum(values) for values in zip(*(values for _, values in series[COLOURS - 1 :]), strict=True)]
        series = [*series[: COLOURS - 1], ("others", rest)]
    tops = [sum(values) if stacked else max(values) for values in zip(*(v for _, v in series), strict=True)]
    if not any(tops):
        return ""
    y_ticks = ticks(0.0, max(tops))
    room, up = (WIDTH - LEFT - RIGHT) / len(labels), (HEIGHT - TOP - BOTTOM) / y_ticks[-1]
    parts = _grid([HEIGHT - BOTTOM - tick * up for tick in y_ticks], y_ticks)
    every = -(-len(labels) // MOST_LABELS)
    for i, label in enumerate(labels):
        if i % every == 0:
            x = LEFT + (i + 0.5) * room
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(label)}</text>')
        below = 0.0
        for number, (_, values) in enumerate(series):
            wide = 0.8 * room / (1 if stacked else len(series))
            x = LEFT + (i + 0.1) * room + (0 if stacked else number * wide)
            top = HEIGHT - BOTTOM - (below + values[i]) * up
            if values[i]:
                size = f'width="{wide:.1f}" height="{values[i] * up:.1f}"'
                parts.append(f'<rect class="column c{number}" x="{x:.1f}" y="{top:.1f}" {size}/>')
            below += values[i] if stacked else 0
    facts = [
        (what, [(round(LEFT + (i + 0.5) * room, 1), labels[i], float(f"{v:.4g}")) for i, v in enumerate(values)])
        for what, values in series
    ]
    return _figure(parts, facts, range(len(series)), name=name, x_label=x_label, y_label=y_label)


def _grid(heights: Sequence[float], marked: Sequence[float]) -> list[str]:
    """Lines across the picture at these heights, with their numbers."""
    return [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number}</text>'
        for y, number in zip(heights, numbers(marked), strict=True)
    ]


def _figure(
    parts: Sequence[str], facts: Sequence[tuple[str, Sequence[tuple[float, float | str, float]]]],
    styles: Iterable[int], *, name: str, x_label: str, y_label: str,
) -> str:  # fmt: skip
    """`facts`: of each line its label and points (place in the picture, x, y), for the readout."""
    middle = (WIDTH + LEFT - RIGHT) / 2
    drawn = "".join(parts) + (
        f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
        '<line class="cursor" y1="0" y2="0"/>'
    )
    keys = zip(styles, facts, strict=True)
    legend = "".join(f'<span class="key c{style}">{escape(label)}</span>' for style, (label, _) in keys)
    data = escape(json.dumps(facts, ensure_ascii=False, separators=(",", ":")), quote=True)
    return (
        f'<figure class="chart" aria-label="{escape(name)}" tabindex="0" data-lines="{data}" '
        f'data-x="{escape(x_label)}" data-y="{escape(y_label)}">'
        f"<figcaption><strong>{escape(name)}</strong> <small>{escape(y_label)}</small> {legend}</figcaption>"
        f'<div class=plot><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)}">{drawn}</svg>'
        f'<output aria-live="polite"></output></div></figure>'
    )


def bar_chart(bars: Sequence[tuple[str, float]], *, name: str, unit: str) -> str:
    """Labelled horizontal bars as a table: readable without any picture."""
    most = max((value for _, value in bars), default=0) or 1
    rows = "".join(
        f"<tr><th scope=row>{escape(label)}</th><td class=num>{value:,.0f}</td>"
        f'<td class=bar><i style="width:{100 * value / most:.1f}%"></i></td></tr>'
        for label, value in bars
    )
    head = f"<caption>{escape(name)}</caption><tr><td></td><th scope=col>{escape(unit)}</th><td></td></tr>"
    return f"<table class=bars>{head}{rows}</table>"


def heat_table(
    columns: Sequence[str], rows: Sequence[tuple[str, Sequence[float | None]]], *, name: str, corner: str
) -> str:
    """A grid of percentages, coloured from orange to blue; the numbers stand in it, so it reads without colour.

    None: not measured.
    """
    head = "".join(f"<th scope=col>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><th scope=row>{escape(label)}</th>"
        + "".join("<td>–</td>" if v is None else f'<td style="--v:{v:.0f}">{v:.0f}</td>' for v in values)
        + "</tr>"
        for label, values in rows
    )
    top = f"<caption>{escape(name)}</caption><tr><th scope=col>{escape(corner)}</th>{head}</tr>"
    return f"<table class=heat>{top}{body}</table>"


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` of the points: the lowest and the highest of each stretch, so that peaks stay; both ends.

    What is not finite is left out.
    """
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if len(finite) <= MAX_POINTS:
        return finite
    size = -(-2 * len(finite) // (MAX_POINTS - 2))
    kept = {0, len(finite) - 1}
    for start in range(0, len(finite), size):
        stretch = range(start, min(start + size, len(finite)))
        kept |= {min(stretch, key=lambda i: finite[i][1]), max(stretch, key=lambda i: finite[i][1])}
    return [finite[i] for i in sorted(kept)]


def ticks(low: float, high: float, count: int = 5, *, whole: bool = False, powers: bool = False) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` of them.

    `whole`: of what is counted. `powers`: multiples of a power of two.
    """
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / (count - 1)
    power = 10 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999 and not (whole and s == 2.5))
    step = 2 ** math.ceil(math.log2(rough)) if powers else math.ceil(step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def numbers(marked: Sequence[float]) -> list[str]:
    """All numbers of an axis, in one way of writing."""
    small = max(map(abs, marked), default=0) < SMALL
    return [shown(value, small=small) for value in marked]


def shown(value: float, *, small: bool = False) -> str:
    """A number for an axis, short enough to stand beside it: 131072 as 128K, 0.00015, or what is `small`, as 1.5e-4."""
    if value and (small or abs(value) < 0.001):
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if value and value % 1024 == 0 and abs(value) >= 4096:
        return f"{value / 1024:.0f}K"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
