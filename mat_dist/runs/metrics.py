"""What rank 0 tells of a run: the reporter, and its files metrics.jsonl and summary.csv.

Keys of a record are free, these have a meaning here: `step`, `epoch` (float), `loss`, `clean_acc`, `robust_acc`,
`ema_clean_acc`, `ema_robust_acc`, `lr` (a list with a number per peer, or one number for all), `images_per_s` (clean
images, once for the cohort). Shares are in [0, 1]; those of an epoch record were measured by the evaluator, by `attack`
(PGD-10): `threat_acc` and `ema_threat_acc` have a list for each threat, `robust_acc` is under all threats at once,
which is their union where there are several. A row of summary.csv takes the loss, rate and speed that its epoch record
lacks from the last log step.
"""

from __future__ import annotations

import csv
import io
import json
import math
import mmap
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mat_dist.errors import EnvironmentFault, OutputError
from mat_dist.runs.console import ConsoleMode, Screen, Tally, choose_screen, per_peer
from mat_dist.runs.files import reported

SUMMARY_COLUMNS = ("epoch", "step", "attempt", "peer", "loss", "clean_acc", "robust_acc", "ema_clean_acc",
                   "ema_robust_acc", "images_per_s", "lr")
SIDE = 96  # smaller pictures are enlarged by a whole factor to about this many pixels
_MIB = 1 << 20
PER_RANK = frozenset({"phases_s", "wait_share"})  # lists with an entry per rank; all others are per peer
NO_SERIES = frozenset({"step", "attempt"})
Callbacks = Mapping[str, Callable[[Any], object] | None]  # by event, see Reporter.tell


@dataclass(frozen=True)
class Picture:
    """A clean image, a perturbation as an image (grey: no change), and the AE; (C, H, W) in [0, 1], and in words."""

    clean: Tensor
    perturbation: Tensor
    adversarial: Tensor
    caption: str

    def side_by_side(self) -> Tensor:
        """The three in a row -> uint8 (3, H, 3 W), as `to_see`."""
        row = [to_see(one) for one in (self.clean, self.perturbation, self.adversarial)]
        return torch.cat(row, dim=2).expand(3, -1, -1)


