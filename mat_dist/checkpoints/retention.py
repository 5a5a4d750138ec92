"""Which checkpoints stay: the best one and the newest few. For the holder of the run's lock."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mat_dist.checkpoints.find import load_manifest
from mat_dist.checkpoints.layout import REPLACED, delete, directories, manifest_of, pointer
from mat_dist.checkpoints.manifest import Manifest, verify
from mat_dist.errors import CheckpointError
from mat_dist.runs.files import parse_json, write_json, write_text
from mat_dist.runs.folder import RunFolder

_SCORE = "score.json"


@dataclass(frozen=True)
class Best:
    """The best checkpoint so far; `score` and `meta` are what `mark_best` was given."""

    step: int
    score: float
    meta: Mapping[str, Any]


def mark_best(folder: RunFolder, step: int, score: float, meta: Mapping[str, Any]) -> None:
    """Let `best` name the checkpoint of `step`; `score.json` inside it tells why.

    Raises:
        CheckpointError: there is no such checkpoint.
        OutputError: the folder cannot be written.
    """
    directory = load_manifest(folder, step).directory
    write_json(directory / _SCORE, {"score": score, "meta": dict(meta)})
    write_text(folder.checkpoints / "best", f"{directory.name}\n")


def read_best(folder: RunFolder) -> Best | None:
    """What `mark_best` recorded last; None if no checkpoint is marked, or the marked one is gone or damaged."""
    with suppress(CheckpointError, OSError, ValueError, KeyError, TypeError):
        manifest = load_manifest(folder, "best")
        document = parse_json((manifest.directory / _SCORE).read_bytes())
        return Best(manifest.step, float(document["score"]), dict(document["meta"]))
    return None


def prune(folder: RunFolder, keep: int, protect: Collection[int] = ()) -> tuple[list[int], list[str]]:
    """Remove all but the newest `keep` complete checkpoints, the best one, and the steps in `protect`.

    Nothing goes before one of those that stay has been read back and found intact; if none is, the newest
    intact one stays as well. Damaged checkpoints neither count nor go.

    Returns:
        The steps that were removed, and a note for each one that could not be.

    Raises:
        ValueError: `keep` is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    stays = {*protect, pointer(folder, "best")}
    complete = [manifest for step, directory in directories(folder) if (manifest := _complete(step, directory))]
    kept = [one for number, one in enumerate(complete) if number < keep or one.step in stays]
    surplus = [one for one in complete if one not in kept]
    if surplus and not any(map(_intact, kept)):
        intact = next(filter(_intact, surplus), None)
        surplus = [one for one in surplus if intact is not None and one is not intact]
    removed, notes = [], []
    for manifest in reversed(surplus):  # oldest first
        try:
            delete(manifest.directory)
            removed.append(manifest.step)
        except OSError as error:
            notes.append(f"cannot remove {manifest.directory.name}: {error.strerror}; it is tried again later")
    return removed, notes


def _complete(step: int, directory: Path) -> Manifest | None:
    """The manifest if every file is there with its size; None for anything else."""
    with suppress(CheckpointError, OSError):
        manifest = manifest_of(step, directory)
        sizes = [(directory / entry.name).stat().st_size for entry in manifest.files]
        if directory.suffix != REPLACED and sizes == [entry.size for entry in manifest.files]:
            return manifest
    return None


def _intact(manifest: Manifest) -> bool:
    with suppress(CheckpointError):
        verify(manifest)
        return True
    return False
