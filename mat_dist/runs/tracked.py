"""A reporter that also tells trackers, and the choice of a rank's reporter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mat_dist.config.schema import Config
from mat_dist.runs.reporter import JsonlReporter, NullReporter, Reporter
from mat_dist.runs.result_table import Result
from mat_dist.runs.session import Run
from mat_dist.runs.trackers import Picture, Tracker, choose_trackers, series


def open_reporter(run: Run, config: Config) -> Reporter:
    """The reporter of a rank. Rank 0: files and console, and the trackers of the section `log`; others: none."""
    if not run.mesh.placement.is_lead:
        return NullReporter()
    folder = run.folder.path
    files = JsonlReporter(folder, console=config.log.console, attempt=run.attempt)
    trackers = choose_trackers(folder, config.log, config.model_dump(mode="json"))
    return TrackedReporter(files, trackers) if trackers else files


class TrackedReporter:
    """`inner`, and the same numbers to trackers. One that fails is left out with a note; the run goes on."""

    wants_pictures = True

    def __init__(self, inner: Reporter, trackers: Sequence[Tracker]) -> None:
        self._inner, self._trackers = inner, list(trackers)
        self._peers: tuple[str, ...] = ()
        self._sent: tuple[int, set[str]] = (-1, set())  # the newest step, and what was sent of it

    def start(self, total_steps: int, peers: Sequence[str], *, first_step: int = 0) -> None:
        """Raises EnvironmentFault for a tracker that cannot begin."""
        self._peers = tuple(peers)
        for tracker in self._trackers:
            tracker.start(first_step)
        self._inner.start(total_steps, peers, first_step=first_step)

    def log(self, record: Mapping[str, Any]) -> None:
        try:
            self._inner.log(record)
        finally:
            self._scalars(record)

    def epoch(self, record: Mapping[str, Any]) -> None:
        try:
            self._inner.epoch(record)
        finally:
            self._scalars(record)

    def pictures(self, step: int, group: str, pictures: Sequence[Picture]) -> None:
        self._inner.pictures(step, group, pictures)
        self._each(lambda tracker: tracker.pictures(step, group, pictures))

    def note(self, text: str) -> None:
        self._inner.note(text)

    def table(self, rows: Sequence[Result]) -> None:
        self._inner.table(rows)

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._inner.close()

    def _scalars(self, record: Mapping[str, Any]) -> None:
        """The record of an epoch repeats the rate of a step's: a point is sent once."""
        step = record["step"]
        if step != self._sent[0]:
            self._sent = (step, set())
        new = {tag: value for tag, value in series(record, self._peers).items() if tag not in self._sent[1]}
        self._sent[1].update(new)
        self._each(lambda tracker: tracker.scalars(step, new))

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                tell(tracker)
            except Exception as error:  # of a library that only mirrors: it must not stop the training
                self._trackers.remove(tracker)
                text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                self._inner.note(f"warning: {tracker.name} gets no more numbers of this attempt: {text}")
