"""One run folder, one writer: the file `lock` names its holder; a dead holder's lock passes on.

The kernel's lock on `.lock.guard` (filelock) is held only while `lock` is read and written, so that of many who see a
dead holder one takes its place. It does not stand for the run itself: it cannot say who holds it, nor pass from one
machine to another after a crash.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from time import time

from mat_dist.distributed.launch import Launch
from mat_dist.distributed.processes import ProcessIdentity
from mat_dist.errors import OutputError
from mat_dist.runs.files import open_plain, parse_json, reported, write_json
from mat_dist.runs.folder import RunFolder

STALE_SECONDS = 120.0
"""A holder on another machine without a heartbeat for this long is taken for dead."""

GUARD_SECONDS = 30.0  # how long a start waits for others that take the lock at the same moment
GUARD = ".lock.guard"
NO_RUN_ID = "none"  # torchrun's, where none was given
_NO_KERNEL_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP})  # NFS without lockd, some FUSE drives


@dataclass(frozen=True)
class Holder(ProcessIdentity):
    """The process that holds a lock. Where there is no /proc, only the heartbeat tells whether it lives."""

    job_id: str | None
    since: str
    token: str
    requeue: int = 0  # how often SLURM has started the job again,
    run_id: str = NO_RUN_ID  # and torchrun its ranks
    restart: int = 0

    @classmethod
    def here(cls, launch: Launch) -> Holder:
        """This process as a holder from now on."""
        return cls(**asdict(ProcessIdentity.own()), job_id=launch.job_id, token=secrets.token_hex(8),
                   since=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC", requeue=launch.requeue, run_id=launch.run_id,
                   restart=launch.restart)

    def precedes(self, other: Holder) -> bool:
        """Whether `other` is of a later start of the same job, before which SLURM or torchrun has ended this process.
        Two tasks of one start are two writers."""
        if self.job_id is None or self.job_id != other.job_id:
            return False
        restarted = self.run_id == other.run_id != NO_RUN_ID and self.restart < other.restart
        return self.requeue < other.requeue or restarted

    def __str__(self) -> str:
        job = f" of job {self.job_id}" if self.job_id else ""
        return f"pid {self.pid}{job} on {self.host} since {self.since}"


class RunLock:
    """The right to write into a run folder. One process per run holds it, the others rely on that one.

    A later start of the same job (SLURM job or torchrun run id) takes the lock over from a process on another machine
    without waiting for the heartbeat to grow stale: a requeued job.
    """

    def __init__(self, folder: RunFolder, launch: Launch | None) -> None:
        self.folder = folder
        self.holder = Holder.here(launch or Launch())

    def acquire(self) -> str | None:
        """Take the lock -> a note if it was taken over from a dead holder. Raises OutputError where another process
        holds it (the text says which), or the folder cannot be written."""
        note = None
        with self._guarded() as now:
            found = self._read()
            if found is not None:
                text, reason = self._judged(*found, now)
                if reason is None:
                    raise OutputError(f"the run is in use by {text}", str(self.folder.path), self._advice(found[0]))
                note = f"took the lock over from {text}: {reason}"
            write_json(self.folder.lock, asdict(self.holder))
            self._sweep(now)
        return note

    def held_by(self) -> str | None:
        """Who else holds the lock and may not be replaced, None if it can be taken. Changes nothing."""
        found = self._read()
        if self._is_mine(found):
            return None
        # By this machine's clock, which may differ from the file server's by less than STALE_SECONDS.
        text, reason = self._judged(*found, time()) if found else ("", "free")
        return text if reason is None else None

    def check(self) -> None:
        """Raise OutputError where the lock is gone or another process has taken it over: stop without writing. One
        small read, cheap enough before every write."""
        found = self._read()
        if not self._is_mine(found):
            told = f"{_named(found[0])} has taken the lock over" if found else "the lock file has been removed"
            raise OutputError(told, str(self.folder.path), "run only one process group per run.name")

    def beat(self) -> None:
        """Refresh the heartbeat; call it more often than every `STALE_SECONDS`. Raises as `check`."""
        self.check()
        with reported(self.folder.lock):
            os.utime(self.folder.lock)

    def release(self) -> None:
        """Give the lock up; does nothing if it is no longer ours. Raises OutputError if it cannot be removed."""
        if self._is_mine(self._read()):
            with self._guarded():
                if self._is_mine(self._read()):
                    os.unlink(self.folder.lock)

    def _is_mine(self, found: tuple[Holder | None, float] | None) -> bool:
        return found is not None and found[0] is not None and found[0].token == self.holder.token

    def _advice(self, holder: Holder | None) -> str:
        """What somebody can do who is refused because of `holder`."""
        how = "wait until it ends, stop it, or choose another run.name"
        if holder is None or not holder.shares_pids_with(self.holder):
            how += f"; if it was killed, its lock passes on {STALE_SECONDS:.0f} s after its last sign of life"
        if holder is not None and holder.job_id is not None and holder.job_id == self.holder.job_id:
            how += "; tasks of one job share a run only as ranks of one torchrun"
        return how

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @contextmanager
    def _guarded(self) -> Iterator[float]:
        """Alone with the lock file, for a moment -> the time by the file system's clock."""
        from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

        path = self.folder.path / GUARD
        guard: BaseFileLock = FileLock(path, timeout=GUARD_SECONDS, mode=0o666)
        with reported(self.folder.lock):
            os.stat(self.folder.path)  # filelock would make a folder that is gone
            try:
                try:
                    guard.acquire()
                except OSError as error:
                    if error.errno not in _NO_KERNEL_LOCKS:
                        raise
                    guard = SoftFileLock(f"{path}.soft", timeout=GUARD_SECONDS, mode=0o666)
                    guard.acquire()
            except Timeout:
                raise OutputError(f"other processes have been taking the lock for {GUARD_SECONDS:.0f} s",
                                  guard.lock_file, "start the run once only; if no process of the run lives, delete "
                                  "this file") from None
            try:
                os.utime(guard.lock_file)
                yield os.stat(guard.lock_file).st_mtime
            finally:
                guard.release()

    def _read(self) -> tuple[Holder | None, float] | None:
        """The holder and its last heartbeat; None if there is no lock. An unreadable lock has an unknown holder."""
        with reported(self.folder.lock):
            try:
                with open_plain(self.folder.lock) as file:
                    text, modified = file.read(), os.fstat(file.fileno()).st_mtime
            except FileNotFoundError:
                return None
        with suppress(ValueError, TypeError, KeyError):
            document = parse_json(text)
            holder = Holder(**{field.name: document[field.name] for field in fields(Holder) if field.name in document})
            if type(holder.pid) is type(holder.requeue) is type(holder.restart) is int:
                return holder, modified
        return None, modified

    def _judged(self, holder: Holder | None, modified: float, now: float) -> tuple[str, str | None]:
        """The holder in words, and why the lock may be taken from it; None if it may not."""
        text, age = _named(holder), now - modified
        if holder is not None and holder.shares_pids_with(self.holder):
            return text, None if holder.runs() else "that process is gone"
        if holder is not None and holder.precedes(self.holder):
            return text, "it belongs to an earlier start of the same job"
        return text, f"no heartbeat for {age:.0f} s" if age > STALE_SECONDS else None

    def _sweep(self, now: float) -> None:
        """Remove what killed processes left of their own attempts to write."""
        for entry in list(os.scandir(self.folder.path)):
            if entry.name.startswith(".") and entry.name.endswith(".tmp"):
                with suppress(FileNotFoundError):
                    if entry.stat(follow_symlinks=False).st_mtime < now - STALE_SECONDS:
                        os.unlink(entry.path)


def _named(holder: Holder | None) -> str:
    return str(holder) if holder else "an unknown process (unreadable lock)"
