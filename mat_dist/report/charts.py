"""Charts by matplotlib: lines, a table of coloured cells, intervals, stacked bars, a surface.

A chart is drawn when it is rendered, so matplotlib is imported only then. Equal values give equal bytes. An SVG keeps
its texts as text, has a title and a description for screen readers, and turns dark where the page does: it is drawn for
a light ground, and a style sheet inside it replaces each colour by its counterpart on a dark one.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 400  # points; a pixel of the SVG is a point
INK, DIM, GROUND, GRID = "#1b2026", "#5a6570", "#ffffff", "#dde2e7"
# Colours of the peers: blue, orange, green, magenta, brown, cyan, red, grey; contrast with the ground at least 3:1.
PEERS = ("#1f6fb5", "#c45a00", "#1f8a4c", "#a8379b", "#7d6608", "#0b7f8c", "#c0392b", "#5f6b76")
NIGHT = dict(zip((INK, DIM, GROUND, GRID, *PEERS), (
    "#e8ebee", "#9aa5b0", "#14181c", "#323a42",
    "#6db3f2", "#f0a04b", "#5fce8a", "#e08ad6", "#d6bd4f", "#4fc9d6", "#f08a7d", "#aab4bd"), strict=True))
_ON_CELLS = "#1b2027", "#fefefe"  # texts on coloured cells, which are the same by day and by night
_DASHES = ("-", (0, (4, 2)), (0, (1.2, 2)), (0, (5, 2, 1.2, 2)))  # series differ in dashes too: read without colours
_LETTER = 6.5  # points that a letter takes, on average
_LEGEND_MOST = 24
# Not allowed in XML: control characters, lone surrogates, two non-characters.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
_SCREEN = (':root{color-scheme:light dark}text{font-family:system-ui,-apple-system,"Segoe UI","Liberation Sans",'
           "sans-serif!important}")
# No formulas in texts: a `$` in a name is a `$`.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "mat_dist", "pdf.fonttype": 42, "text.parse_math": False,
    "font.sans-serif": ["DejaVu Sans"], "font.size": 10.5, "figure.titlesize": 12, "figure.titleweight": "bold",
    "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.fontsize": 10, "axes.titlesize": 10,
    "text.color": INK, "axes.labelcolor": DIM, "xtick.color": DIM, "ytick.color": DIM, "axes.edgecolor": GRID,
    "figure.facecolor": GROUND, "axes.facecolor": "none", "ytick.major.size": 0, "xtick.major.size": 0,
    "xtick.major.pad": 6, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "grid.color": GRID, "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.8,
    "lines.markersize": 4.5}


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
    def look(self) -> dict[str, Any]:
        return {"color": INK if self.index < 0 else _colour(self.index),
                "linestyle": _DASHES[max(self.index, 0) % len(_DASHES)]}

    def known(self) -> list[tuple[float, float]]:
        """The points without gaps."""
        return [(x, y) for x, y in self.points if y is not None and math.isfinite(y)]


@dataclass(frozen=True)
class Axis:
    """What an axis shows.

    Attributes:
        label: its text.
        limits: just these; else what the values need, and 0 where `zero` says so.
        marks: ticks at just these values.
        log: powers; for values above 0.
        percent: shares are written in per cent.
    """

    label: str
    limits: tuple[float, float] | None = None
    marks: Sequence[float] = ()
    log: bool = False
    zero: bool = False
    percent: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart that is drawn when it is asked for; `height` in points. Title and description tell it without eyes."""

    title: str
    description: str
    height: float
    draw: Callable[[Axes], None]

    def render(self, kind: str) -> bytes:
        """The chart as a file: svg, pdf or png."""
        return self.svg.encode() if kind == "svg" else self._drawn(kind)

    @cached_property
    def svg(self) -> str:
        """The chart as SVG with its texts for screen readers, the fonts of the screen, and its colours in the dark."""
        svg = self._drawn("svg").decode()
        night = "".join(f'[style*="{what}: {day}"]{{{what}:{dark}!important}}' for day, dark in NIGHT.items()
                        for what in ("fill", "stroke") if f"{what}: {day}" in svg)
        texts = "".join(f"<{name}>{html.escape(fit(text))}</{name}>"
                        for name, text in (("title", self.title), ("desc", self.description)))
        style = f"<style>{_SCREEN}@media screen and (prefers-color-scheme:dark){{{night}}}</style>"
        return svg.replace(" <defs>\n", f" {texts}{style}\n <defs>\n", 1)

    @property
    def uri(self) -> str:
        """The SVG as the source of an <img>, in which nothing of it can run."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()

    def _drawn(self, kind: str) -> bytes:
        from matplotlib import figure as drawing
        from matplotlib.text import Text

        # A file must not tell when and by what it was made, or no two were equal.
        silent = {"svg": ("Date", "Creator", "Format", "Type"), "pdf": ("CreationDate", "Creator", "Producer"),
                  "png": ("Software",)}[kind]
        stream = io.BytesIO()
        with _own_style():
            figure = drawing.Figure(figsize=(WIDTH / 72, self.height / 72), layout="constrained")
            figure.suptitle(cut(self.title, 54), x=0.005, ha="left")
            self.draw(figure.add_subplot())
            for text in figure.findobj(Text):
                text.set_text(fit(text.get_text()))
            figure.savefig(stream, format=kind, dpi=200, metadata=dict.fromkeys(silent))
        return stream.getvalue()


class Figure(NamedTuple):
    """A chart of the page, and the name of its file."""

    name: str
    chart: Chart
    caption: str = ""


def fit(text: str) -> str:
    """`text` without what XML does not allow."""
    return _UNFIT.sub("\N{REPLACEMENT CHARACTER}", text)


@contextmanager
def _own_style() -> Iterator[None]:
    """matplotlib's own defaults and ours, whatever the user's matplotlibrc says; no words about missing glyphs."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def _colour(index: int) -> str:
    return PEERS[index % len(PEERS)]


