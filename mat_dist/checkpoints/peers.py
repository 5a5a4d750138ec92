"""One peer's file: all tensors in a safetensors file, the rest as JSON in its metadata. docs/checkpoint.md.

A state is a nest of dictionaries (keys are text or whole numbers), lists and tuples of tensors, numbers, text and None.
It comes back as it was, types included. Format 2 is written; format 1, a file of torch.save, is still read.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from mat_dist.checkpoints.store import FileEntry, Manifest, Meta, peer_file, read_file
from mat_dist.errors import CheckpointError, NonFinite
from mat_dist.runs.files import parse_json, write_bytes

PART, OWNER = "state", "owner"  # entries of the metadata
TYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64", torch.uint32: "U32",
         torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
         torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}  # those of safetensors
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Snapshot:
    """A copy of a state on the CPU that later training steps do not touch."""

    tensors: dict[str, Tensor]  # by their dotted keys, e.g. `model.conv1.weight`; each with memory of its own
    # The state as plain JSON. `{"$tensor": name}` stands for a tensor, `{"$tuple": [...]}` for a tuple,
    # `{"$items": [[key, value], ...]}` for a dictionary whose keys are not all plain text, `{"$float": "nan"}` for a
    # number that JSON lacks.
    rest: Any
    owner: Mapping[str, Any] = field(default_factory=dict)  # of which peer, step and settings it is (`identity`)


def identity(meta: Meta, step: int, index: int) -> dict[str, Any]:
    """What tells a peer's file from those of other peers, steps and settings, whose manifest it may get."""
    return {"peer": meta.peers[index], "step": step, "config_digest": meta.config_digest}


def save_peer(directory: Path, index: int, state: dict[str, Any]) -> FileEntry:
    """`snapshot` and `write_peer` in one call."""
    return write_peer(directory, index, snapshot(state))


def snapshot(state: dict[str, Any], owner: Mapping[str, Any] | None = None) -> Snapshot:
    """Copy `state`. Dictionaries of any kind become plain ones. Raises CheckpointError, with its key, for what is
    neither a dense tensor, a number, text, None, nor a list, tuple or dict of those. `owner`: its `identity`."""
    tensors: dict[str, Tensor] = {}
    return Snapshot(tensors, _packed(state, "", tensors), owner or {})


def write_peer(directory: Path, index: int, copy: Snapshot) -> FileEntry:
    """Write what `snapshot` gave as `directory/peer_<index>.safetensors`: whole, with fsync, or not at all. Raises
    NonFinite: a tensor has NaN or infinite values; nothing is written; OutputError: the disk is full, read-only, gone,
    ...; no part of the file stays."""
    for key, tensor in copy.tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFinite("NaN or infinite values in what would be saved", f"peer {index}, {key}",
                            "nothing was written; continue from the last checkpoint with a lower learning rate or "
                            "gradient clipping (optim.clip_norm)")
    parts, digest = _parts(copy), hashlib.sha256()
    for part in parts:
        digest.update(part)
    entry = FileEntry(peer_file(index), sum(map(len, parts)), digest.hexdigest())
    write_bytes(directory / entry.name, *parts)
    return entry


def load_peer(manifest: Manifest, index: int) -> dict[str, Any]:
    """What was saved for peer `index`, on the CPU, in whatever format. The bytes whose SHA-256 is compared are those
    that are loaded. Raises CheckpointError: no such peer, or the file is missing, damaged, harmful or another's."""
    if not 0 <= index < len(manifest.files):
        raise CheckpointError(f"there is no peer {index}", str(manifest.directory),
                              f"choose one of 0 to {len(manifest.files) - 1}")
    data = read_file(manifest, index)
    file = str(manifest.directory / manifest.files[index].name)
    mine = identity(manifest.meta, manifest.step, index)
    try:
        content = migrated(_format_1(data)) if manifest.format == 1 else read_safetensors(data)
        if not isinstance(content, dict):
            raise ValueError(f"expected a dict, found {type(content).__name__}")
        told = {"peer": content.get("name", mine["peer"]),  # all that earlier versions told
                **({} if manifest.format == 1 else parse_json(_metadata(data).get(OWNER, "{}").encode()))}
    except Exception as error:  # damaged or hostile bytes make the libraries raise nearly anything
        raise CheckpointError(f"not a file of tensors and plain numbers: {reason(error)}", file,
                              "use a checkpoint from a source you trust; nothing in this one was executed") from error
    for key, value in mine.items():
        if told.get(key, value) != value:
            raise CheckpointError(f"the file is of {key} {str(told[key])[:80]}, the manifest is of {key} {value}", file,
                                  "restore the checkpoint from a copy, or use another one: files were exchanged")
    return content


