"""Charts as SVG: lines, a table of coloured cells, intervals, stacked bars. No script, no library.

Every chart is a whole SVG with a title and a description for screen readers. Colours are classes of `style.CHART`;
series differ in dashes too, so that a chart can be read without colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mat_dist.report.axes import Axis, short
from mat_dist.report.html import Child, Markup, tag
from mat_dist.report.style import COLOURS

WIDTH = 400
_LETTER = 7.0  # pixels that a letter of the 12-pixel font takes, on average
_DASHES = (None, "6 3", "2 3", "8 3 2 3")
_HEAT = ((0.0, (247, 250, 252)), (0.35, (163, 205, 232)), (0.7, (49, 122, 181)), (1.0, (10, 48, 97)))


@dataclass(frozen=True)
class Series:
    """A line: points (x, y), where a None or non-finite y is a gap; `band` holds (x, low, high).

    `index` chooses colour and dashes; -1 is the colour of text, for a line that is not one of the peers.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    index: int
    band: Sequence[tuple[float, float, float]] = ()

    @property
    def colour(self) -> str:
        return "sx" if self.index < 0 else f"s{self.index % COLOURS}"

    @property
    def dashes(self) -> str | None:
        return None if self.index < 0 else _DASHES[self.index % len(_DASHES)]

    def known(self) -> list[tuple[float, float]]:
        """The points without gaps."""
        return [(x, y) for x, y in self.points if y is not None and math.isfinite(y)]


def cut(text: str, letters: int) -> str:
    """`text`, or its beginning with an ellipsis."""
    return text if len(text) <= letters else text[:max(letters - 1, 1)] + "…"


def canvas(title: str, description: str, height: float, *parts: Child) -> Markup:
    """A whole SVG with its title line at the top."""
    return tag("svg", tag("title", title), tag("desc", description),
               tag("text", cut(title, 58), x=2, y=14, class_="title"), *parts,
               viewBox=f"0 0 {WIDTH} {height:.0f}", role="img", aria_label=f"{title}. {description}",
               xmlns="http://www.w3.org/2000/svg")


def percent_text(share: float) -> str:
    """A share as the text of a tick: 90, 12.5."""
    return short(100 * share)