def cut(text: str, letters: int) -> str:
    """`text` on one line, or its beginning with an ellipsis."""
    text = " ".join(fit(text).split())
    return text if len(text) <= letters else text[:max(letters - 1, 1)] + "…"


def _legend(axes: Axes, handles: Sequence[Any], names: Sequence[str]) -> None:
    """The names above the axes, in as many columns as fit; none for a single name."""
    if len(names) > 1:
        axes.legend(handles[:_LEGEND_MOST], [cut(name, 26) for name in names[:_LEGEND_MOST]], ncols=_columns(names),
                    loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, borderpad=0.2, columnspacing=1.2,
                    handlelength=2.4)


def _columns(names: Sequence[str]) -> int:
    """How many names of a legend stand side by side."""
    return max(int((WIDTH - 40) / (44 + _LETTER * min(max(map(len, names)), 26))), 1)


def _legend_height(names: Sequence[str]) -> float:
    return 15 * math.ceil(min(len(names), _LEGEND_MOST) / _columns(names)) if len(names) > 1 else 0


def _ticks(axes: Axes, which: Literal["x", "y"], axis: Axis) -> None:
    """Label, limits and ticks of the x or y axis."""
    from matplotlib.ticker import NullLocator

    one = axes.xaxis if which == "x" else axes.yaxis
    one.set_label_text(axis.label)
    if axis.log:
        axes.set(**{f"{which}scale": "log"})
    if axis.percent:
        one.set_major_formatter(lambda share, _: f"{100 * share:.4g}")
    if not axis.log:
        axes.locator_params(axis=which, nbins=6)
    if axis.marks:
        one.set_ticks(list(axis.marks), labels=[f"{mark:.4g}" for mark in axis.marks])
        one.set_minor_locator(NullLocator())
    if axis.limits:
        axes.set(**{f"{which}lim": axis.limits})
    elif axis.zero:
        low, high = one.get_view_interval()
        axes.set(**{f"{which}lim": (min(low, 0), max(high, 0))})


def line_chart(title: str, series: Sequence[Series], x: Axis, y: Axis, *, guide: tuple[float, str] | None = None
               ) -> Chart:
    """Lines over a common x. `guide` is a vertical line with its text."""
    names = [one.name for one in series]

    def draw(axes: Axes) -> None:
        axes.grid(axis="y")
        lines = [_line(axes, one) for one in series]
        xs = [x for one in series for x, _ in one.known()]
        if xs and min(xs) < max(xs) and not x.log:
            axes.set_xlim(min(xs), max(xs))
        _ticks(axes, "x", x)
        _ticks(axes, "y", y)
        if guide is not None:
            axes.axvline(guide[0], color=DIM, linewidth=1, linestyle=(0, (3, 3)))
            axes.annotate(guide[1], (guide[0], 0.98), (4, 0), xycoords=axes.get_xaxis_transform(),
                          textcoords="offset points", va="top", color=DIM)
        _legend(axes, lines, names)

    return Chart(title, f"{y.label} over {x.label} of {', '.join(names[:8])}", 248 + _legend_height(names), draw)


