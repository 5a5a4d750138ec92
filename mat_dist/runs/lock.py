"""One run folder, one writer: a lock file that names its holder, and how a dead holder's lock passes on.

The lock is a JSON file that appears with its whole content (hard link of a finished file). Taking over a
stale lock is a race among those that saw it stale: each tries to create `.lock.<token of the stale
holder>.next`, a name that only one can create, and whose content is the new holder. So the holder is the end of the
chain lock -> next -> next, also if a process dies before it has moved its own file over `lock`.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mat_dist.runs.files import parse_json, reported, write_all
from mat_dist.errors import OutputError
from mat_dist.distributed.processes import ProcessIdentity
from mat_dist.runs.folder import RunFolder

STALE_SECONDS = 120.0
"""A holder on another machine without a heartbeat for this long is taken for dead."""

_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})  # exFAT, some FUSE drives
_TRIES = 100  # each further try means that another process has got hold of or released the lock meanwhile


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock; `started` is its start in clock ticks since boot.

    Where there is no /proc (macOS), `boot_id` is empty and only the heartbeat tells whether a holder lives.
    """

    host: str
    pid: int
    boot_id: str
    pid_namespace: str
    started: int
    job_id: str | None
    since: str
    token: str

    @classmethod
    def of(cls, process: ProcessIdentity, job_id: str | None) -> Holder:
        """`process` as a holder from now on."""
        return cls(process.host, process.pid, process.boot, process.namespace, process.started, job_id,
                   f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC", secrets.token_hex(8))

    @property
    def process(self) -> ProcessIdentity:
        """The holder without what concerns the lock."""
        return ProcessIdentity(self.host, self.boot_id, self.pid_namespace, self.pid, self.started)

    def __str__(self) -> str:
        job = f" of job {self.job_id}" if self.job_id else ""
        return f"pid {self.pid}{job} on {self.host} since {self.since}"


class RunLock:
    """The right to write into a run folder. One process per run holds it, the others rely on that one.

    Args:
        folder: an existing run folder.
        job_id: SLURM job or torchrun run id; a process of the same job takes the lock over from a process on
            another machine without waiting for the heartbeat to grow stale (a requeued job).
    """

    def __init__(self, folder: RunFolder, job_id: str | None) -> None:
        self.folder = folder
        self.holder = Holder.of(ProcessIdentity.own(), job_id)

    def acquire(self) -> str | None:
        """Take the lock; returns a note if it was taken over from a dead holder.

        Raises:
            OutputError: another process holds it (the text says which), or the folder cannot be written.
        """
        temporary = self.folder.path / f".lock.{self.holder.token}.tmp"
        with reported(self.folder.lock):
            write_all(temporary, json.dumps(asdict(self.holder), indent=1).encode())
            try:
                return self._acquire(temporary)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)

    def _acquire(self, temporary: Path) -> str | None:
        for _ in range(_TRIES):
            chain = self._chain()
            if not chain:
                if _publish(temporary, self.folder.lock):
                    self._sweep()
                    return None
                continue
            last = chain[-1]
            reason = self._stale(last, os.stat(temporary).st_mtime)
            if reason is None:
                raise OutputError(f"the run is in use by {last.text}", str(self.folder.path),
                                  "wait until it ends, stop it, or choose another run.name")
            if self._claim(temporary, last):
                return f"took the lock over from {last.text}: {reason}"
        raise OutputError("the lock changes hands all the time", str(self.folder.lock), "start the run once only")

    def held_by(self) -> str | None:
        """Who holds the lock and may not be replaced, None if it can be taken. Changes nothing.

        Raises:
            OutputError: the folder cannot be read.
        """
        with reported(self.folder.lock):
            chain = self._chain()
            # By this machine's clock, which may differ from the file server's by less than STALE_SECONDS.
            return chain[-1].text if chain and self._stale(chain[-1], time.time()) is None else None

    def _claim(self, temporary: Path, last: _Link) -> bool:
        """Become the successor of `last`, which is stale; False if another process was faster."""
        claim = self._successor(last.token)
        if not _publish(temporary, claim):
            return False
        chain = self._chain()
        if not chain or chain[-1].token != self.holder.token:  # `last` had been replaced and swept before our claim
            with suppress(FileNotFoundError):
                os.unlink(claim)
            return False
        os.replace(temporary, self.folder.lock)
        for link in chain[:-1]:
            with suppress(FileNotFoundError):
                os.unlink(self._successor(link.token))
        self._sweep()
        return True

    def beat(self) -> None:
        """Refresh the heartbeat; call it more often than every `STALE_SECONDS`.

        Raises:
            OutputError: the lock is gone or another process has taken it over; stop without writing.
        """
        with reported(self.folder.lock):
            chain = self._chain()
            if not chain or chain[-1].token != self.holder.token:
                owner = f"{chain[-1].text} has taken the lock over" if chain else "the lock file has been removed"
                raise OutputError(owner, str(self.folder.path), "run only one process group per run.name")
            os.utime(self.folder.lock)

    def release(self) -> None:
        """Give the lock up; does nothing if it is no longer ours. Raises OutputError if it cannot be removed."""
        with reported(self.folder.lock):
            chain = self._chain()
            if len(chain) == 1 and chain[0].token == self.holder.token:
                os.unlink(self.folder.lock)

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _successor(self, token: str) -> Path:
        return self.folder.path / f".lock.{token}.next"

    def _chain(self) -> list[_Link]:
        """The lock file and the claims that follow from it; empty if there is no lock."""
        chain: list[_Link] = []
        file = self.folder.lock
        while (link := _read_link(file)) is not None and all(link.token != other.token for other in chain):
            chain.append(link)
            file = self._successor(link.token)
        return chain

    def _stale(self, link: _Link, now: float) -> str | None:
        """Why the lock may be taken from `link`, None if it may not. `now` is on the file system's clock."""
        holder, age = link.holder, now - link.modified
        if holder is not None and holder.process.shares_pids_with(self.holder.process):
            return None if holder.process.runs() else "that process is gone"
        if holder is not None and holder.job_id is not None and holder.job_id == self.holder.job_id:
            return "it belongs to the same job"
        return f"no heartbeat for {age:.0f} s" if age > STALE_SECONDS else None

    def _sweep(self) -> None:
        """Remove what killed processes left of their own attempts to lock or to write."""
        fresh = os.stat(self.folder.lock).st_mtime - STALE_SECONDS
        for entry in list(os.scandir(self.folder.path)):
            if entry.name.startswith(".") and entry.name.endswith((".tmp", ".next")):
                with suppress(FileNotFoundError):
                    if entry.stat(follow_symlinks=False).st_mtime < fresh:
                        os.unlink(entry.path)


