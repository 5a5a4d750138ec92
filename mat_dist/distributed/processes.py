"""Processes of this machine: who they are, whether they still run. Reads /proc; no torch."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mat_dist.errors import EnvironmentFault, MatError

# glibc's M_TRIM_THRESHOLD: how much free memory at the end of the heap goes back to the system. M_MMAP_THRESHOLD: from
# which size on an array lies outside the heap, and goes back when it is freed.
_KEEP: Mapping[int, int] = MappingProxyType({-1: 2**31 - 1, -3: 2**30})


@dataclass(frozen=True)
class ProcessIdentity:
    """A process, told apart from a later one with the same pid. Where there is no /proc (macOS), `boot_id` is empty."""

    host: str
    boot_id: str  # of the machine; with the namespace it tells whether pids mean the same here
    pid_namespace: str
    pid: int
    started: int  # in clock ticks since boot

    @classmethod
    def own(cls) -> ProcessIdentity:
        namespace = ""
        with suppress(OSError):
            namespace = os.readlink("/proc/self/ns/pid")
        found = process_start(os.getpid())
        return cls(socket.gethostname(), read_system("/proc/sys/kernel/random/boot_id"), namespace, os.getpid(),
                   found[1] if found else 0)

    def shares_pids_with(self, other: ProcessIdentity) -> bool:
        """Whether both live where a pid means the same process; never where there is no /proc (macOS)."""
        place = (self.host, self.boot_id, self.pid_namespace)
        return all(place) and place == (other.host, other.boot_id, other.pid_namespace)

    def runs(self) -> bool:
        """Whether the process still runs; ask only where `shares_pids_with`. Zombies do not run."""
        found = process_start(self.pid)
        return found is not None and found[0] not in "ZX" and found[1] == self.started

    def kill(self) -> None:
        """SIGKILL, if it still runs and was started with the command line of this process, as all ranks are.

        An identity that came over the network must not name any process of this user.
        """
        if self.runs() and command_line(self.pid) == command_line(os.getpid()):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGKILL)


def read_system(file: str) -> str:
    """Content of a file of /proc, empty where there is none."""
    with suppress(OSError):
        return Path(file).read_bytes().decode(errors="replace").strip()
    return ""


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed tensors for the next ones, where glibc allocates as it does by default.

    Else each step of an attack on the CPU gets its activations from the system and gives them back, and the system
    zeroes every page: a tenth to a quarter of an evaluation's time (docs/performance.md).
    """
    if not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")) for name in os.environ):
        with suppress(AttributeError):  # another C library has no mallopt
            for switch, value in _KEEP.items():
                ctypes.CDLL(None).mallopt(switch, value)


def memory_kills() -> int:
    """How many processes the kernel's memory killer has ended: of this control group, else on this machine."""
    group = read_system("/proc/self/cgroup").rpartition("0::")[2]
    counters = read_system(f"/sys/fs/cgroup{group}/memory.events") or read_system("/proc/vmstat")
    found = re.search(r"^oom_kill (\d+)$", counters, re.MULTILINE)
    return int(found[1]) if found else 0


def children() -> list[int]:
    """The direct children of this process that run, whichever thread started them."""
    tasks = Path("/proc/self/task").glob("*/children")
    pids = [int(pid) for file in tasks for pid in read_system(str(file)).split()]
    return [pid for pid in pids if (found := process_start(pid)) is not None and found[0] not in "ZX"]


def known_error(error: BaseException) -> MatError | None:
    """The error itself where its cause is known, or what to tell of the limit of the shell (ulimit) that caused it."""
    if isinstance(error, MatError):
        return error
    found = _limit_reached(error)
    if found is not None:
        found.__cause__ = error
    return found


def _limit_reached(error: BaseException) -> EnvironmentFault | None:
    number, text = getattr(error, "errno", None), str(error)
    if number in (errno.EMFILE, errno.ENFILE) or "oo many open files" in text:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return EnvironmentFault(f"too many open files: this process may open {most}", "ulimit -n",
                                "raise it: ulimit -n 1024")
    if number == errno.EAGAIN or "can't start new thread" in text:
        return EnvironmentFault("no further process or thread may be started", "ulimit -u, ulimit -v or the control "
                                "group's pids.max", "raise it, or start fewer ranks on this node")
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    lacks = isinstance(error, MemoryError) or number == errno.ENOMEM or any(word in text for word in (
        "failed to map segment", "annot allocate memory", "bad_alloc", "alloc_cpu"))
    if lacks and space != resource.RLIM_INFINITY:
        return EnvironmentFault(f"{space // 2**20} MiB of address space, which this process may use, are too few",
                                "ulimit -v", "raise it: ulimit -v unlimited")
    return None


def command_line(pid: int) -> str:
    """Arguments of a process, NUL-separated; empty where /proc does not tell."""
    return read_system(f"/proc/{pid}/cmdline")


def process_start(pid: int) -> tuple[str, int] | None:
    """State letter and start (clock ticks since boot) of a process; None if /proc does not know it."""
    text = read_system(f"/proc/{pid}/stat")
    if not text:
        return None
    columns = text.rpartition(")")[2].split()
    return columns[0], int(columns[19])
