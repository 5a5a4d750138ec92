"""How much memory there is, asked before anything large is allocated."""

from __future__ import annotations

import os
from pathlib import Path

from mat_dist.errors import DataError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Memory that this process can still get, in bytes: the kernel's estimate, or less in a limited container."""
    amounts = [_machine_bytes()]
    try:
        limit, used, detail = ((_CGROUP / name).read_text() for name in ("memory.max", "memory.current", "memory.stat"))
        if limit.strip() != "max":
            file_pages = int(dict(line.split() for line in detail.splitlines())["file"])  # given back when needed
            amounts.append(int(limit) - int(used) + file_pages)
    except (OSError, ValueError, KeyError):
        pass  # no container limit that can be read
    return max(0, min(amounts))


def _machine_bytes() -> int:
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(nbytes: int, where: str, how: str) -> None:
    """Raises DataError where `nbytes` do not fit into the memory that is left."""
    free = available_bytes()
    if nbytes > free:
        raise DataError(f"the images need {nbytes / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free", where,
                        how)
