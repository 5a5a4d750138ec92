"""Which folders an evaluation reads. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from mat_dist.errors import ConfigError, OutputError
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.lock import RunLock

_HOW = "give the folder of a run, e.g. runs/NAME, or a state dict such as FILE.pt with model=..."


def find_run(word: str, where: str = "command line") -> RunFolder:
    """The folder of a run. Raises ConfigError where it is none."""
    folder = RunFolder(Path(word))
    if not folder.path.is_dir():
        raise ConfigError(f"there is no run folder {word[:200]!r}", where, _HOW)
    if not folder.config.is_file():
        raise ConfigError(f"{word[:200]!r} is not the folder of a run: it has no config.yaml", where, _HOW)
    return folder


def refuse_unfinished(folder: RunFolder) -> None:
    """Raises OutputError while a process writes the run."""
    holder = RunLock(folder, None).held_by()
    if holder is not None:
        raise OutputError(f"the run is still being written by {holder}", str(folder.path), "wait until it ends")
