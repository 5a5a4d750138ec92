"""What the console shows: a live view, plain lines or nothing; tables that fit its width; how numbers are written."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

ConsoleMode = Literal["auto", "live", "plain", "off"]
Tally = Mapping[tuple[str, str], Mapping[str, tuple[int, int]]]  # (target, threat) -> attack -> survivors, images
REFRESHES_PER_S = 4  # more costs CPU time that the ranks need
PLAIN_WIDTH = 10_000  # of a file or pipe: a table there is as wide as it needs to be
LONG_WORD = 20  # longer ones may be cut into lines, where a column is not of numbers
MOST_VALUES = 8  # of a line, and rows of a table; more peers are summed up
# A plain line about work that goes on: at most so often in seconds, and in shares of the time that it took by now.
QUIET_S, QUIET_SHARE, MOST_QUIET_S = 5.0, 0.05, 300.0

# ------------------------------------------------------------------------------------------------ numbers


def counted(values: Iterable[object]) -> str:
    """Equal values counted: 3 × resnet18, wrn_28_10."""
    return ", ".join(f"{n} × {value}" if n > 1 else str(value) for value, n in Counter(map(str, values)).items())


def duration(seconds: float | None) -> str:
    """`0:00:42`, `27:46:40`; `-:--:--` where unknown. Rounded to whole seconds."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def rate(images_per_s: float | None) -> str:
    """`3,210`, or `8.25` below 100 images/s; `-` where unknown."""
    if images_per_s is None or not math.isfinite(images_per_s):
        return "-"
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage without the sign; `-` where it was not measured."""
    return "-" if share is None else f"{100 * share:.{digits}f}"


def number(value: float | None) -> str:
    """A loss with three decimals, three significant digits in scientific notation from 1000; `-` where unknown."""
    if value is None:
        return "-"
    return f"{value:.3f}" if not math.isfinite(value) or abs(value) < 1000 else f"{value:.2e}"


def on_one_line(values: Sequence[float | None], form: Callable[[float | None], str]) -> str:
    """The values of all peers; of many peers the smallest, mean and largest."""
    if len(values) <= MOST_VALUES:
        return " ".join(form(value) for value in values)
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < len(values):
        return f"not finite or unknown for {len(values) - len(known)} of {len(values)} peers"
    mean = math.fsum(known) / len(known)
    return f"{form(min(known))}..{form(max(known))} (mean {form(mean)} of {len(known)} peers)"


def per_peer(value: Any, peers: int) -> list[Any]:
    """A list with an entry per peer as it is; one value for the whole cohort (or None) repeated for each."""
    if isinstance(value, (list, tuple)):
        if len(value) != peers:
            raise ValueError(f"{len(value)} values for {peers} peers")
        return list(value)
    return [value] * peers


# ------------------------------------------------------------------------------------------------ tables


def new_table(title: str | None, texts: Iterable[str], numbers: Iterable[str]) -> Table:
    """An empty table; texts to the left, numbers to the right, none is wrapped."""
    table = Table(title=title)
    for name in texts:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def fitted(table: Table, console: Console) -> RenderableType:
    """The table; where its columns do not fit, a paragraph per row, in which every value stands behind its heading."""
    options, needed = console.options.update(max_width=PLAIN_WIDTH), 1
    for column in table.columns:
        sizes = [Measurement.get(console, options, _as_text(cell)) for cell in (column.header, *column.cells)]
        needed += 3 + max(size.maximum if column.no_wrap else min(size.minimum, LONG_WORD) for size in sizes)
    if needed <= console.width:
        return table
    rows = [] if table.title is None else [_as_text(table.title)]
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        pairs = [Text.assemble(*(_as_text(part) for part in (column.header, " ", cell)))
                 for column, cell in zip(table.columns[1:], cells[1:], strict=True) if str(cell)]
        first = _as_text(cells[0])
        first.stylize("bold")
        rows.append(packed([first, *pairs], console.width))
    return Group(*rows)


def packed(parts: Sequence[Text] | str, width: int) -> Text:
    """Parts, or a text's parts that two blanks divide, on as few lines as hold them; a number stays with its name."""
    lines: list[Text] = []
    for part in [Text(part, overflow="fold") for part in parts.split("  ")] if isinstance(parts, str) else parts:
        if lines and lines[-1].cell_len + 2 + part.cell_len <= width:
            lines[-1].append("  ").append(part)
        else:
            lines.append(part)
    return Text("\n", overflow="fold").join(lines)


def _as_text(cell: Any) -> Text:
    return cell.copy() if isinstance(cell, Text) else Text.from_markup(str(cell), overflow="fold")


def own_console() -> Console:
    """Standard output. The stream itself counts: CI services that set FORCE_COLOR do not thereby have a screen."""
    return Console(file=sys.stdout, force_terminal=sys.stdout.isatty())


def show_table(table: Table, screen: Console | None = None) -> None:
    """Print on `screen` (standard output); where that is no terminal, without ANSI codes and as wide as needed."""
    screen = screen or own_console()
    if not screen.is_terminal:
        screen = Console(file=screen.file, width=PLAIN_WIDTH, color_system=None, force_terminal=False,
                         force_interactive=False)
    screen.print(fitted(table, screen))


