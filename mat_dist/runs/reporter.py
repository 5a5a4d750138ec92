"""The reporter: one object that rank 0 tells everything, and one with the same verbs that is silent.

Train chooses once, `JsonlReporter(...) if mesh.placement.is_lead else NullReporter()`; the loop never asks for
its rank. Keys of a record are free, these have a meaning here: `step`, `epoch` (float), `loss`, `clean_acc`,
`robust_acc`, `ema_clean_acc`, `ema_robust_acc`, `lr` (a list with a number per peer, or one number for all),
`images_per_s` (clean images, once for the cohort). Shares are in [0, 1]; those of an epoch record were measured by
the evaluator. A row of summary.csv takes the loss, rate and speed that its epoch record lacks from the last log step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from mat_dist.runs.rates import eta_seconds
from mat_dist.runs.metrics import append_text, drop_partial_line, json_line, start_summary, summary_rows
from mat_dist.runs.result_table import Result, results_table
from mat_dist.runs.console import ConsoleMode, choose_screen
from mat_dist.runs.trackers import Picture


class Reporter(Protocol):
    """Where the numbers of a run go."""

    wants_pictures: bool

    def start(self, total_steps: int, peers: Sequence[str], *, first_step: int = 0) -> None:
        """Begin: steps of the whole run, peer names in peer order, steps that earlier attempts have done."""

    def log(self, record: Mapping[str, Any]) -> None:
        """A log step. Needs `step`."""

    def epoch(self, record: Mapping[str, Any]) -> None:
        """The end of an epoch, after its evaluation if there was one. Needs `epoch` and `step`."""

    def note(self, text: str) -> None:
        """A line for the person at the console."""

    def pictures(self, step: int, group: str, pictures: Sequence[Picture]) -> None:
        """Pictures of an evaluation; made only where they are wanted."""

    def table(self, rows: Sequence[Result]) -> None:
        """The final results."""

    def close(self) -> None:
        """Leave the console as it was. May be called twice."""


class NullReporter:
    """The reporter of all ranks but the first."""

    wants_pictures = False

    def start(self, total_steps: int, peers: Sequence[str], *, first_step: int = 0) -> None: ...
    def log(self, record: Mapping[str, Any]) -> None: ...
    def epoch(self, record: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...
    def pictures(self, step: int, group: str, pictures: Sequence[Picture]) -> None: ...
    def table(self, rows: Sequence[Result]) -> None: ...
    def close(self) -> None: ...


class JsonlReporter:
    """Writes `metrics.jsonl` and `summary.csv` into the run folder and shows progress on the console.

    Both files are appended to, so a resumed run continues them; `attempt` tells its records from earlier ones of the
    same step, the highest attempt counts.

    Args:
        folder: the run folder; it exists.
        console: `live`, `plain`, `off`, or `auto`: live where standard output is a terminal.
        attempt: number of this start of the run, from 1.
        screen: the rich console to use instead of standard output.
        clock: monotonic seconds.

    Raises:
        OutputError: (also from `log` and `epoch`) the folder cannot be written.
    """

    wants_pictures = False

    def __init__(self, folder: Path | str, *, console: ConsoleMode = "auto", attempt: int = 1,
                 screen: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = Path(folder) / "metrics.jsonl"
        self._summary = Path(folder) / "summary.csv"
        drop_partial_line(self._metrics)
        start_summary(self._summary)
        self._screen = choose_screen(console, screen)
        self._attempt, self._clock = attempt, clock
        self._total, self._first, self._began = 0, 0, clock()
        self._peers: tuple[str, ...] = ()
        self._last: dict[str, Any] = {}

    def start(self, total_steps: int, peers: Sequence[str], *, first_step: int = 0) -> None:
        self._total, self._first, self._began = total_steps, first_step, self._clock()
        self._peers = tuple(peers)
        self._screen.start(total_steps, peers, first_step)

    def log(self, record: Mapping[str, Any]) -> None:
        append_text(self._metrics, json_line({"kind": "step", "attempt": self._attempt, **record}))
        self._last = {key: record[key] for key in ("loss", "lr", "images_per_s") if key in record}
        elapsed_s = self._clock() - self._began
        self._screen.step(record, eta_seconds(record["step"], self._total, self._first, elapsed_s))

    def epoch(self, record: Mapping[str, Any]) -> None:
        record = {"attempt": self._attempt, **record}
        append_text(self._metrics, json_line({"kind": "epoch", **record}))
        append_text(self._summary, summary_rows({**self._last, **record}, self._peers))
        self._screen.epoch(record)

    def note(self, text: str) -> None:
        self._screen.note(text)

    def pictures(self, step: int, group: str, pictures: Sequence[Picture]) -> None:
        """The files have none: `python -m mat_dist.report` makes them."""

    def table(self, rows: Sequence[Result]) -> None:
        self._screen.table(results_table(rows))

    def close(self) -> None:
        self._screen.close()