def migrated(state: dict[str, Any]) -> dict[str, Any]:
    """A peer's state with the keys of today: what belongs to a method stands below `methods`, by its name."""
    if "methods" in state:
        return state
    methods = {"unions": {"eat": state["eat"]}} if "eat" in state else {}
    if "carried" in state:  # of one of the two, which one its settings tell
        methods |= {"warm_start": state["carried"], "free_at": state["carried"]}
    return {**{key: value for key, value in state.items() if key not in ("eat", "carried")}, "methods": methods}


# ------------------------------------------------------------------------------------------------ format 2


def _packed(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; copies of its tensors are added to `tensors`."""
    if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and value.dtype in TYPES:
        name = key
        while name in tensors or name == "__metadata__":  # {"a": {"b": x}, "a.b": y}
            name += "_"
        tensors[name] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {"$tensor": name}
    if type(value) in _PLAIN:
        return value if not isinstance(value, float) or math.isfinite(value) else {"$float": str(value)}
    items = [(name, _packed(item, f"{key}.{name}" if key else str(name), tensors)) for name, item in
             _items(value, key)]
    if isinstance(value, dict):
        plain = all(isinstance(name, str) and not name.startswith("$") for name in value)
        return dict(items) if plain else {"$items": items}
    listed = [item for _, item in items]
    return listed if isinstance(value, list) else {"$tuple": listed}


def _unpacked(node: Any, tensors: dict[str, Tensor]) -> Any:
    """What `_packed` was given. Raises ValueError, KeyError or TypeError for JSON that it cannot have made."""
    match node:
        case {"$tensor": name}:
            return tensors[name]
        case {"$float": text}:
            return float(text)
        case {"$tuple": items}:
            return tuple(_unpacked(item, tensors) for item in items)
        case {"$items": items}:
            content = {key: _unpacked(item, tensors) for key, item in items}
        case dict():
            content = {key: _unpacked(item, tensors) for key, item in node.items()}
        case list():
            return [_unpacked(item, tensors) for item in node]
        case _:
            return node
    _items(content, "")
    return content


def read_safetensors(data: bytes) -> Any:
    """The content of a safetensors file, on the CPU: the state that `write_peer` put there, else tensors by name.
    Raises what damaged or hostile bytes make safetensors and the reader of JSON raise."""
    rest = _metadata(data).get(PART)
    tensors = load(data)
    return tensors if rest is None else _unpacked(parse_json(rest.encode()), tensors)


def _metadata(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")  # of the header, which is JSON
    found: dict[str, str] = parse_json(data[8:8 + size]).get("__metadata__", {})
    return found


def _parts(copy: Snapshot) -> list[bytes | memoryview]:
    """The bytes of a safetensors file: length of the header, header, tensors, the widest first so that all are aligned.

    Not `safetensors.torch.save`: it stops all other threads, the training too, for 2.6 s per 526 MB, and copies the
    tensors once more. (`save_file` lets them run, but its errors have no errno and its files are private.)
    """
    header: dict[str, Any] = {"__metadata__": {PART: json.dumps(copy.rest, allow_nan=False),
                                                   OWNER: json.dumps(dict(copy.owner))}}
    content, end = list[memoryview](), 0
    for name, tensor in sorted(copy.tensors.items(), key=lambda item: -item[1].element_size()):
        content.append(tensor.reshape(-1).view(torch.uint8).numpy().data)
        begin, end = end, end + len(content[-1])
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *content]


def _items(value: Any, key: str) -> Iterable[tuple[Any, Any]]:
    """What a container holds, with keys or positions. Raises CheckpointError for what may not be in a state."""
    if type(value) in (list, tuple):
        return enumerate(value)
    foreign = [name for name in value if type(name) not in (str, int)] if isinstance(value, dict) else [value]
    if foreign:
        kind = type(foreign[0])
        raise CheckpointError(f"a {kind.__module__}.{kind.__qualname__} cannot be in a checkpoint", f"state.{key}",
                              "convert it to a dense tensor, a number, text, or a list or dict of these")
    return value.items()


# ------------------------------------------------------------------------------------------------ files of torch.save


def _format_1(data: bytes) -> Any:
    if not data.startswith(b"PK"):
        raise ValueError("not a zip archive")
    content = read_torch(data)
    _check(content, "", set())
    return content


def _check(value: Any, key: str, seen: set[int]) -> None:
    """Raise CheckpointError for anything that `snapshot` would not have saved.

    Containers are looked at once: a hostile file can hold one that contains itself, or the same one 2^50 times.
    """
    if type(value) not in (Tensor, *_PLAIN) and id(value) not in seen:
        seen.add(id(value))
        for name, item in _items(value, key):
            _check(item, f"{key}.{name}", seen)


def read_torch(data: bytes, skipped: list[str] | None = None) -> Any:
    """The content of a file of torch.save, on the CPU, read with `weights_only`. Nothing in it is executed.

    Args:
        skipped: gets the classes of other objects in the file, for which stand-ins are read; without it they are an
            error.

    Raises ValueError for a zip archive that takes more memory than the file, or whatever damaged and hostile bytes make
    zipfile, pickletools and torch raise.
    """
    pickles, count = io.BytesIO(data), _LEGACY_PICKLES
    if data.startswith(b"PK"):  # torch inflates compressed records, and counts one that is listed twice as two
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
            if any(one.compress_type != zipfile.ZIP_STORED for one in records):
                raise ValueError("compressed records")
            if sum(one.file_size for one in records) > len(data):
                raise ValueError("the records overlap")
            named = [one for one in records if one.filename.endswith("/data.pkl")]
            pickles, count = io.BytesIO(b"".join(map(archive.read, named))), len(named)
    stand_ins: list[Any] = []
    if skipped is not None:
        names = {name for _ in range(count) for name in _globals(pickles)}
        stand_ins = [(_stand_in(name, skipped), name) for name in names]  # torch prefers what it knows itself
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")


_LEGACY_PICKLES = 4  # of a file from before torch 1.6: a magic number, its version, the machine, the content
# They are called to make objects again: classes, which have a capital, and these. Calls of other functions are refused:
# they are what runs.
_CALLED = re.compile(r"(numpy|argparse|pathlib|datetime|collections|decimal|fractions|uuid|types)\b.*|"
                     r"functools\.partial|re\._compile|(?!subprocess|ctypes|multiprocessing).*\.[A-Z]\w*|"
                     r"builtins\.(bytes|complex|dict|float|frozenset|int|list|range|set|slice|str|tuple)")


def _globals(pickles: io.BytesIO) -> Iterator[str]:
    """What the next pickle names of Python's modules, in the names of today."""
    for operation, argument, _ in pickletools.genops(pickles):
        if operation.name == "GLOBAL":
            module, name = str(argument).split(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            yield f"{module}.{name}"


def _stand_in(full_name: str, skipped: list[str]) -> type:
    """A class in the place of another one. Its objects forget everything (numpy's), or are empty dictionaries, which
    take what a pickle puts into them; `skipped` gets the name when there is one."""
    def new(cls: type, *_: Any) -> Any:
        if full_name not in skipped and not full_name.startswith("builtins."):
            skipped.append(full_name)
        if full_name == "collections.deque":
            return []
        return object.__new__(cls) if full_name.startswith(("numpy.", "functools.")) else Counter()

    class Uncalled(type):
        def __call__(cls, *_: Any) -> Any:
            if not _CALLED.fullmatch(full_name):
                raise ValueError(f"it would call {full_name}")
            return new(cls)

    return Uncalled("StandIn", (), {"__new__": new, "__setstate__": lambda self, state: None})


def reason(error: Exception) -> str:
    """One line of at most 200 characters that tells why bytes could not be read."""
    text = " ".join(str(error).split())
    _, found, rest = text.partition("WeightsUnpickler error: ")
    if found:  # before and behind it, torch's text advises to trust the file
        text = rest.partition(" Please use")[0]
    return f"{type(error).__name__}: {text[:200]}"
