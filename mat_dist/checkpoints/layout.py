"""Names inside `checkpoints/`, and the few operations on whole checkpoint folders."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from mat_dist.checkpoints.manifest import Manifest, read_manifest
from mat_dist.errors import CheckpointError
from mat_dist.runs.folder import RunFolder

REPLACED = ".replaced"
"""Ending of an intact checkpoint that makes way for another one of the same step."""

LEFTOVER = (".partial", ".deleted", ".tmp")
"""Endings of hidden files and folders that only a killed process leaves."""

_STEP = re.compile(r"step_(\d{8,18})")


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def partial_directory(folder: RunFolder, step: int, attempt: int) -> Path:
    """Where the owners of the peers write before `commit`."""
    return folder.checkpoints / f".{step_name(step)}.{attempt}.partial"


def directories(folder: RunFolder) -> list[tuple[int, Path]]:
    """(step, directory) of all checkpoints, newest first; one that is being replaced comes after its successor."""
    found = []
    with suppress(FileNotFoundError):
        for entry in folder.checkpoints.iterdir():
            name = _STEP.fullmatch(entry.name.removesuffix(REPLACED))
            if name and entry.is_dir():
                found.append((int(name[1]), entry.suffix != REPLACED, entry))
    return [(step, entry) for step, _, entry in sorted(found, reverse=True)]


def names(folder: RunFolder) -> str:
    """All checkpoints for an error text, newest first."""
    return ", ".join(entry.name for _, entry in directories(folder)) or "none"


def manifest_of(step: int, directory: Path) -> Manifest:
    """The manifest in `directory`. Raises CheckpointError also if it is that of another step."""
    manifest = read_manifest(directory)
    if manifest.step != step:
        raise CheckpointError(f"the folder holds the checkpoint of step {manifest.step}", str(directory),
                              "do not rename checkpoint folders")
    return manifest


def pointer(folder: RunFolder, which: str) -> int | None:
    """The step that the one-line file `which` (latest, best) names; None if there is no such file or line."""
    with suppress(OSError), (folder.checkpoints / which).open("rb") as stream:
        name = _STEP.fullmatch(stream.read(100).decode(errors="replace").strip())
        return int(name[1]) if name else None
    return None


def delete(directory: Path) -> None:
    """Remove a checkpoint: first its name at one stroke, then its files. Raises OSError."""
    hidden = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.deleted")
    os.rename(directory, hidden)
    shutil.rmtree(hidden)