def line_chart(title: str, series: Sequence[Series], *, x_label: str, y_label: str, description: str = "",
               limits: tuple[float, float] | None = None, percent: bool = False, log_x: bool = False,
               zero: bool = False, x_marks: Sequence[float] = (), guide: tuple[float, str] | None = None) -> Markup:
    """Lines over a common x; shares as per cent with `percent`. `zero`: the y axis holds 0. `guide` is a vertical line
    with its text."""
    legend, top = _legend(series, 34)
    bottom = top + 190
    values = [y for s in series for _, y in s.known()] + [y for s in series for _, *ends in s.band for y in ends]
    y_axis = Axis.around([*values, 0.0] if zero else values, bottom, top, limits=limits)
    xs = [x for s in series for x, _ in s.known()] or [0.0, 1.0]
    x_axis = Axis.around(xs, 46, WIDTH - 12, log=log_x, marks=x_marks)
    if not log_x and x_axis.low < max(xs):  # no empty space on the right
        x_axis = Axis.around(xs, 46, WIDTH - 12, limits=(x_axis.low, max(xs)))
    parts: list[Child] = [tag("text", y_label, x=2, y=30, class_="axis"), legend]
    for value in y_axis.marks:
        y = y_axis.place(value)
        text = percent_text(value) if percent else short(value)
        parts += [tag("line", x1=46, x2=WIDTH - 12, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"),
                  tag("text", text, x=40, y=f"{y + 4:.1f}", class_="axis end")]
    parts += [tag("text", short(value), x=f"{x_axis.place(value):.1f}", y=bottom + 16, class_="axis middle")
              for value in x_axis.marks]
    parts.append(tag("text", x_label, x=(46 + WIDTH - 12) / 2, y=bottom + 33, class_="axis middle"))
    if guide is not None:
        at = f"{x_axis.place(guide[0]):.1f}"
        parts += [tag("line", x1=at, x2=at, y1=top, y2=bottom, class_="guide"),
                  tag("text", guide[1], x=float(at) + 4, y=top + 10, class_="axis")]
    parts += [_line(one, x_axis, y_axis) for one in series]
    told = description or f"{y_label} over {x_label} of {', '.join(s.name for s in series[:8])}"
    return canvas(title, told, bottom + 40, parts)


def _line(one: Series, x_axis: Axis, y_axis: Axis) -> Markup:
    runs: list[list[str]] = [[]]
    for x, y in one.points:
        if y is None or not math.isfinite(y):
            runs.append([])
        else:
            runs[-1].append(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}")
    band = [f"{x_axis.place(x):.1f},{y_axis.place(high):.1f}" for x, _, high in one.band]
    band += [f"{x_axis.place(x):.1f},{y_axis.place(low):.1f}" for x, low, _ in reversed(one.band)]
    lines = [tag("polyline", points=" ".join(run), class_="line", stroke_dasharray=one.dashes)
             for run in runs if len(run) > 1]
    dots = [point.split(",") for run in runs for point in run if len(run) == 1 or len(one.points) <= 12]
    return tag("g", tag("title", one.name), tag("polygon", points=" ".join(band), class_="band") if band else None,
               lines, [tag("circle", cx=x, cy=y, r=2.4, class_="dot") for x, y in dots], class_=one.colour)


def _legend(series: Sequence[Series], y: float, *, blocks: bool = False) -> tuple[Markup | None, float]:
    """Names with a piece of their line (or a block of their colour), wrapped -> legend, and where the plot begins."""
    if len(series) < 2:
        return None, y + 12
    x, parts = 46.0, []
    y += 12
    for one in series[:24]:
        name = cut(one.name, 26)
        width = 26 + _LETTER * len(name) + 10
        if x + width > WIDTH and x > 46:
            x, y = 46.0, y + 16
        mark = (tag("rect", x=x + 8, y=y - 10, width=12, height=11, class_="bar") if blocks else
                tag("line", x1=x, x2=x + 20, y1=y - 4, y2=y - 4, class_="line", stroke_dasharray=one.dashes))
        parts.append(tag("g", mark, tag("text", name, x=x + 25, y=y), class_=one.colour))
        x += width
    return tag("g", parts), y + 14


def heat(share: float) -> tuple[int, int, int]:
    """The colour of a value in [0, 1]: white over blue to dark blue."""
    share = min(max(share, 0.0), 1.0)
    for (low, before), (high, after) in pairwise(_HEAT):
        if share <= high:
            part = (share - low) / (high - low)
            red, green, blue = (round(a + part * (b - a)) for a, b in zip(before, after, strict=True))
            return red, green, blue
    return _HEAT[-1][1]


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], *,
             column_label: str, description: str, gap: int | None = None) -> Markup:
    """Shares in [0, 1] as coloured cells, written in per cent where there is room. `gap`: a column set apart.

    Colours go from white for the smallest value, rounded down to tens of per cent, to dark blue for 100 %.
    """
    known = [value for row in values for value in row if value is not None] or [0.0]
    lowest = min(math.floor(10 * min(known)) / 10, 0.9)
    left = 18 + _LETTER * max(min(max(len(name) for name in rows), 14), 3)
    wide = (WIDTH - left - (8 if gap is not None else 0)) / len(columns)
    tall = min(max(wide * 0.6, 12), 30)
    letters = int(wide / _LETTER) if wide >= 40 else 12
    names = [cut(name, letters) for name in columns]
    top = 54.0 if wide >= 40 else 44 + _LETTER * max(map(len, names))
    parts: list[Child] = [tag("text", column_label, x=f"{left:.1f}", y=32, class_="axis")]
    xs = [left + wide * n + (8 if gap is not None and n >= gap else 0) for n in range(len(columns))]
    for x, name in zip(xs, names, strict=True):
        middle = x + wide / 2
        if wide >= 40:
            parts.append(tag("text", name, x=f"{middle:.1f}", y=48, class_="axis middle"))
        elif wide >= 9:  # room for upright names only
            parts.append(tag("text", name, transform=f"translate({middle + 4:.1f} {top - 5:.1f}) rotate(-90)",
                             class_="axis"))
    for r, (name, row) in enumerate(zip(rows, values, strict=True)):
        y = top + r * tall
        parts.append(tag("text", cut(name, 14), x=f"{left - 6:.1f}", y=f"{y + tall / 2 + 4:.1f}", class_="axis end"))
        for x, column, value in zip(xs, columns, row, strict=True):
            red, green, blue = heat(((value or 0.0) - lowest) / (1 - lowest))
            colour = "none" if value is None else f"rgb({red},{green},{blue})"
            text = "-" if value is None else f"{100 * value:.1f}"
            ink = "high" if 0.3 * red + 0.59 * green + 0.11 * blue < 140 else "low"
            parts.append(tag("g", tag("title", f"{name}, {column}: {text}"), tag(
                "rect", x=f"{x:.1f}", y=f"{y:.1f}", width=f"{wide - 1.5:.1f}", height=f"{tall - 1.5:.1f}", fill=colour),
                tag("text", text, x=f"{x + wide / 2:.1f}", y=f"{y + tall / 2 + 4:.1f}", class_=f"{ink} middle")
                if wide >= 34 else None))
    bottom = top + len(rows) * tall
    parts.append(tag("text", f"colours from {percent_text(lowest)} % (white) to 100 %", x=f"{left:.1f}",
                     y=f"{bottom + 14:.1f}", class_="axis"))
    return canvas(title, description, bottom + 22, parts)


