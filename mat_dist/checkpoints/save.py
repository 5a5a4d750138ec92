"""Saving in two phases. With barriers (of the caller) between the lines:

    begin                one process, the holder of the run's lock
    save_peer            the owner of each peer, into partial_directory(...)
    commit, or abandon   one process, the holder of the run's lock

At every moment, also between any two file operations, the newest intact checkpoint can be found: the new one
appears by one rename, with its manifest inside.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import torch

import mat_dist
from mat_dist.checkpoints.layout import LEFTOVER, REPLACED, delete, partial_directory, step_name
from mat_dist.checkpoints.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    Meta,
    document_of,
    peer_file,
    read_manifest,
    verify,
)
from mat_dist.errors import CheckpointError, OutputError
from mat_dist.runs.files import fsync_directory, reported, set_aside, write_json, write_text
from mat_dist.runs.folder import RunFolder


def begin(folder: RunFolder, step: int, attempt: int) -> Path:
    """Make an empty `partial_directory` and remove what earlier, killed saves left.

    Raises:
        OutputError: the folder cannot be written.
    """
    partial = partial_directory(folder, step, attempt)
    with reported(partial):
        folder.checkpoints.mkdir(exist_ok=True)
        for entry in folder.checkpoints.iterdir():
            with suppress(OSError):  # what cannot be removed costs space, but must not stop a save
                _remove_leftover(entry)
        partial.mkdir()
        fsync_directory(folder.checkpoints)
    return partial


def abandon(folder: RunFolder, step: int, attempt: int) -> None:
    """Forget a save that failed on some rank. Never raises: it is called while an error is under way."""
    shutil.rmtree(partial_directory(folder, step, attempt), ignore_errors=True)


def commit(folder: RunFolder, step: int, attempt: int, entries: Iterable[FileEntry], meta: Meta) -> Manifest:
    """Turn the partial directory into the checkpoint of `step` and let `latest` name it.

    An intact checkpoint of this step with the same bytes is kept, one with other bytes is replaced, a damaged
    one is renamed to `step_<n>.damaged`.

    Raises:
        OutputError: the disk is full, ..., or a peer's file is not there; the partial directory is removed and
            earlier checkpoints are untouched.
        ValueError: `entries` are not one file per peer.
    """
    partial, target = partial_directory(folder, step, attempt), folder.checkpoints / step_name(step)
    by_name = {entry.name: entry for entry in entries}
    expected = [peer_file(index) for index in range(len(meta.peers))]
    if sorted(by_name) != sorted(expected):
        raise ValueError(f"{sorted(by_name)} are not the files of peers {list(meta.peers)}")
    files = tuple(by_name[name] for name in expected)
    document = document_of(step, attempt, meta, files, saved=datetime.now(UTC).isoformat(timespec="seconds"),
                           versions={"mat_dist": mat_dist.__version__, "torch": str(torch.__version__)})
    try:
        with reported(partial):
            _check_present(partial, files)
            write_json(partial / MANIFEST, document)
            if _make_way(target, files):
                os.rename(partial, target)
                fsync_directory(folder.checkpoints)
    except OutputError:
        abandon(folder, step, attempt)
        raise
    abandon(folder, step, attempt)  # still there if the checkpoint existed already
    write_text(folder.checkpoints / "latest", f"{target.name}\n")
    with suppress(OSError):  # the next begin tries again
        _remove_leftover(target.with_suffix(REPLACED))
    return read_manifest(target)


def _remove_leftover(entry: Path) -> None:
    if entry.suffix == REPLACED:
        if entry.exists() and entry.with_suffix("").exists():
            delete(entry)
    elif entry.name.startswith(".") and entry.name.endswith(LEFTOVER):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _check_present(partial: Path, files: tuple[FileEntry, ...]) -> None:
    for entry in files:
        file = partial / entry.name
        if not file.is_file() or file.stat().st_size != entry.size:
            raise OutputError(f"{entry.name} is not there as its owner wrote it", str(partial),
                              "run.root must be one folder that all nodes share")


def _make_way(target: Path, files: tuple[FileEntry, ...]) -> bool:
    """Clear `target` for a new checkpoint; False if the same one is there already."""
    if not os.path.lexists(target):
        return True
    try:
        existing = read_manifest(target)
        verify(existing)
    except CheckpointError:
        set_aside(target)
        return True
    if existing.files == files:
        return False
    os.rename(target, target.with_suffix(REPLACED))
    return True
