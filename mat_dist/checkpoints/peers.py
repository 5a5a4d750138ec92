"""One peer's file: tensors and plain numbers only, read without running anything that lies in it."""

from __future__ import annotations

import hashlib
import io
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from mat_dist.checkpoints.manifest import (
    FileEntry,
    Manifest,
    check_digest,
    check_size,
    migrate_peer,
    peer_file,
)
from mat_dist.errors import CheckpointError, NonFinite
from mat_dist.runs.files import write_bytes

_PLAIN = (bool, int, float, str, type(None))


def save_peer(directory: Path, index: int, state: dict[str, Any]) -> FileEntry:
    """`snapshot` and `write_peer` in one call."""
    return write_peer(directory, index, snapshot(state))


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of `state` on the CPU that later training steps do not touch.

    Tensors become contiguous CPU tensors with storage of their own (a view would drag its whole storage into the file);
    dicts of any kind become plain dicts.

    Raises:
        CheckpointError: something is neither a dense tensor, a number, text, None, nor a list, tuple or dict of
            those; the text gives its key.
    """
    copy: dict[str, Any] = _copied(state, "state")
    return copy


def write_peer(directory: Path, index: int, content: dict[str, Any]) -> FileEntry:
    """Write what `snapshot` gave as `directory/peer_<index>.pt`: whole, with fsync, or not at all.

    Raises:
        NonFinite: a tensor has NaN or infinite values; nothing is written.
        OutputError: the disk is full, read-only, gone, ...; no part of the file stays.
    """
    for key, tensor in _tensors(content, ""):
        if not torch.isfinite(tensor).all():
            raise NonFinite("NaN or infinite values in what would be saved", f"peer {index}, {key}",
                            "nothing was written; continue from the last checkpoint with a lower learning rate or "
                            "gradient clipping (optim.clip_norm)")
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with buffer.getbuffer() as data:
        entry = FileEntry(peer_file(index), len(data), hashlib.sha256(data).hexdigest())
        write_bytes(directory / entry.name, data)
    return entry


def load_peer(manifest: Manifest, index: int, *, verify: bool = True, require: Sequence[str] = ()) -> dict[str, Any]:
    """What was saved for peer `index`, on the CPU.

    The bytes that are checked are the bytes that are loaded. Loading is `weights_only`: a file with any other
    pickled object is refused before anything in it runs.

    Args:
        manifest: from `find_newest` or `load_manifest`.
        index: peer, 0 to P - 1.
        verify: compare the SHA-256 with the manifest's.
        require: top-level keys that must be there.

    Raises:
        CheckpointError: no such peer, or the file is missing, damaged, harmful or incomplete.
    """
    if not 0 <= index < len(manifest.files):
        raise CheckpointError(f"there is no peer {index}", str(manifest.directory),
                              f"choose one of 0 to {len(manifest.files) - 1}")
    entry = manifest.files[index]
    file = manifest.directory / entry.name
    try:
        with file.open("rb") as stream:
            data = stream.read(entry.size + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {entry.name}: {error.strerror}", str(file),
                              "use another checkpoint") from error
    if verify:
        check_size(len(data), entry, file)
        check_digest(hashlib.sha256(data).hexdigest(), entry, file)
    content = migrate_peer(_unpack(data, file), manifest.format)
    missing = [key for key in require if key not in content]
    if missing:
        raise CheckpointError(f"{entry.name} lacks {', '.join(missing)}; it has {', '.join(map(str, content))}",
                              str(file), "use a checkpoint that a training run has saved")
    return content


def _unpack(data: bytes, file: Path) -> dict[str, Any]:
    how = "use a checkpoint from a source you trust; nothing in this one was executed"
    try:
        check_archive(data, harmless)
        content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        _check(content, str(file), set())
    except CheckpointError:
        raise
    except Exception as error:  # damaged or hostile bytes make zipfile, pickletools and torch raise nearly anything
        text = " ".join(str(error).split())[:200]
        raise CheckpointError(f"not a file of tensors and plain numbers: {type(error).__name__}: {text}", str(file),
                              how) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"expected a dict, found {type(content).__name__}", str(file), how)
    return content


def check_archive(data: bytes, allowed: Callable[[str, str], bool]) -> None:
    """Raise ValueError for a file that torch.save cannot have written, or that names objects that are not allowed.

    torch.load(weights_only=True) also inflates compressed records and calls a few constructors with sizes of
    the file's choice; both would let a small file take all memory.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = archive.infolist()
        if any(one.compress_type != zipfile.ZIP_STORED for one in records):
            raise ValueError("compressed records")
        if sum(one.file_size for one in records) > len(data):
            raise ValueError("the records overlap")
        for record in records:
            if record.filename.endswith(".pkl"):
                check_pickle(io.BytesIO(archive.read(record)), allowed)


def check_pickle(program: BinaryIO, allowed: Callable[[str, str], bool]) -> None:
    """Raise ValueError for a pickle that makes other objects than those allowed; nothing of it is run.

    Args:
        program: read up to the end of one pickle.
        allowed: (module, name) of an object.
    """
    for code, argument, _ in pickletools.genops(program):
        if code.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"pickle operation {code.name}")
        if code.name == "GLOBAL" and not allowed(*str(argument).split(" ", 1)):
            raise ValueError(f"foreign object {'.'.join(str(argument).split())}")


def harmless(module: str, name: str) -> bool:
    """Whether torch.save names this object when it writes tensors, numbers and containers."""
    if module == "torch":
        return name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)
    return (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3"),
                              ("torch.storage", "UntypedStorage"), ("collections", "OrderedDict"))


def _copied(value: Any, key: str) -> Any:
    if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_quantized:
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        _check_keys(value, key)
        return {name: _copied(item, f"{key}.{name}") for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item, f"{key}.{number}") for number, item in enumerate(value))
    if type(value) in _PLAIN:
        return value
    raise _foreign(value, key)


def _check(value: Any, key: str, seen: set[int]) -> None:
    """Raise CheckpointError for anything that `snapshot` would not have saved.

    Containers are looked at once: a hostile file can hold one that contains itself, or the same one 2^50 times.
    """
    if type(value) in (Tensor, *_PLAIN) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        _check_keys(value, key)
        for name, item in value.items():
            _check(item, f"{key}.{name}", seen)
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            _check(item, f"{key}.{number}", seen)
    else:
        raise _foreign(value, key)


def _check_keys(value: dict[Any, Any], key: str) -> None:
    for name in value:
        if type(name) not in (str, int):
            raise _foreign(name, key)


def _foreign(value: Any, key: str) -> CheckpointError:
    return CheckpointError(f"a {type(value).__module__}.{type(value).__qualname__} cannot be in a checkpoint", key,
                           "convert it to a dense tensor, a number, text, or a list or dict of these")


def _tensors(value: Any, key: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield key.lstrip("."), value
    elif isinstance(value, (dict, list, tuple)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(item, f"{key}.{name}")
