"""Finding checkpoints: the newest intact one for a resume, a named one for everything else."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mat_dist.checkpoints.layout import directories, manifest_of, names, pointer, step_name
from mat_dist.checkpoints.manifest import Manifest, TooNew, verify
from mat_dist.errors import CheckpointError
from mat_dist.runs.files import reported, set_aside, write_text
from mat_dist.runs.folder import RunFolder


def find_newest(folder: RunFolder) -> tuple[Manifest, list[str]] | None:
    """The newest checkpoint whose files all have their digests, and a note for each newer one that has not.

    None if the run has no checkpoint at all. Writes nothing; see `adopt`.

    Raises:
        TooNew: the newest one is of a later mat_dist.
        CheckpointError: there are checkpoints, but all are damaged.
    """
    refused: list[tuple[int, Path, str]] = []
    for step, directory in directories(folder):
        try:
            manifest = manifest_of(step, directory)
            verify(manifest)
        except TooNew:
            raise
        except CheckpointError as error:
            refused.append((step, directory, error.what))
            continue
        return manifest, [f"{old.name} is damaged: {what}; continuing from step {step}, {old_step - step} steps are "
                          f"redone" for old_step, old, what in refused]
    if refused:
        _, newest, what = refused[0]
        raise CheckpointError(f"all {len(refused)} checkpoints are damaged; {newest.name}: {what}",
                              str(folder.checkpoints), "restore the folder from a copy, or start a new run with "
                                                       "another run.name")
    return None


def adopt(folder: RunFolder, manifest: Manifest) -> list[str]:
    """Make `manifest` (from `find_newest`) the latest checkpoint, before the training goes on from it.

    Newer ones, which `find_newest` has refused, are renamed to `step_<n>.damaged`: they must not count as kept
    checkpoints, nor pass for the newest one later. For the holder of the run's lock.

    Returns:
        A note for each renamed one.

    Raises:
        CheckpointError: the checkpoint is not in this folder.
        OutputError: the folder cannot be written.
    """
    there = [directory for _, directory in directories(folder)]
    if manifest.directory not in there:
        raise CheckpointError(f"{manifest.directory.name} is not a checkpoint of this run", str(folder.checkpoints),
                              f"choose one of these: {names(folder)}")
    target = folder.checkpoints / step_name(manifest.step)
    notes = []
    with reported(folder.checkpoints):
        for directory in there[: there.index(manifest.directory)]:
            notes.append(f"{directory.name} is kept as {set_aside(directory).name}; delete it when you like")
        if manifest.directory != target:
            os.rename(manifest.directory, target)
    write_text(folder.checkpoints / "latest", f"{target.name}\n")
    return notes


def load_manifest(folder: RunFolder, which: str | int = "latest") -> Manifest:
    """The manifest of `latest`, `best`, `step_<n>` or step n. Only `load_peer` and `verify` check the files.

    Raises:
        CheckpointError: there is no such checkpoint, or its manifest is damaged.
    """
    if which in ("latest", "best"):
        step = pointer(folder, str(which))
    else:
        number = re.fullmatch(r"(?:step_)?(\d{1,18})", str(which))
        step = int(number[1]) if number else None
    directory = folder.checkpoints / step_name(step) if step is not None else None
    if step is None or directory is None or not directory.is_dir():
        raise CheckpointError(f"there is no checkpoint {which!r}" + (f" ({step_name(step)})" if step else ""),
                              str(folder.checkpoints), f"choose latest, best or one of these: {names(folder)}")
    return manifest_of(step, directory)
