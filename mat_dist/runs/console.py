"""What the console shows while training: a live table, plain lines, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from mat_dist.runs import rates
from mat_dist.runs.metrics import per_peer
from mat_dist.runs.result_table import print_table

ConsoleMode = Literal["auto", "live", "plain", "off"]
REFRESHES_PER_S = 4  # more costs CPU time that the ranks need


class Screen(Protocol):
    """Shows records; `eta_s` is None while unknown."""

    def start(self, total_steps: int, peers: Sequence[str], first_step: int) -> None: ...
    def step(self, record: Mapping[str, Any], eta_s: float | None) -> None: ...
    def epoch(self, record: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...
    def table(self, table: Table) -> None: ...
    def close(self) -> None: ...


def choose_screen(mode: ConsoleMode, console: Console | None = None) -> Screen:
    """`auto`: live on a terminal, else plain. `live` without a terminal is plain too: a log file cannot be redrawn.

    What counts is the stream itself: CI services that set FORCE_COLOR do not thereby have a screen.
    """
    console = console if console is not None else Console(force_terminal=sys.stdout.isatty())
    if mode == "off":
        return NoScreen()
    redraws = console.is_terminal and not console.is_dumb_terminal
    return LiveScreen(console) if redraws and mode != "plain" else PlainScreen(console)


class NoScreen:
    """Shows nothing."""

    def start(self, total_steps: int, peers: Sequence[str], first_step: int) -> None: ...
    def step(self, record: Mapping[str, Any], eta_s: float | None) -> None: ...
    def epoch(self, record: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...
    def table(self, table: Table) -> None: ...
    def close(self) -> None: ...


def step_line(record: Mapping[str, Any], total_steps: int, peers: int, eta_s: float | None) -> str:
    """`step 150/300  epoch 5.0  loss 1.234 1.198  3,210 images/s  eta 0:00:42`."""
    parts = [f"step {record['step']}/{total_steps}"]
    if record.get("epoch") is not None:
        parts.append(f"epoch {record['epoch']:.1f}")
    if record.get("loss") is not None:
        parts.append(f"loss {rates.losses(per_peer(record['loss'], peers))}")
    speed = record.get("images_per_s")
    if speed is not None:
        parts.append(f"{rates.rate(speed)} images/s")
    parts.append(f"eta {rates.duration(eta_s)}")
    return "  ".join(parts)


def epoch_line(record: Mapping[str, Any], peers: int) -> str:
    """`epoch 5  clean 91.2 90.4 %  robust 71.0 70.2 %`, with the averaged weights where there are any."""
    parts = [f"epoch {record['epoch']:g}"]
    for key, label in (("clean_acc", "clean"), ("robust_acc", "robust"), ("ema_clean_acc", "EMA clean"),
                       ("ema_robust_acc", "EMA robust")):
        if record.get(key) is not None:
            parts.append(f"{label} {rates.percents(per_peer(record[key], peers))} %")
    return "  ".join(parts)


class PlainScreen:
    """A line per log step and per epoch."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._total, self._peers = 0, 0

    def start(self, total_steps: int, peers: Sequence[str], first_step: int) -> None:
        self._total, self._peers = total_steps, len(peers)

    def step(self, record: Mapping[str, Any], eta_s: float | None) -> None:
        self.note(step_line(record, self._total, self._peers, eta_s))

    def epoch(self, record: Mapping[str, Any]) -> None:
        self.note(epoch_line(record, self._peers))

    def note(self, text: str) -> None:
        print(text, file=self._console.file, flush=True)

    def table(self, table: Table) -> None:
        print_table(table, self._console)
        self._console.file.flush()

    def close(self) -> None: ...


class LiveScreen:
    """A table that is redrawn in place, a row per peer, above a progress bar.

    Loss and speed are those of the last log step. Clean and robust accuracy are those of the last evaluation: what
    a training step sees of them is a diagnostic, one batch in train mode.
    """

    COLUMNS = (("loss", "loss", rates.number), ("images/s", "images_per_s", rates.rate),
               ("clean %", "clean_acc", rates.percent), ("robust %", "robust_acc", rates.percent))
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
        self._progress.update(self._task, description=f"epoch {self._epoch}  eta {rates.duration(left)}")
        return Group(table, self._progress)

    def _take(self, record: Mapping[str, Any], keys: Sequence[str]) -> None:
        """Keep what `record` holds of `keys`; what it does not hold stays as it was."""
        for key in keys:
            if record.get(key) is not None:
                self._values[key] = per_peer(record[key], len(self._peers))