def interval_chart(title: str, rows: Sequence[tuple[str, Sequence[tuple[float, float, float]]]], kinds: Sequence[str],
                   *, description: str) -> Markup:
    """Shares with their intervals (share, low, high), per row one of each kind, over a common axis in per cent."""
    left = 14 + _LETTER * min(max(len(name) for name, _ in rows), 18)
    step = 9 * len(kinds) + 9
    legend, top = _legend([Series(kind, (), number) for number, kind in enumerate(kinds)], 22, blocks=True)
    bottom = top + step * len(rows)
    ends = [end for _, values in rows for value in values for end in value]
    axis = Axis.around(ends, left, WIDTH - 14)
    parts: list[Child] = [legend]
    for mark in axis.marks:
        x = f"{axis.place(mark):.1f}"
        parts += [tag("line", x1=x, x2=x, y1=top, y2=f"{bottom:.1f}", class_="grid"),
                  tag("text", percent_text(mark), x=x, y=f"{bottom + 15:.1f}", class_="axis middle")]
    parts.append(tag("text", "accuracy, %", x=(left + WIDTH - 14) / 2, y=f"{bottom + 31:.1f}", class_="axis middle"))
    for row, (name, values) in enumerate(rows):
        y = top + step * row
        parts.append(tag("text", cut(name, 18), x=f"{left - 8:.1f}", y=f"{y + step / 2 + 4:.1f}", class_="end"))
        for number, (share, low, high) in enumerate(values):
            at = f"{y + 9 + 9 * number:.1f}"
            parts.append(tag("g", tag("title", f"{name}, {kinds[number]}: {100 * share:.2f} %"), tag(
                "line", x1=f"{axis.place(low):.1f}", x2=f"{axis.place(high):.1f}", y1=at, y2=at, class_="line"), tag(
                "circle", cx=f"{axis.place(share):.1f}", cy=at, r=3.4, class_="dot" if number == 0 else "ring"),
                class_=f"s{number % COLOURS}"))
    return canvas(title, description, bottom + 38, parts)


def stacked_bars(title: str, rows: Sequence[tuple[str, Sequence[float]]], parts: Sequence[str], *, x_label: str,
                 description: str) -> Markup:
    """A bar per row, made of parts that add up."""
    left = 14 + _LETTER * min(max(len(name) for name, _ in rows), 14)
    legend, top = _legend([Series(name, (), number) for number, name in enumerate(parts)], 22, blocks=True)
    tall = 24
    bottom = top + tall * len(rows)
    axis = Axis.around([0.0, *(sum(values) for _, values in rows)], left, WIDTH - 14)
    drawn: list[Child] = [legend]
    for mark in axis.marks:
        x = f"{axis.place(mark):.1f}"
        drawn += [tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid"),
                  tag("text", short(mark), x=x, y=bottom + 15, class_="axis middle")]
    for row, (name, values) in enumerate(rows):
        y, begin = top + tall * row + 3, 0.0
        drawn.append(tag("text", cut(name, 14), x=f"{left - 8:.1f}", y=y + 13, class_="end"))
        for number, value in enumerate(values):
            place, end = axis.place(begin), axis.place(begin + value)
            drawn.append(tag("g", tag("title", f"{name}, {parts[number]}: {short(value)}"), tag(
                "rect", x=f"{place:.1f}", y=y, width=f"{max(end - place, 0):.1f}", height=tall - 6, class_="bar"),
                class_=f"s{number % COLOURS}"))
            begin += value
    drawn.append(tag("text", x_label, x=(left + WIDTH - 14) / 2, y=bottom + 31, class_="axis middle"))
    return canvas(title, description, bottom + 38, drawn)


def surface(title: str, places: Sequence[float], values: Sequence[Sequence[float]], *, x_label: str, y_label: str,
            value_label: str, description: str) -> Markup:
    """A square of values [y][x] over the same places on both axes, as colours with their scale beside it."""
    left, top, side = 46.0, 42.0, 262.0
    low, high = min(map(min, values)), max(map(max, values))
    span = (high - low) or 1.0
    cell = side / len(places)
    axis = Axis.around(places, left + cell / 2, left + side - cell / 2, limits=(places[0], places[-1]))
    parts: list[Child] = [tag("text", y_label, x=2, y=32, class_="axis")]
    for row, line in enumerate(values):
        y = top + side - (row + 1) * cell
        for column, value in enumerate(line):
            parts.append(tag("rect", x=f"{left + column * cell:.1f}", y=f"{y:.1f}", width=f"{cell + 0.3:.1f}",
                             height=f"{cell + 0.3:.1f}", fill="rgb({},{},{})".format(*heat((value - low) / span))))
    for mark in axis.marks:
        at = axis.place(mark)
        parts += [tag("text", short(mark), x=f"{at:.1f}", y=top + side + 16, class_="axis middle"),
                  tag("text", short(mark), x=40, y=f"{top + side - (at - left) + 4:.1f}", class_="axis end")]
    parts.append(tag("text", x_label, x=left + side / 2, y=top + side + 33, class_="axis middle"))
    scale = Axis.around((low, low + span), top + side, top, limits=(low, low + span))
    for number in range(32):
        parts.append(tag("rect", x=330, y=f"{top + side - (number + 1) * side / 32:.1f}", width=14,
                         height=f"{side / 32 + 0.3:.1f}", fill="rgb({},{},{})".format(*heat(number / 31))))
    parts += [tag("text", short(mark), x=350, y=f"{scale.place(mark) + 4:.1f}", class_="axis") for mark in scale.marks]
    parts.append(tag("text", value_label, x=WIDTH - 4, y=32, class_="axis end"))
    return canvas(title, description, top + side + 40, parts)