def to_see(image_CHW: Tensor) -> Tensor:
    """An image in [0, 1] -> uint8 (3 or 1, H, W) on the CPU, enlarged; all but three channels: their mean, in grey."""
    image_CHW = image_CHW.detach().to("cpu", torch.float32)
    if len(image_CHW) != 3:
        image_CHW = image_CHW.mean(0, keepdim=True)
    factor = max(round(SIDE / max(image_CHW.shape[1:])), 1)
    levels = (image_CHW.clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


class Tracker:
    """Where numbers go besides the run folder."""

    name, help = "", ""  # help: what to do where it cannot begin

    def start(self, first_step: int) -> None:
        """Begin after `first_step` steps: what an earlier attempt sent of later ones does not count."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name."""

    def pictures(self, step: int, group: str, pictures: Sequence[Picture]) -> None:
        """Pictures of one evaluation."""

    def close(self) -> None:
        """Everything is out. May be called without `start`."""


class Reporter:
    """Where the numbers of a run go: here nowhere, as on all ranks but the first."""

    wants_pictures = False
    callbacks: Callbacks = MappingProxyType({})
    _screen = Screen()  # shows nothing

    def start(self, total_steps: int, peers: Sequence[str], *, first_step: int = 0,
              evaluations: Mapping[int, float] | None = None) -> None:
        """Begin: steps of the whole run, peer names in peer order, steps that earlier attempts have done; about how
        many steps' time each evaluation to come takes, by the step that it follows."""

    def log(self, record: Mapping[str, Any]) -> None:
        """A log step. Needs `step`."""

    def epoch(self, record: Mapping[str, Any]) -> None:
        """The end of an epoch, after its evaluation if there was one. Needs `epoch` and `step`."""

    def status(self, text: str, elapsed_s: float = 0.0, eta_s: float | None = None,
               tally: Tally | None = None) -> None:
        """What goes on besides steps, for so many seconds, and how many are left; empty: nothing."""
        self._screen.status(text, elapsed_s, eta_s)

    def note(self, text: str) -> None:
        """A line for the person at the console."""
        self._screen.note(text)

    def pictures(self, step: int, group: str, pictures: Sequence[Picture]) -> None:
        """Pictures of an evaluation; made only where they are wanted."""

    def tell(self, event: str, what: Any) -> None:
        """For the program that trains: a record of a `step` or an `evaluation`, the folder of a `checkpoint`. What its
        callback raises ends the run."""
        if (call := self.callbacks.get(event)) is not None:
            call(what)

    def table(self, table: Table) -> None:
        """The final results."""
        self._screen.table(table)

    def close(self) -> None:
        """Leave the console as it was. May be called twice."""
        self._screen.close()


class RunReporter(Reporter):
    """Writes `metrics.jsonl` and `summary.csv` into the run folder, shows progress on the console, and sends the same
    numbers to trackers; one that fails is left out with a note, and the run goes on.

    Both files are appended to, so a resumed run continues them; `attempt` (from 1) tells its records from earlier ones
    of the same step, the highest attempt counts.

    Args:
        folder: the run folder; it exists.
        console: `live`, `plain`, `off`, or `auto`: live where standard output is a terminal.
        screen: the rich console to use instead of standard output.
        clock: monotonic seconds.

    Raises OutputError, also from `log` and `epoch`, where the folder cannot be written; from `start` EnvironmentFault
    for a tracker that cannot begin.
    """

    def __init__(self, folder: Path | str, trackers: Sequence[Tracker] = (), *, console: ConsoleMode = "auto",
                 attempt: int = 1, screen: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = Path(folder) / "metrics.jsonl"
        self._summary = Path(folder) / "summary.csv"
        drop_partial_line(self._metrics)
        start_summary(self._summary)
        self._screen = choose_screen(console, screen)
        self._attempt, self._clock = attempt, clock
        self._total, self._first, self._began = 0, 0, clock()
        self._ahead: dict[int, float] = {}  # evaluations to come, in steps
        self._spent, self._spent_s = 0.0, 0.0  # on those of this attempt
        self._peers: tuple[str, ...] = ()
        self._last: dict[str, Any] = {}
        self.wants_pictures = bool(trackers)
        self._trackers = list(trackers)
        self._sent: tuple[int, set[str]] = (-1, set())  # the newest step, and what was sent of it

    def start(self, total_steps: int, peers: Sequence[str], *, first_step: int = 0,
              evaluations: Mapping[int, float] | None = None) -> None:
        for tracker in self._trackers:
            try:
                tracker.start(first_step)
            except Exception as error:  # not logged in, no network, no such project: types of the library's own
                raise EnvironmentFault(f"{tracker.name} cannot begin: {error}", "log.trackers", tracker.help) from error
        self._total, self._first, self._began = total_steps, first_step, self._clock()
        self._ahead = dict(evaluations or {})
        self._peers = tuple(peers)
        self._screen.start(total_steps, peers, first_step)

    def log(self, record: Mapping[str, Any]) -> None:
        try:
            append_text(self._metrics, json_line({"kind": "step", "attempt": self._attempt, **record}))
        finally:
            self._send(record)
        self._last = {key: record[key] for key in ("loss", "lr", "images_per_s") if key in record}
        elapsed_s = self._clock() - self._began
        self._screen.step(record, eta_seconds(record["step"], self._total, self._first, elapsed_s - self._spent_s,
                                              self._ahead, (self._spent, self._spent_s)))

    def epoch(self, record: Mapping[str, Any]) -> None:
        try:
            append_text(self._metrics, json_line({"kind": "epoch", "attempt": self._attempt, **record}))
            append_text(self._summary, summary_rows({**self._last, "attempt": self._attempt, **record}, self._peers))
        finally:
            self._send(record)
        self._spent += self._ahead.pop(record["step"], 0.0)
        self._spent_s += record.get("eval_s", 0.0)
        self._screen.epoch(record)

    def pictures(self, step: int, group: str, pictures: Sequence[Picture]) -> None:
        self._each(lambda tracker: tracker.pictures(step, group, pictures))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        super().close()

    def _send(self, record: Mapping[str, Any]) -> None:
        """The numbers of a record to the trackers. That of an epoch repeats the rate of a step's: a point is sent
        once."""
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
                self.note(f"warning: {tracker.name} gets no more numbers of this attempt: {text}")


# ------------------------------------------------------------------------------------------------ files that grow


def append_text(path: Path, text: str) -> None:
    """Append `text` in one write and flush it to the operating system. Raises OutputError, e.g. for a full disk."""
    with reported(path, len(text)), open(path, "a", encoding="utf-8", newline="") as file:
        file.write(text)


def drop_partial_line(path: Path) -> None:
    """Cut the file after its last line end: a process that was killed while writing leaves half a record."""
    with reported(path):
        if path.exists() and path.stat().st_size:
            with open(path, "r+b") as file:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    whole, keep = len(content), content.rfind(b"\n") + 1
                if keep < whole:
                    file.truncate(keep)


def json_line(record: Mapping[str, Any]) -> str:
    """`record` as one line of strict JSON.

    NaN and infinities, which JSON does not have, become null and are named under `non_finite`:
    `{"loss": [1.0, NaN]}` gives `{"loss": [1.0, null], "non_finite": {"loss.1": "nan"}}`. Raises TypeError for a value
    that is no number, text, truth value, None, list, tuple or mapping of those.
    """
    marks: dict[str, str] = {}
    plain = {key: _finite(value, key, marks) for key, value in record.items()}
    if marks:
        plain["non_finite"] = marks
    return json.dumps(plain, allow_nan=False, separators=(",", ":")) + "\n"


def _finite(value: Any, where: str, marks: dict[str, str]) -> Any:
    """`value` with non-finite numbers replaced by None; their places and kinds are added to `marks`."""
    if isinstance(value, float) and not math.isfinite(value):
        marks[where] = str(float(value))
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item, f"{where}.{key}", marks) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item, f"{where}.{index}", marks) for index, item in enumerate(value)]
    return value