# ------------------------------------------------------------------------------------------------ what was measured


def accuracy_rows(record: Mapping[str, Any], peers: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """The accuracies of an epoch record by row: each peer and the ensemble, with raw and with averaged weights."""
    found: dict[str, dict[str, float | None]] = {}
    for prefix, mark in (("", ""), ("ema_", " EMA")):
        columns = {key: per_peer(values, len(peers)) for key, values in _shown(record, prefix).items()}
        found |= {f"{name}{mark}": {key: values[index] for key, values in columns.items()}
                  for index, name in enumerate(peers) if columns["clean"][index] is not None}
        if whole := record.get(f"{prefix}ensemble"):
            found[f"ensemble{mark}"] = _shown(whole, "")
    return found


def _shown(told: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """By the name that a reader sees: clean, each threat, and their union where there are several."""
    threats = told.get(f"{prefix}threat_acc") or {}
    union = {"union": told[f"{prefix}robust_acc"]} if len(threats) > 1 else {}
    return {"clean": told.get(f"{prefix}clean_acc"), **threats, **union}


def epoch_lines(record: Mapping[str, Any], peers: Sequence[str]) -> list[str]:
    """`epoch 5, PGD-10  north  clean 91.2  linf 8/255 50.0 %`: a line per row; of many peers one with their spread."""
    lead = f"epoch {record['epoch']:g}" + (f", {record['attack']}" if "attack" in record else "")
    rows = accuracy_rows(record, peers)
    texts = {name: "  ".join(f"{key} {percent(value)}" for key, value in one.items()) for name, one in rows.items()}
    for mark in ("", " EMA") if len(peers) > MOST_VALUES else ():
        many = [rows[name + mark] for name in peers if texts.pop(name + mark, None) is not None]
        if many:
            texts[f"{len(many)} peers{mark}"] = "  ".join(
                f"{key} {on_one_line([one[key] for one in many], percent)}" for key in many[0])
    lines = [f"{lead}  {name}  {text} %" for name, text in texts.items()]
    if best := record.get("best"):
        lines.append(f"{lead}  best so far: step {best['step']}, mean {percent(best['score'])} %")
    return lines


def tally_table(tally: Tally) -> Table:
    """Survivors of an evaluation until now: a row per target and threat, after each attack in their order."""
    names = list(dict.fromkeys(name for row in tally.values() for name in row))
    table = new_table("Images that hold, of those attacked", ("target", "threat"), names)
    for key, row in tally.items():
        table.add_row(*key, *("/".join(map(str, row[name])) if name in row else "" for name in names))
    return table


# ------------------------------------------------------------------------------------------------ screens


class Screen:
    """Shows nothing; the base of those that show records. `eta_s` is None while unknown."""

    def start(self, total_steps: int, peers: Sequence[str], first_step: int) -> None: ...
    def step(self, record: Mapping[str, Any], eta_s: float | None) -> None: ...
    def epoch(self, record: Mapping[str, Any]) -> None: ...
    def status(self, text: str, elapsed_s: float = 0.0, eta_s: float | None = None,
               tally: Tally | None = None) -> None: ...
    def note(self, text: str) -> None: ...
    def table(self, table: Table) -> None: ...
    def close(self) -> None: ...


def choose_screen(mode: ConsoleMode, console: Console | None = None) -> Screen:
    """`auto`: live on a terminal, else plain. `live` without a terminal is plain too: a log file cannot be redrawn."""
    console = console or own_console()
    if mode == "off":
        return Screen()
    redraws = console.is_terminal and not console.is_dumb_terminal
    return LiveScreen(console) if redraws and mode != "plain" else PlainScreen(console)


def step_parts(record: Mapping[str, Any], total: int) -> list[str]:
    """Of a step's record: `step 150/300`, `epoch 5.0`, `3,210 images/s`, `lr 0.1`, as far as it has them."""
    lr = record.get("lr")
    rates = list(dict.fromkeys(lr if isinstance(lr, (list, tuple)) else [lr]))
    return [f"step {record['step']}/{total}",
            *([f"epoch {record['epoch']:.1f}"] if record.get("epoch") is not None else []),
            *([f"{rate(record['images_per_s'])} images/s"] if record.get("images_per_s") is not None else []),
            *([f"lr {on_one_line(rates, lambda value: f'{value:.3g}')}"] if lr is not None else [])]


class PlainScreen(Screen):
    """A line per log step, lines per evaluation, and now and then one about what takes long."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._total, self._peers, self._told = 0, tuple[str, ...](), clock()

    def start(self, total_steps: int, peers: Sequence[str], first_step: int) -> None:
        self._total, self._peers = total_steps, tuple(peers)

    def step(self, record: Mapping[str, Any], eta_s: float | None) -> None:
        """`step 150/300  epoch 5.0  3,210 images/s  lr 0.1  loss north 1.234 south 1.198  eta 0:00:42`."""
        parts = step_parts(record, self._total)
        if record.get("loss") is not None:
            values = per_peer(record["loss"], len(self._peers))
            named = " ".join(f"{name} {number(value)}" for name, value in zip(self._peers, values, strict=True))
            parts.append(f"loss {named if len(values) <= MOST_VALUES else on_one_line(values, number)}")
        self.note("  ".join([*parts, f"eta {duration(eta_s)}"]))

    def epoch(self, record: Mapping[str, Any]) -> None:
        for line in epoch_lines(record, self._peers):
            self.note(line)

    def status(self, text: str, elapsed_s: float = 0.0, eta_s: float | None = None,
               tally: Tally | None = None) -> None:
        pause = min(max(QUIET_S, QUIET_SHARE * elapsed_s), MOST_QUIET_S)
        if text and self._clock() - self._told >= pause:
            self.note(f"{text}  {duration(elapsed_s)}, eta {duration(eta_s)}")

    def note(self, text: str) -> None:
        self._told = self._clock()
        print(text, file=self._console.file, flush=True)

    def table(self, table: Table) -> None:
        show_table(table, self._console)
        self._console.file.flush()


class LiveScreen(Screen):
    """A view that is redrawn in place: how far the run is, what goes on, and a table with a row per peer.

    Loss and speed are those of the last log step. Accuracies are those of the last evaluation: what a training step
    sees of them is a diagnostic, one batch in train mode. Those of each epoch stay above the view. Where nothing was
    trained, as in an evaluation, the table has the survivors.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._peers: tuple[str, ...] = ()
        self._losses: list[Any] = []
        self._accuracies: dict[str, dict[str, float | None]] = {}
        self._total = self._step = 0
        self._parts: list[str] = []
        self._best = self._doing = ""
        # When the run ends, what goes on began, and when it ends, by the clock.
        self._end: float | None = None
        self._doing_since = 0.0
        self._doing_end: float | None = None
        self._tally: Tally = {}
        self._live: Live | None = None

    def start(self, total_steps: int, peers: Sequence[str], first_step: int) -> None:
        self.close()
        self._peers, self._losses = tuple(peers), [None] * len(peers)
        self._total, self._step = total_steps, first_step
        self._parts = [f"step {first_step}/{total_steps}"]
        self._live = Live(console=self._console, refresh_per_second=REFRESHES_PER_S, get_renderable=self.render)
        self._live.start(refresh=True)

    def step(self, record: Mapping[str, Any], eta_s: float | None) -> None:
        self._end, self._step = self._time_in(eta_s), record["step"]
        self._parts = step_parts(record, self._total)
        if record.get("loss") is not None:
            self._losses = per_peer(record["loss"], len(self._peers))

    def epoch(self, record: Mapping[str, Any]) -> None:
        self._accuracies = accuracy_rows(record, self._peers)
        *lines, last = epoch_lines(record, self._peers) or [""]
        self._best = last.partition("  ")[2] if record.get("best") else ""
        for line in lines if self._best else [*lines, last]:
            self._console.print(packed(line, self._console.width))

    def status(self, text: str, elapsed_s: float = 0.0, eta_s: float | None = None,
               tally: Tally | None = None) -> None:
        self._doing, self._doing_since, self._doing_end = text, self._clock() - elapsed_s, self._time_in(eta_s)
        if not self._peers:
            self._tally = {key: dict(row) for key, row in (tally or {}).items()}  # the table is drawn by a thread

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        self.close()  # results stand below the last state of the training, not above it
        show_table(table, self._console)

    def close(self) -> None:
        if self._live is not None:
            self._doing, self._tally = "", {}
            self._live.stop()
            self._live = None

    def render(self) -> Group:
        """Called by the redrawing thread: everything as it is now. What is cut on a low screen is the table's end."""
        parts: list[RenderableType] = []
        width = self._console.width
        if self._total:
            bar = ProgressBar(self._total, self._step, width=min(40, width))
            parts.append(Padding(bar, 0, expand=False))  # with a line end
            parts.append(packed("  ".join(filter(None, [*self._parts, self._eta(self._end), self._best])), width))
        if self._doing:
            elapsed = duration(self._clock() - self._doing_since)
            parts.append(packed("  ".join([self._doing, elapsed, self._eta(self._doing_end)]), width))
        table = self._table() if self._peers else tally_table(self._tally) if self._tally else None
        return Group(*parts, *([fitted(table, self._console)] if table else []))

    def _time_in(self, seconds: float | None) -> float | None:
        return None if seconds is None else self._clock() + seconds

    def _eta(self, end: float | None) -> str:
        return f"eta {duration(None if end is None else max(end - self._clock(), 0))}"

    def _table(self) -> Table:
        names = list(dict.fromkeys(name for row in self._accuracies.values() for name in row)) or ["clean"]
        table = new_table(None, ("peer",), ("loss", *(f"{name} %" for name in names)))
        losses = dict(zip(self._peers, self._losses, strict=True))
        for name in dict.fromkeys([*self._peers, *self._accuracies]):
            found = self._accuracies.get(name, {})
            table.add_row(name, number(losses[name]) if name in losses else "",
                          *(percent(found.get(key)) for key in names))
        return table
