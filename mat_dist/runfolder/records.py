"""JSON lines that survive a kill: each record is one write, a half last line never spoils the next one."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mat_dist.atomic import parse_json, reported


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append `record` as one line; if a killed run left half a line, start on a new one.

    JSON has no NaN and no infinity: such numbers become null.

    Raises:
        OutputError: the line cannot be written whole (disk full, ...).
    """
    line = json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
    with reported(path, len(line)):
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                line = b"\n" + line
            if os.write(handle, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """All whole records of `path` and the number of damaged lines; ([], 0) if there is no file.

    Raises:
        OutputError: the file cannot be read.
    """
    records: list[dict[str, Any]] = []
    damaged = 0
    with reported(path):
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return [], 0
    for line in filter(None, lines):
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            damaged += 1
    return records, damaged


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
