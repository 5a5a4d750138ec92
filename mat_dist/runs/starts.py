"""Every start writes its own end: what ends it before its run is open goes into the `exit.json` of that run too.

Else that file would still tell of the attempt before: 75, start again, or 0, done. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from mat_dist.cli import LOGGED
from mat_dist.config import Config, RunConfig, binding
from mat_dist.distributed.launch import Launch
from mat_dist.errors import OutputError
from mat_dist.runs.folder import existing
from mat_dist.runs.lock import RunLock
from mat_dist.runs.record import REFUSED, next_attempt, write_exit


@dataclass
class Start:
    """Which run a start is to begin or continue, as far as it is known."""

    root: str
    name: str | None
    config_name: str = ""
    job: str | None = None
    launch: Launch = field(default_factory=Launch)

    def learn(self, config: Config, config_name: str) -> None:
        """The settings could be read."""
        self.root, self.name, self.config_name = config.run.root, config.run.name, config_name
        self.job = job_of(config, self.launch)

    def refused(self, error: Exception) -> None:
        """Record why it came to nothing; not where another process has the run, and will tell its end itself."""
        known = LOGGED not in getattr(error, "__notes__", []) and self.launch.speaks_for(getattr(error, "guilty", ()))
        folder = existing(self.root, self.name, self.config_name, self.job) if known else None
        with suppress(OutputError):  # the first error counts
            if folder is not None and RunLock(folder, self.launch).held_by() is None:
                write_exit(folder, next_attempt(folder), error, REFUSED)


def job_of(config: Config, launch: Launch) -> str | None:
    """What names a run without `run.name` in a job: a requeued job finds its run, and runs with other settings, such as
    another seed, do not collide. None without a job."""
    settings = hashlib.sha256(json.dumps(binding(config), sort_keys=True).encode()).hexdigest()
    return launch.job_id and f"{launch.job_id}-{settings[:8]}"


@contextmanager
def recording(words: Sequence[str]) -> Iterator[Start]:
    """The start that a command line asks for; `learn` more of it as soon as its settings are read."""
    told = dict(word.split("=", 1) for word in words if word.startswith(("run.root=", "run.name=")))
    start = Start(told.get("run.root", RunConfig().root), told.get("run.name"))
    try:
        start.launch = Launch.from_environment()  # of the ranks one tells
        yield start
    except Exception as error:
        if "--dry-run" not in words:
            start.refused(error)
        raise
