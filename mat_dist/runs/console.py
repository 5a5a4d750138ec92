"""What the console shows: a live table, plain lines or nothing, the table of results, and how numbers are written."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

ConsoleMode = Literal["auto", "live", "plain", "off"]
REFRESHES_PER_S = 4  # more costs CPU time that the ranks need
PLAIN_WIDTH = 100  # columns of a table that goes to a file or pipe
MOST_VALUES = 8  # of a line; more peers are summed up

# ------------------------------------------------------------------------------------------------ numbers


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


# ------------------------------------------------------------------------------------------------ table of results


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One evaluated target; shares in [0, 1]."""

    target: str  # name of a peer, or `ensemble`
    weights: str  # `raw` or `EMA`
    checkpoint: str  # `best` or `last`
    clean_acc: float
    robust_acc: float | None  # under PGD of every threat: their union; None where it was not attacked
    pgd_steps: int
    images: int
    threat_acc: Mapping[str, float] = field(default_factory=dict)  # under PGD of each threat by itself


def results_table(rows: Sequence[TableRow]) -> Table:
    """A row per result. Raises ValueError for different numbers of steps, which one column cannot hold."""
    steps = sorted({row.pgd_steps for row in rows})
    if len(steps) > 1:
        raise ValueError(f"one table for PGD with {steps} steps")
    table = Table(title="Accuracy on the test set")
    for name in ("target", "weights", "checkpoint"):
        table.add_column(name, no_wrap=True)
    for name in ("clean %", f"PGD-{steps[0]} %" if steps else "PGD %", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.target, row.weights, row.checkpoint, percent(row.clean_acc, 2), percent(row.robust_acc, 2),
                      str(row.images))
    return table


def own_console() -> Console:
    """Standard output. The stream itself counts: CI services that set FORCE_COLOR do not thereby have a screen."""
    return Console(file=sys.stdout, force_terminal=sys.stdout.isatty())


def print_table(table: Table, screen: Console | None = None) -> None:
    """Print on `screen`; where that is no terminal, without ANSI codes and at least 100 columns wide."""
    screen = screen or own_console()
    if not screen.is_terminal:
        screen = Console(file=screen.file, width=max(PLAIN_WIDTH, screen.width), color_system=None,
                         force_terminal=False, force_interactive=False)
    screen.print(table)


# ------------------------------------------------------------------------------------------------ screens


class Screen:
    """Shows nothing; the base of those that show records. `eta_s` is None while unknown."""

    def start(self, total_steps: int, peers: Sequence[str], first_step: int) -> None: ...
    def step(self, record: Mapping[str, Any], eta_s: float | None) -> None: ...
    def epoch(self, record: Mapping[str, Any]) -> None: ...
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


class PlainScreen(Screen):
    """A line per log step and per epoch."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._total, self._peers = 0, 0

    def start(self, total_steps: int, peers: Sequence[str], first_step: int) -> None:
        self._total, self._peers = total_steps, len(peers)

    def step(self, record: Mapping[str, Any], eta_s: float | None) -> None:
        """`step 150/300  epoch 5.0  loss 1.234 1.198  3,210 images/s  eta 0:00:42`."""
        parts = [f"step {record['step']}/{self._total}"]
        if record.get("epoch") is not None:
            parts.append(f"epoch {record['epoch']:.1f}")
        if record.get("loss") is not None:
            parts.append(f"loss {on_one_line(per_peer(record['loss'], self._peers), number)}")
        if record.get("images_per_s") is not None:
            parts.append(f"{rate(record['images_per_s'])} images/s")
        self.note("  ".join([*parts, f"eta {duration(eta_s)}"]))

    def epoch(self, record: Mapping[str, Any]) -> None:
        """`epoch 5  clean 91.2 90.4 %  robust 71.0 70.2 %`, with the averaged weights where there are any."""
        parts = [f"epoch {record['epoch']:g}"]
        for key, label in (("clean_acc", "clean"), ("robust_acc", "robust"), ("ema_clean_acc", "EMA clean"),
                           ("ema_robust_acc", "EMA robust")):
            if record.get(key) is not None:
                parts.append(f"{label} {on_one_line(per_peer(record[key], self._peers), percent)} %")
        self.note("  ".join(parts))

    def note(self, text: str) -> None:
        print(text, file=self._console.file, flush=True)

    def table(self, table: Table) -> None:
        print_table(table, self._console)
        self._console.file.flush()


class LiveScreen(Screen):
    """A table that is redrawn in place, a row per peer, above a progress bar.

    Loss and speed are those of the last log step. Clean and robust accuracy are those of the last evaluation: what
    a training step sees of them is a diagnostic, one batch in train mode.
    """

    COLUMNS = (("loss", "loss", number), ("images/s", "images_per_s", rate),
               ("clean %", "clean_acc", percent), ("robust %", "robust_acc", percent))
    OF_STEPS, OF_EPOCHS = ("loss", "images_per_s"), ("clean_acc", "robust_acc")

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._peers: tuple[str, ...] = ()
        self._values: dict[str, list[Any]] = {}
        self._eta_s: float | None = None
        self._eta_at = 0.0
        self._epoch = "-"
        self._progress = Progress(BarColumn(), TaskProgressColumn(),
                                  TextColumn("step {task.completed}/{task.total}  {task.description}"),
                                  console=console, auto_refresh=False)
        self._task = self._progress.add_task("", total=None)
        self._live: Live | None = None

    def start(self, total_steps: int, peers: Sequence[str], first_step: int) -> None:
        self.close()
        self._peers = tuple(peers)
        self._values = {key: [None] * len(peers) for _, key, _ in self.COLUMNS}
        self._progress.update(self._task, total=total_steps, completed=first_step)
        self._live = Live(console=self._console, refresh_per_second=REFRESHES_PER_S, get_renderable=self.render)
        self._live.start(refresh=True)

    def step(self, record: Mapping[str, Any], eta_s: float | None) -> None:
        self._eta_s, self._eta_at = eta_s, self._clock()
        if record.get("epoch") is not None:
            self._epoch = f"{record['epoch']:.1f}"
        self._take(record, self.OF_STEPS)
        self._progress.update(self._task, completed=record["step"])

    def epoch(self, record: Mapping[str, Any]) -> None:
        self._take(record, self.OF_EPOCHS)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def table(self, table: Table) -> None:
        self.close()  # results stand below the last state of the training, not above it
        print_table(table, self._console)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def render(self) -> Group:
        """Called by the redrawing thread: the table and the bar as they are now."""
        table = Table()
        table.add_column("peer", no_wrap=True)
        for heading, _, _ in self.COLUMNS:
            table.add_column(heading, justify="right", no_wrap=True)
        for index, name in enumerate(self._peers):
            table.add_row(name, *(form(self._values[key][index]) for _, key, form in self.COLUMNS))
        left = None if self._eta_s is None else max(self._eta_s - (self._clock() - self._eta_at), 0)
        self._progress.update(self._task, description=f"epoch {self._epoch}  eta {duration(left)}")
        return Group(table, self._progress)

    def _take(self, record: Mapping[str, Any], keys: Sequence[str]) -> None:
        """Keep what `record` holds of `keys`; what it does not hold stays as it was."""
        for key in keys:
            if record.get(key) is not None:
                self._values[key] = per_peer(record[key], len(self._peers))
