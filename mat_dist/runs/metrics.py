"""Files of a run that grow: metrics.jsonl (a JSON object per line) and summary.csv (a row per epoch and peer)."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mat_dist.errors import OutputError

SUMMARY_COLUMNS = ("epoch", "step", "attempt", "peer", "loss", "clean_acc", "robust_acc", "ema_clean_acc",
                   "ema_robust_acc", "images_per_s", "lr")
_TAIL = 1 << 16  # bytes read at a time when looking for the last line end


def append_text(path: Path, text: str) -> None:
    """Append `text` in one write and flush it to the operating system.

    Raises:
        OutputError: the file cannot be written, e.g. a full disk.
    """
    try:
        with open(path, "a", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError as error:
        raise OutputError(f"cannot write: {error.strerror}", str(path),
                          "free space on the disk or make the run folder writable, then start the run again") from error


def drop_partial_line(path: Path) -> None:
    """Cut the file after its last line end: a process that was killed while writing leaves half a record."""
    if not path.exists():
        return
    try:
        with open(path, "r+b") as file:
            end = stop = file.seek(0, io.SEEK_END)
            keep = 0
            while stop > 0 and keep == 0:
                start = max(stop - _TAIL, 0)
                file.seek(start)
                found = file.read(stop - start).rfind(b"\n")
                keep = start + found + 1 if found >= 0 else 0
                stop = start
            if keep < end:
                file.truncate(keep)
    except OSError as error:
        raise OutputError(f"cannot write: {error.strerror}", str(path), "make the run folder writable") from error


def json_line(record: Mapping[str, Any]) -> str:
    """`record` as one line of strict JSON.

    NaN and infinities, which JSON does not have, become null and are named under `non_finite`:
    `{"loss": [1.0, NaN]}` gives `{"loss": [1.0, null], "non_finite": {"loss.1": "nan"}}`.

    Raises:
        TypeError: a value that is no number, text, truth value, None, list, tuple or mapping of those.
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


def per_peer(value: Any, peers: int) -> list[Any]:
    """A list with an entry per peer as it is; one value for the whole cohort (or None) repeated for each."""
    if isinstance(value, (list, tuple)):
        if len(value) != peers:
            raise ValueError(f"{len(value)} values for {peers} peers")
        return list(value)
    return [value] * peers


def start_summary(path: Path) -> None:
    """Write the header of summary.csv once; a resumed run appends below what is there.

    Raises:
        OutputError: the file has other columns, or cannot be read or written.
    """
    drop_partial_line(path)
    header = ",".join(SUMMARY_COLUMNS)
    try:
        with open(path, encoding="utf-8") as file:
            found = file.readline().rstrip("\r\n")
    except FileNotFoundError:
        found = ""
    except OSError as error:
        raise OutputError(f"cannot read: {error.strerror}", str(path), "make the run folder readable") from error
    if not found:
        append_text(path, header + "\n")
    elif found != header:
        raise OutputError("the columns are those of another version", str(path),
                          "continue this run with the version that began it, or choose another run.name")


def summary_rows(record: Mapping[str, Any], peers: Sequence[str]) -> str:
    """The CSV rows of an epoch record, one per peer; values that were not measured are empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = {name: per_peer(record.get(name), len(peers)) for name in SUMMARY_COLUMNS if name != "peer"}
    columns["peer"] = list(peers)
    for index in range(len(peers)):
        writer.writerow([columns[name][index] for name in SUMMARY_COLUMNS])
    return text.getvalue()