def _line(axes: Axes, one: Series) -> Any:
    """Draw a line -> its entry for the legend. Dots stand where a line has few points, or a point no neighbour."""
    values = [math.nan if y is None else y for _, y in one.points]
    known = [False, *map(math.isfinite, values), False]
    dots = [k for k in range(len(values)) if known[k + 1] and (len(values) <= 12 or not (known[k] or known[k + 2]))]
    (line,) = axes.plot([x for x, _ in one.points], values, marker="o", markevery=dots, **one.look)
    if one.band:
        xs, lows, highs = zip(*one.band, strict=True)
        axes.fill_between(xs, lows, highs, color=one.look["color"], alpha=0.13, linewidth=0)
    return line


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], *,
             label: str, description: str, gap: int | None = None) -> Chart:
    """Shares in [0, 1] as coloured cells, written in per cent where there is room. `gap`: a column set apart.

    Colours go from white for the smallest value, rounded down to tens of per cent, to dark blue for 100 %.
    """
    known = [value for row in values for value in row if value is not None] or [0.0]
    lowest = min(math.floor(10 * min(known)) / 10, 0.9)
    wide = (WIDTH - 18 - _LETTER * min(max(map(len, rows)), 14)) / len(columns)
    tall = min(max(wide * 0.6, 12), 30)
    level = wide >= 40  # names of the columns side by side, else upright, where there is room
    names = [cut(name, int(wide / _LETTER) if level else 12) for name in columns] if wide >= 9 else []

    def draw(axes: Axes) -> None:
        import numpy as np

        cells = [[math.nan if value is None else value for value in row] for row in values]
        image = axes.imshow(cells, cmap="Blues", vmin=lowest, vmax=1, aspect="auto", interpolation="none")
        axes.set_xticks(range(len(names)), names, rotation=0 if level else 90)
        axes.set_yticks(range(len(rows)), [cut(name, 14) for name in rows])
        axes.xaxis.tick_top()
        axes.set_title(label, loc="left", color=DIM)
        axes.set_xlabel(f"colours from {100 * lowest:.4g} % (white) to 100 %", loc="left")
        axes.spines.bottom.set_visible(False)
        axes.vlines([k - 0.5 for k in range(1, len(columns))], -0.5, len(rows) - 0.5, GROUND, linewidth=1.5)
        axes.hlines([k - 0.5 for k in range(1, len(rows))], -0.5, len(columns) - 0.5, GROUND, linewidth=1.5)
        if gap is not None:
            axes.axvline(gap - 0.5, color=GROUND, linewidth=8)
        colours = image.to_rgba(np.array(cells))
        for r, c in product(range(len(rows)), range(len(columns))) if wide >= 34 else ():
            value, (red, green, blue, _) = values[r][c], colours[r, c]
            ink = _ON_CELLS[int(0.3 * red + 0.59 * green + 0.11 * blue < 0.55)]
            axes.text(c, r, "-" if value is None else f"{100 * value:.1f}", ha="center", va="center",
                      color=DIM if value is None else ink)

    upright = 0 if level or not names else _LETTER * max(map(len, names))
    return Chart(title, description, 75 + upright + tall * len(rows), draw)


def _rows(axes: Axes, names: Sequence[str], x: Axis) -> None:
    """One named row per bar or interval, the first at the top, over a common x."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x")
    _ticks(axes, "x", x)


def interval_chart(title: str, rows: Sequence[tuple[str, Sequence[tuple[float, float, float]]]], kinds: Sequence[str],
                   *, description: str) -> Chart:
    """Shares with their intervals (share, low, high), per row one of each kind, over a common axis in per cent."""
    def draw(axes: Axes) -> None:
        dots = []
        for number in range(len(kinds)):
            shares, lows, highs = zip(*(values[number] for _, values in rows), strict=True)
            at = [row + (number - (len(kinds) - 1) / 2) / (len(kinds) + 1) for row in range(len(rows))]
            axes.hlines(at, lows, highs, _colour(number), linewidth=1.8)
            dots += axes.plot(shares, at, "o", color=_colour(number), markersize=6,
                              markerfacecolor=_colour(number) if number == 0 else GROUND)
        _rows(axes, [cut(name, 18) for name, _ in rows], Axis("accuracy, %", percent=True))
        _legend(axes, dots, kinds)

    return Chart(title, description, 85 + (9 * len(kinds) + 9) * len(rows), draw)


def stacked_bars(title: str, rows: Sequence[tuple[str, Sequence[float]]], parts: Sequence[str], *, label: str,
                 description: str) -> Chart:
    """A bar per row, made of parts that add up."""
    def draw(axes: Axes) -> None:
        bars, begin = [], [0.0] * len(rows)
        for number in range(len(parts)):
            width = [values[number] for _, values in rows]
            bars.append(axes.barh(range(len(rows)), width, 0.7, begin, color=_colour(number)))
            begin = [a + b for a, b in zip(begin, width, strict=True)]
        _rows(axes, [cut(name, 14) for name, _ in rows], Axis(label))
        _legend(axes, bars, parts)

    return Chart(title, description, 75 + _legend_height(parts) + 24 * len(rows), draw)


def surface(title: str, places: Sequence[float], values: Sequence[Sequence[float]], *, labels: tuple[str, str, str],
            description: str) -> Chart:
    """Values [y][x] over the same places on both axes as colours; `labels` of x, y and values."""
    def draw(axes: Axes) -> None:
        half = (places[-1] - places[0]) / (len(places) - 1) / 2
        ends = places[0] - half, places[-1] + half
        image = axes.imshow(values, cmap="Blues", origin="lower", extent=(*ends, *ends), interpolation="none")
        _ticks(axes, "x", Axis(labels[0]))
        _ticks(axes, "y", Axis(labels[1]))
        bar = axes.figure.colorbar(image, label=labels[2])
        bar.outline.set_visible(False)

    return Chart(title, description, 320, draw)
