"""The checkpoints of a run: saving in two phases, finding the newest intact one, keeping the best and the newest few.

With barriers (of the caller) between the lines, a save is:

    begin                one process, the holder of the run's lock
    save_peer            the owner of each peer, into partial_directory(...)
    commit, or abandon   one process, the holder of the run's lock

At every moment, also between any two file operations, the newest intact checkpoint can be found: the new one
appears by one rename, with its manifest inside. Plain torch does not notice bit rot: of 300 single-bit flips in a 1 MB
checkpoint it loaded 299 into other weights without an error. So every file has its SHA-256 in the manifest, and the
manifest has its own. docs/checkpoint.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError

import mat_dist
from mat_dist.errors import CheckpointError, OutputError
from mat_dist.runs.files import fsync_directory, open_plain, parse_json, reported, set_aside, write_json, write_text
from mat_dist.runs.folder import RunFolder

FORMAT = 2
"""Format version that is written; version 1 is read too. They differ in the peers' files alone."""

MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 1 << 24
_HOW = "use another checkpoint of the run; a training that goes on takes the newest intact one by itself"
_REPLACED = ".replaced"  # ending of an intact checkpoint that makes way for another one of the same step
_LEFTOVER = (".partial", ".deleted", ".tmp")  # endings of hidden files and folders that only a killed process leaves
_SCORE = "score.json"
_STEP = re.compile(r"step_(\d{8,18})")


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: name, size in bytes, SHA-256 in lower-case hex."""

    name: str
    size: NonNegativeInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Meta:
    """What the trainer says about a checkpoint."""

    epoch: NonNegativeInt  # epochs finished
    peers: Annotated[tuple[str, ...], Field(min_length=1)]  # names; peer i is in `peer_<i>.safetensors`
    config_digest: str  # of the settings that must not change on resume (`json_digest`)
    data_digest: str
    extra: Mapping[str, Any] = field(default_factory=dict)  # anything else, plain JSON values


@dataclass(frozen=True)
class Manifest:
    """A checkpoint in `directory`; `format` is the version it was written in, `saved` is UTC in ISO 8601."""

    directory: Path
    format: int
    step: NonNegativeInt
    attempt: NonNegativeInt
    meta: Meta
    files: tuple[FileEntry, ...]
    versions: Mapping[str, str]
    saved: str


class TooNew(CheckpointError):
    """A checkpoint of a later mat_dist: intact, but not readable here. Never passed over for an older one."""


def json_digest(document: Any) -> str:
    """SHA-256 (hex) of `document` as JSON with sorted keys and no spaces."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ one checkpoint


def read_manifest(directory: Path) -> Manifest:
    """The manifest in `directory`; its own digest and form are checked, the peers' files are not (see `verify`). Raises
    TooNew where a later mat_dist wrote it, CheckpointError where it is missing or damaged."""
    file = directory / MANIFEST
    try:
        with open_plain(file) as stream:
            text = stream.read(_LARGEST_MANIFEST)
        document = parse_json(text) if text.endswith(b"\n") else None  # no line end: cut off
    except FileNotFoundError:
        raise CheckpointError("manifest.json is missing", str(directory), _HOW) from None
    except OSError as error:
        raise CheckpointError(f"cannot read manifest.json: {error.strerror}", str(file), _HOW) from error
    except ValueError as error:
        raise CheckpointError(f"the manifest is not JSON: {error}", str(file), _HOW) from None
    if not isinstance(document, dict):
        raise CheckpointError("the manifest is not a whole JSON object", str(file), _HOW)
    if document.pop("digest", None) != json_digest(document):
        raise CheckpointError("the manifest does not have its own SHA-256", str(file), _HOW)
    version = _known_version(document, file)
    try:
        content = json.dumps({**document, "directory": ".", "meta": document})
        found = TypeAdapter(Manifest).validate_json(content, strict=True)
    except ValidationError as error:
        raise CheckpointError(f"the manifest has no valid {'.'.join(map(str, error.errors()[0]['loc']))}", str(file),
                              _HOW) from None
    # This keeps every name inside the directory too.
    if [one.name for one in found.files] != [peer_file(index, version) for index in range(len(found.meta.peers))]:
        raise CheckpointError("the manifest has no valid files", str(file), _HOW)
    return replace(found, directory=directory)


def _known_version(document: dict[str, Any], file: Path) -> int:
    version, versions = document.get("format"), document.get("versions")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"unknown checkpoint format {version!r}", str(file), _HOW)
    if version > FORMAT:
        writer = versions.get("mat_dist", "a later one") if isinstance(versions, dict) else "a later one"
        raise TooNew(f"needs mat_dist >= {writer}: checkpoint format {version}, this mat_dist reads up to {FORMAT}",
                     str(file), "update mat_dist")
    return version


def verify(manifest: Manifest) -> None:
    """Read every file, one at a time. Raises CheckpointError as `read_file`."""
    for index in range(len(manifest.files)):
        read_file(manifest, index)


