"""The manifest of a checkpoint: what belongs to it, and the SHA-256 of everything. docs/checkpoint.md.

Plain torch does not notice bit rot: of 300 single-bit flips in a 1 MB checkpoint it loaded 299 into other
weights without an error. So every file has its digest in the manifest, and the manifest has its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mat_dist.errors import CheckpointError
from mat_dist.runs.files import open_plain, parse_json

FORMAT = 2
"""Format version that is written; version 1 is read too. They differ in the peers' files alone."""

MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 1 << 24
_HOW = "use another checkpoint of the run; find_newest falls back to an intact one"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint: name, size in bytes, SHA-256 in lower-case hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Meta:
    """What the trainer says about a checkpoint."""

    epoch: int  # epochs finished
    peers: tuple[str, ...]  # names; peer i is in `peer_<i>.safetensors`
    config_digest: str  # of the settings that must not change on resume (`json_digest`)
    data_digest: str
    extra: Mapping[str, Any] = field(default_factory=dict)  # anything else, plain JSON values


@dataclass(frozen=True)
class Manifest:
    """A checkpoint in `directory`; `format` is the version it was written in, `saved` is UTC in ISO 8601."""

    directory: Path
    format: int
    step: int
    attempt: int
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


def document_of(step: int, attempt: int, meta: Meta, files: tuple[FileEntry, ...], versions: Mapping[str, str],
                saved: str) -> dict[str, Any]:
    """The content of `manifest.json`, its own digest included."""
    document = {
        "format": FORMAT, "step": step, "epoch": meta.epoch, "attempt": attempt, "saved": saved,
        "versions": dict(versions), "config_digest": meta.config_digest, "data_digest": meta.data_digest,
        "peers": list(meta.peers), "files": [asdict(entry) for entry in files], "extra": dict(meta.extra),
    }
    return {**document, "digest": json_digest(document)}


def read_manifest(directory: Path) -> Manifest:
    """The manifest in `directory`; its own digest and form are checked, the peers' files are not (see `verify`). Raises
    TooNew where a later mat_dist wrote it, CheckpointError where it is missing or damaged."""
    file = directory / MANIFEST
    document = _load(file)
    if document.pop("digest", None) != json_digest(document):
        raise CheckpointError("the manifest does not have its own SHA-256", str(file), _HOW)
    version = _known_version(document, file)
    try:
        return _parse(document, directory, version)
    except ValueError as error:
        raise CheckpointError(f"the manifest has no valid {error}", str(file), _HOW) from None


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


def _load(file: Path) -> dict[str, Any]:
    try:
        with open_plain(file) as stream:
            text = stream.read(_LARGEST_MANIFEST)
        document = parse_json(text) if text.endswith(b"\n") else None  # no line end: cut off
    except FileNotFoundError:
        raise CheckpointError("manifest.json is missing", str(file.parent), _HOW) from None
    except OSError as error:
        raise CheckpointError(f"cannot read manifest.json: {error.strerror}", str(file), _HOW) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the manifest is not JSON: {error}", str(file), _HOW) from None
    if not isinstance(document, dict):
        raise CheckpointError("the manifest is not a whole JSON object", str(file), _HOW)
    return document


def _known_version(document: dict[str, Any], file: Path) -> int:
    version, versions = document.get("format"), document.get("versions")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"unknown checkpoint format {version!r}", str(file), _HOW)
    if version > FORMAT:
        writer = versions.get("mat_dist", "a later one") if isinstance(versions, dict) else "a later one"
        raise TooNew(f"needs mat_dist >= {writer}: checkpoint format {version}, this mat_dist reads up to {FORMAT}",
                     str(file), "update mat_dist")
    return version


def _typed(document: Any, key: str, kind: type) -> Any:
    if type(document) is not dict or type(document.get(key)) is not kind or (kind is int and document[key] < 0):
        raise ValueError(repr(key))
    return document[key]


def _parse(document: dict[str, Any], directory: Path, version: int) -> Manifest:
    entries = _typed(document, "files", list)
    files = tuple(FileEntry(_typed(one, "name", str), _typed(one, "size", int), _typed(one, "sha256", str))
                  for one in entries)
    peers = tuple(str(name) for name in _typed(document, "peers", list))
    names = [peer_file(index, version) for index in range(len(peers))]  # also keeps every name inside the directory
    if not peers or [entry.name for entry in files] != names or not all(_SHA256.fullmatch(e.sha256) for e in files):
        raise ValueError("'files'")
    meta = Meta(_typed(document, "epoch", int), peers, _typed(document, "config_digest", str),
                _typed(document, "data_digest", str), _typed(document, "extra", dict))
    return Manifest(directory, version, _typed(document, "step", int), _typed(document, "attempt", int), meta, files,
                    _typed(document, "versions", dict), _typed(document, "saved", str))
