"""The run folder: names, lock, exit record and environment. Imports no torch."""

from __future__ import annotations

from mat_dist.runfolder.environment import git_revision, redact, versions, write_environment
from mat_dist.runfolder.exits import finished, next_attempt, read_environment, read_exit, write_exit
from mat_dist.runfolder.folder import RunFolder, create_or_open
from mat_dist.runfolder.lock import STALE_SECONDS, RunLock

__all__ = [
    "STALE_SECONDS", "RunFolder", "RunLock", "create_or_open", "finished", "git_revision", "next_attempt",
    "read_environment", "read_exit", "redact", "versions", "write_environment", "write_exit",
]
