"""Files that are either whole or absent: write beside, fsync, rename. Disk errors become `OutputError`."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any, BinaryIO

from mat_dist.errors import OutputError

_CHECK = "check the disk and the permissions of the folder"
_HOW = {
    errno.ENOSPC: "free some space, or choose another run.root; the previous files are untouched",
    errno.EDQUOT: "the quota is used up: free some space, or choose another run.root",
    errno.EFBIG: "the file size limit is too low (ulimit -f, or the file system's own): raise it",
    errno.EROFS: "the file system is read-only: choose another run.root",
    errno.EACCES: "no permission to write there: choose another run.root, or ask its owner",
    errno.EPERM: "no permission to write there: choose another run.root, or ask its owner",
    errno.ENOENT: "the folder is gone: do not move or delete the folder of a live run",
    errno.ENOTDIR: "a file stands where a folder is needed: choose another run.root or run.name",
    errno.EEXIST: "a file stands where a folder is needed: choose another run.root or run.name",
}


def open_plain(path: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError also where a pipe or a device stands, on which `open` would wait."""
    mode = path.stat().st_mode
    if not S_ISREG(mode) and not S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is no file, but a pipe or a device", str(path))
    return open(path, "rb")


def _file_system(path: Path) -> os.statvfs_result | None:
    """That of `path`, or of the nearest folder above it that is there; None if it cannot be told."""
    for folder in (path, *path.parents):
        with suppress(OSError):
            return os.statvfs(folder)
    return None


def free_bytes(path: Path) -> int | None:
    """Bytes that this user can still write on the file system of `path`; None if it cannot be told."""
    stat = _file_system(path)
    return stat.f_bavail * stat.f_frsize if stat else None


def output_error(error: OSError, path: Path, needed: int = 0) -> OutputError:
    """The `OutputError` for a failed write of `needed` bytes to `path`."""
    what, how = f"cannot write: {error.strerror or error}", _HOW.get(error.errno or 0, _CHECK)
    stat = _file_system(path.absolute())
    if stat and error.errno == errno.ENOSPC and stat.f_files > 0 == stat.f_favail:  # some systems count no files
        what, how = f"{what}; no inode is free, and each file needs one", "delete files, or choose another run.root"
    elif stat:
        free = f"{stat.f_bavail * stat.f_frsize} bytes free"
        what += f"; {needed} bytes needed, {free}" if needed else f"; {free}"
    return OutputError(what, str(path), how)


@contextmanager
def reported(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn an OSError inside into the `OutputError` for `path`."""
    try:
        yield
    except OSError as error:
        raise output_error(error, path, needed) from error


def fsync_directory(path: Path) -> None:
    """Make renames inside `path` survive a power cut, where the file system offers that."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # SMB and some FUSE file systems cannot fsync a folder
            raise
    finally:
        os.close(handle)


def write_all(path: Path, *parts: bytes | memoryview) -> None:
    """Create `path` (it must not exist) with `parts` one after another and fsync it. Raises OSError."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for part in parts:
            _write_whole(handle, part)
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_whole(handle: int, part: bytes | memoryview) -> None:
    rest = memoryview(part)
    while len(rest):
        rest = rest[os.write(handle, rest):]


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Replace `path` by `parts`, one after another; a reader sees the old or the new content, never half of it. Raises
    OutputError: the disk is full, read-only, gone, ...; the old file is untouched, no temporary file stays."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_all(temporary, *parts)
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        raise output_error(error, path, sum(map(len, parts))) from error


def overwrite(path: Path, data: bytes) -> None:
    """Put `data` into the blocks that the file has, on a disk too full for another file. A kill meanwhile damages it.
    Raises OSError; where there is no room either, the old content stays."""
    handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(handle).st_size
        try:
            os.posix_fallocate(handle, 0, len(data))
            _write_whole(handle, data)
            size = len(data)
        finally:
            os.ftruncate(handle, size)
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, document: Any) -> None:
    """As `write_bytes`, as indented JSON; NaN and infinities raise ValueError."""
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key stands twice")
    return document


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # 1e400
        raise ValueError(f"{text} is out of range")
    return number


def parse_json(text: bytes) -> Any:
    """Strict JSON: no NaN or infinity, no key twice. Raises ValueError."""
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique_keys, parse_constant=_no_constant,
                          parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def set_aside(path: Path) -> Path:
    """Rename the damaged `path` to `<name>.damaged`, `.damaged-2`, ... and return the new path. Raises OSError."""
    names = (f"{path.name}.damaged" + (f"-{number}" if number > 1 else "") for number in count(1))
    aside = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
    os.rename(path, aside)
    return aside