def start_summary(path: Path) -> None:
    """Write the header of summary.csv once; a resumed run appends below what is there. Raises OutputError for other
    columns."""
    drop_partial_line(path)
    header = ",".join(SUMMARY_COLUMNS)
    with reported(path), open(path, "a+", encoding="utf-8", errors="replace") as file:
        file.seek(0)
        first = file.readline().strip()
        if not first:
            file.write(header + "\n")
    if first not in ("", header):
        raise OutputError("the columns are those of another version", str(path),
                          "continue this run with the version that began it, or choose another run.name")


def summary_rows(record: Mapping[str, Any], peers: Sequence[str]) -> str:
    """The CSV rows of an epoch record, one per peer; values that were not measured are empty."""
    text = io.StringIO()
    columns = {name: per_peer(record.get(name), len(peers)) for name in SUMMARY_COLUMNS if name != "peer"}
    columns["peer"] = list(peers)
    csv.writer(text, lineterminator="\n").writerows(zip(*(columns[name] for name in SUMMARY_COLUMNS), strict=True))
    return text.getvalue()


def series(record: Mapping[str, Any], peers: Sequence[str]) -> dict[str, float]:
    """The numbers of a record by name: `loss/<peer>`, `transfer/<peer>/<source>`, `phases_s/rank0/attack`, ...

    What is no number (None where nothing was measured) is left out.
    """
    return {tag: value for key, content in record.items() if key not in NO_SERIES
            for tag, value in _numbers(key, content, peers, key in PER_RANK)}


def _numbers(tag: str, value: Any, peers: Sequence[str], per_rank: bool) -> Iterator[tuple[str, float]]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield tag, float(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{tag}/{key}", item, peers, per_rank)
    elif isinstance(value, (list, tuple)):
        names = [f"rank{index}" for index in range(len(value))] if per_rank else [*peers, "clean"]
        for index, item in enumerate(value):  # a row of the transfer table ends with the clean accuracy
            yield from _numbers(f"{tag}/{names[index] if index < len(names) else index}", item, peers, per_rank)


# ------------------------------------------------------------------------------------------------ measurements


def images_per_second(images: int, seconds: float) -> float | None:
    """Clean images per second of wall time, counted once for the whole cohort; None where no time has passed."""
    return images / seconds if seconds > 0 else None


def eta_seconds(step: int, total_steps: int, first_step: int, elapsed_s: float,
                ahead: Mapping[int, float] | None = None, spent: tuple[float, float] = (0.0, 0.0)) -> float | None:
    """Seconds left after `step` of `total_steps`, at the mean speed since `first_step`, where this attempt began; None
    while it has done no step.

    Args:
        elapsed_s: wall seconds of the steps and their checkpoints, which will come again.
        ahead: about how many steps' time each evaluation to come takes.
        spent: that of those which were made, and the seconds that they really took.
    """
    done = step - first_step
    if done <= 0:
        return None
    step_s = elapsed_s / done
    evaluation_s = spent[1] / spent[0] if spent[0] > 0 else step_s
    return max(total_steps - step, 0) * step_s + sum((ahead or {}).values()) * evaluation_s


def device_memory(device: torch.device | str = "cpu") -> dict[str, float]:
    """Memory of this process on `device`, in MiB, since it started.

    CPU: `host_peak_mib`, the largest resident set. CUDA: also `device_allocated_mib` (tensors now), `device_peak_mib`
    (tensors, at most), `device_reserved_mib` (held by the allocator) and, where the driver's management library is
    installed, `device_busy_percent` (share of the last sample period with a kernel running).
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    values = {"host_peak_mib": round(peak * unit / _MIB, 1)}
    device = torch.device(device)
    if device.type == "cuda":
        for name, measure in (("allocated", torch.cuda.memory_allocated), ("peak", torch.cuda.max_memory_allocated),
                              ("reserved", torch.cuda.memory_reserved)):
            values[f"device_{name}_mib"] = round(measure(device) / _MIB, 1)
        with suppress(ModuleNotFoundError, RuntimeError):  # the library is absent; containers, MIG
            values["device_busy_percent"] = float(torch.cuda.utilization(device))
    return values