def read_file(manifest: Manifest, index: int) -> bytes:
    """The content of the file of peer `index`. Raises CheckpointError where it is missing, cannot be read, or differs
    from what was saved."""
    entry = manifest.files[index]
    file = manifest.directory / entry.name
    try:
        with open_plain(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            data = stream.read(entry.size) if size == entry.size else b""
    except OSError as error:
        raise CheckpointError(f"cannot read {entry.name}: {error.strerror}", str(file), _HOW) from error
    if size != entry.size:
        raise CheckpointError(f"{entry.name} has {size} bytes instead of {entry.size}", str(file), _HOW)
    found = hashlib.sha256(data).hexdigest()
    if found != entry.sha256:
        raise CheckpointError(f"{entry.name} differs from what was saved (SHA-256 {found[:12]}... instead of "
                              f"{entry.sha256[:12]}...)", str(file), _HOW)
    return data


def peer_file(index: int, version: int = FORMAT) -> str:
    """Name of the file of peer `index` in a format."""
    return f"peer_{index}.{'pt' if version == 1 else 'safetensors'}"


# ------------------------------------------------------------------------------------------------ the folder


def step_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def partial_directory(folder: RunFolder, step: int, attempt: int) -> Path:
    """Where the owners of the peers write before `commit`."""
    return folder.checkpoints / f".{step_name(step)}.{attempt}.partial"


def _directories(folder: RunFolder) -> list[tuple[int, Path]]:
    """(step, directory) of all checkpoints, newest first; one that is being replaced comes after its successor."""
    found = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for entry in folder.checkpoints.iterdir():
            name = _STEP.fullmatch(entry.name.removesuffix(_REPLACED))
            if name and entry.is_dir():
                found.append((int(name[1]), entry.suffix != _REPLACED, entry))
    return [(step, entry) for step, _, entry in sorted(found, reverse=True)]


def _names(folder: RunFolder) -> str:
    return ", ".join(entry.name for _, entry in _directories(folder))


def _manifest_of(step: int, directory: Path) -> Manifest:
    """The manifest in `directory`. Raises CheckpointError also if it is that of another step."""
    manifest = read_manifest(directory)
    if manifest.step != step:
        raise CheckpointError(f"the folder holds the checkpoint of step {manifest.step}", str(directory),
                              "do not rename checkpoint folders")
    return manifest


def _pointer(folder: RunFolder, which: str) -> int | None:
    """The step that the one-line file `which` (latest, best) names; None if there is no such file or line."""
    with suppress(OSError), open_plain(folder.checkpoints / which) as stream:
        name = _STEP.fullmatch(stream.read(100).decode(errors="replace").strip())
        return int(name[1]) if name else None
    return None


def _delete(directory: Path) -> None:
    """Remove a checkpoint: first its name at one stroke, then its files. Raises OSError."""
    hidden = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.deleted")
    os.rename(directory, hidden)
    shutil.rmtree(hidden)


# ------------------------------------------------------------------------------------------------ saving


def begin(folder: RunFolder, step: int, attempt: int) -> Path:
    """Make an empty `partial_directory` and remove what earlier, killed saves left. Raises OutputError."""
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

    An intact checkpoint of this step with the same bytes is kept, one with other bytes is replaced, a damaged one is
    renamed to `step_<n>.damaged`. Raises OutputError where the disk is full, ..., or a peer's file is not there; the
    partial directory is then removed and earlier checkpoints are untouched.
    """
    partial, target = partial_directory(folder, step, attempt), folder.checkpoints / step_name(step)
    by_name = {entry.name: entry for entry in entries}
    expected = [peer_file(index) for index in range(len(meta.peers))]
    if sorted(by_name) != sorted(expected):
        raise ValueError(f"{sorted(by_name)} are not the files of peers {list(meta.peers)}")
    files = tuple(by_name[name] for name in expected)
    document = {
        "format": FORMAT, "step": step, "epoch": meta.epoch, "attempt": attempt,
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"mat_dist": mat_dist.__version__, "torch": str(torch.__version__)},
        "config_digest": meta.config_digest, "data_digest": meta.data_digest, "peers": list(meta.peers),
        "files": [asdict(entry) for entry in files], "extra": dict(meta.extra)}
    try:
        with reported(partial):
            for entry in files:
                if not (file := partial / entry.name).is_file() or file.stat().st_size != entry.size:
                    raise OutputError(f"{entry.name} is not there as its owner wrote it", str(partial),
                                      "run.root must be one folder that all nodes share")
            write_json(partial / MANIFEST, {**document, "digest": json_digest(document)})
            if _make_way(target, files):
                os.rename(partial, target)
                fsync_directory(folder.checkpoints)
    except OutputError:
        abandon(folder, step, attempt)
        raise
    abandon(folder, step, attempt)  # still there if the checkpoint existed already
    write_text(folder.checkpoints / "latest", f"{target.name}\n")
    with suppress(OSError):  # the next begin tries again
        _remove_leftover(target.with_suffix(_REPLACED))
    return read_manifest(target)


def _remove_leftover(entry: Path) -> None:
    if entry.suffix == _REPLACED:
        if entry.exists() and entry.with_suffix("").exists():
            _delete(entry)
    elif entry.name.startswith(".") and entry.name.endswith(_LEFTOVER):
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


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
    os.rename(target, target.with_suffix(_REPLACED))
    return True


# ------------------------------------------------------------------------------------------------ finding


def find_newest(folder: RunFolder) -> tuple[Manifest, list[str]] | None:
    """The newest checkpoint whose files all have their digests, and a note for each newer one that has not; None if the
    run has no checkpoint at all. Writes nothing; see `adopt`. Raises TooNew where the newest one is of a later
    mat_dist, CheckpointError where there are checkpoints, but all are damaged."""
    refused: list[tuple[int, Path, str]] = []
    for step, directory in _directories(folder):
        try:
            manifest = _manifest_of(step, directory)
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
        raise CheckpointError(f"all {len(refused)} checkpoints are damaged; {newest.name}: {what}", str(
            folder.checkpoints), "restore the folder from a copy, or start a new run with another run.name")
    return None


def adopt(folder: RunFolder, manifest: Manifest) -> list[str]:
    """Make `manifest` (from `find_newest`) the latest checkpoint, before the training goes on from it.

    Newer ones, which `find_newest` has refused, are renamed to `step_<n>.damaged`: they must not count as kept
    checkpoints, nor pass for the newest one later. For the holder of the run's lock -> a note for each renamed one.
    Raises CheckpointError where the checkpoint is not in this folder.
    """
    there = [directory for _, directory in _directories(folder)]
    if manifest.directory not in there:
        raise CheckpointError(f"{manifest.directory.name} is not a checkpoint of this run", str(folder.checkpoints),
                              f"choose one of these: {_names(folder)}")
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
    """The manifest of `latest`, `best`, `step_<n>` or step n. Only `load_peer` and `verify` check the files. Raises
    CheckpointError where there is no such checkpoint, or its manifest is damaged."""
    if which in ("latest", "best"):
        step = _pointer(folder, str(which))
    else:
        number = re.fullmatch(r"(?:step_)?(\d{1,18})", str(which))
        step = int(number[1]) if number else None
    directory = folder.checkpoints / step_name(step or 0)
    if step is None or not directory.is_dir():
        raise CheckpointError(f"there is no checkpoint {which!r}" + (f" ({step_name(step)})" if step else ""),
                              str(folder.checkpoints), f"choose latest, best or one of these: {names}" if (
                                  names := _names(folder)) else "the run has none yet: train it")
    return _manifest_of(step, directory)


# ------------------------------------------------------------------------------------------------ keeping


@dataclass(frozen=True)
class Best:
    """The best checkpoint so far, its `score`, and under which attack it has that, by `mark_best`; "" where nobody
    recorded it."""

    step: int
    score: float
    attack: str = ""


def mark_best(folder: RunFolder, step: int, score: float, attack: str = "") -> None:
    """Let `best` name the checkpoint of `step`; `score.json` inside it tells why. Raises CheckpointError where there is
    none."""
    directory = load_manifest(folder, step).directory
    write_json(directory / _SCORE, {"score": score, "attack": attack})
    write_text(folder.checkpoints / "best", f"{directory.name}\n")


def read_best(folder: RunFolder) -> Best | None:
    """What `mark_best` recorded last; None if no checkpoint is marked, or the marked one is gone or damaged."""
    with suppress(CheckpointError, OSError, ValueError, KeyError, TypeError):
        manifest = load_manifest(folder, "best")
        told = parse_json((manifest.directory / _SCORE).read_bytes())
        return Best(manifest.step, float(told["score"]), str(told.get("attack", "")))
    return None


def prune(folder: RunFolder, keep: int) -> tuple[list[int], list[str]]:
    """Remove all but the newest `keep` complete checkpoints and the best one -> the steps that were removed, and a note
    for each one that could not be.

    Nothing goes before one of those that stay has been read back and found intact; if none is, the newest intact one
    stays as well. Damaged checkpoints neither count nor go.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    best = _pointer(folder, "best")
    complete = [manifest for step, directory in _directories(folder) if (manifest := _complete(step, directory))]
    kept = [one for number, one in enumerate(complete) if number < keep or one.step == best]
    surplus = [one for one in complete if one not in kept]
    if surplus and not any(map(_intact, kept)):
        intact = next(filter(_intact, surplus), None)
        surplus = [one for one in surplus if intact is not None and one is not intact]
    removed, notes = [], []
    for manifest in reversed(surplus):  # oldest first
        try:
            _delete(manifest.directory)
            removed.append(manifest.step)
        except OSError as error:
            notes.append(f"cannot remove {manifest.directory.name}: {error.strerror}; it is tried again later")
    return removed, notes


def _complete(step: int, directory: Path) -> Manifest | None:
    """The manifest if every file is there with its size; None for anything else."""
    with suppress(CheckpointError, OSError):
        manifest = _manifest_of(step, directory)
        sizes = [(directory / entry.name).stat().st_size for entry in manifest.files]
        if directory.suffix != _REPLACED and sizes == [entry.size for entry in manifest.files]:
            return manifest
    return None


def _intact(manifest: Manifest) -> bool:
    with suppress(CheckpointError):
        verify(manifest)
        return True
    return False