@dataclass(frozen=True)
class _Link:
    """One file of the chain; `holder` is None if it cannot be read (half written, or damaged)."""

    token: str
    holder: Holder | None
    modified: float

    @property
    def text(self) -> str:
        return str(self.holder) if self.holder else "an unknown process (unreadable lock)"


def _read_link(file: Path) -> _Link | None:
    try:
        stat = os.stat(file)
        text = file.read_bytes()
    except FileNotFoundError:
        return None
    holder = _parse(text)
    return _Link(holder.token if holder else f"unreadable-{stat.st_mtime_ns}", holder, stat.st_mtime)


def _parse(text: bytes) -> Holder | None:
    try:
        document: dict[str, Any] = parse_json(text)
        holder = Holder(**{field.name: document[field.name] for field in fields(Holder)})
    except (ValueError, TypeError, KeyError):
        return None
    plain = isinstance(holder.token, str) and holder.token.isalnum() and type(holder.pid) is int
    return holder if plain else None  # the token becomes part of a file name


def _publish(temporary: Path, target: Path) -> bool:
    """Create `target` with the content of `temporary`; False if it exists already."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return os.stat(temporary).st_nlink > 1  # NFS: the link was made, only its answer got lost
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        try:  # no hard links here: readers take the half-written file for held, as it is fresh
            write_all(target, temporary.read_bytes())
        except FileExistsError:
            return False
    return True
