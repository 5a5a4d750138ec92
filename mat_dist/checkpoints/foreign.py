"""A checkpoint that no run of ours wrote: a state dict in a .pt or .safetensors file, and how it fits a network.

A file that would make anything but tensors and plain values is refused; nothing in it is executed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist.checkpoints.peers import read_safetensors, read_torch, reason
from mat_dist.errors import CheckpointError

SAFETENSORS = ".safetensors"
# Where training scripts put the weights beside other things, in the order of preference.
ENTRIES = ("state_dict", "model_state_dict", "model", "net")
WRAPPER = "module."  # DataParallel, DistributedDataParallel, AveragedModel
COMPILED = "_orig_mod."  # torch.compile, also of a part of a model
HOLDERS = ("", "model.", "net.")  # names under which training classes keep their network
NORMALISATIONS = (("normalize.mean", "normalize.std"), ("mean", "std"), ("mu", "sigma"))  # ours, and common ones
AVERAGED = "n_averaged"  # AveragedModel's counter
COUNTER = "num_batches_tracked"  # of batch norm, absent from files of old torch versions and without effect here
MOST_NAMES = 3  # of each kind in a message


@dataclass(frozen=True)
class StateDict:
    """Tensors of a file by name, in the file's order."""

    file: Path
    tensors: dict[str, Tensor]
    sha256: str  # of the file
    ordered: bool  # the order is that of the modules in the network that was saved
    notes: tuple[str, ...]  # what was unwrapped, in words
    mean: tuple[float, ...] | None = None  # per channel, where the file has a normalisation,
    std: tuple[float, ...] | None = None  # which is not among the tensors


def read_state_dict(file: Path) -> StateDict:
    """The state dict in a file, without what DataParallel and torch.compile put before names. Raises CheckpointError:
    no such file, or something else than tensors and plain values, or no state dict in it."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the file: {error.strerror}", str(file), "give the path of a state dict, "
                              "or the folder of a run") from error
    safe = file.suffix == SAFETENSORS
    try:
        content = read_safetensors(data) if safe else read_torch(data)
    except Exception as error:  # damaged or hostile bytes make the libraries raise nearly anything
        what, how = "a safetensors file", "use another checkpoint"
        if not safe:
            what = "a file of tensors and plain values"
            how = 'nothing in it was executed; save the tensors alone: torch.save(model.state_dict(), "FILE.pt")'
        raise CheckpointError(f"not {what}: {reason(error)}", str(file), how) from error
    tensors, notes = _unwrap(content, file)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError("NaN or infinite values in the weights", f"{file}, {key}", "use another checkpoint")
    mean, std = _take_normalisation(tensors)
    return StateDict(file, tensors, hashlib.sha256(data).hexdigest(), not safe, tuple(notes), mean, std)


def _unwrap(content: Any, file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict inside what was read, its names without wrappers, and what was taken away."""
    notes: list[str] = []
    while not _is_state_dict(content):
        entry = next((e for e in ENTRIES if isinstance(content, dict) and isinstance(content.get(e), dict)), None)
        if entry is None or len(notes) > len(ENTRIES):
            held = ", ".join(repr(str(key)[:40]) for key in list(content)[:8]) if isinstance(content, dict) else ""
            raise CheckpointError(f"no state dict in it, but {type(content).__name__} {held}".rstrip(), str(file),
                                  f"give tensors by name, alone or as one of the entries {', '.join(ENTRIES)}")
        notes.append(f"entry {entry!r}")
        content = content[entry]
    tensors = {key: value.detach() for key, value in content.items()}
    if any(COMPILED in key for key in tensors):
        tensors = {key.replace(COMPILED, ""): value for key, value in tensors.items()}
        notes.append(f"without {COMPILED}")
    tensors.pop(AVERAGED, None)
    while tensors and all(key.startswith(WRAPPER) for key in tensors):
        tensors = {key.removeprefix(WRAPPER): value for key, value in tensors.items()}
        notes.append(f"without {WRAPPER}")
    return tensors, notes


def _take_normalisation(tensors: dict[str, Tensor]) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and deviation of a normalisation layer, taken out of the tensors; (None, None) where there is none."""
    for names in NORMALISATIONS:
        if all(key in tensors for key in names):
            mean, std = (tuple(tensors.pop(key).double().flatten().tolist()) for key in names)
            return mean, std
    return None, None


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and len(content) > 0 and all(
        isinstance(key, str) and type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
        and not value.is_quantized for key, value in content.items())


# ------------------------------------------------------------------------------------------------ into a network


def fitted(state: StateDict, net: nn.Module, *, channels: int, classes: int) -> tuple[dict[str, Tensor], str]:
    """The tensors under the names of `net`, for `load_state_dict`, and how they were matched.

    By name; also where all names stand below `model.` or `net.`. Else, in files that keep the order of the modules, by
    order, if number, kinds (weight, bias, running_mean, ...) and shapes are all equal: implementations of one network
    differ in names more than in order.

    Raises CheckpointError with the first missing, unexpected and misshapen names and their numbers; or, where that
    is all, with the number of classes or channels, or the image size, that the weights are made for.
    """
    expected: Mapping[str, Tensor] = net.state_dict()
    tensors, holder = _without_holder(state.tensors, expected)
    pairs = _pairs(tensors, expected, state.ordered)
    if not pairs or any(tensors[mine].shape != expected[theirs].shape for mine, theirs in pairs):
        raise CheckpointError(_of_another_size(tensors, expected, pairs, channels, classes)
                              or _differences(tensors, expected), str(state.file),
                              "name the architecture that was trained (model=..., model.width=...; with other layers "
                              "or names: --plugin FILE.py), and its data set")
    found = {theirs: tensors[mine] for mine, theirs in pairs}
    how = "by order, kind and shape, since the names differ"
    if all(mine == theirs for mine, theirs in pairs):
        how = f"by name, without {holder}" if holder else "by name"
    return {key: found[key] if key in found else tensors.get(key, value) for key, value in expected.items()}, (
        f"matched {how}")


def _without_holder(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], str]:
    """The tensors under the names of the network, if those stand below one of HOLDERS; else as they are."""
    for holder in HOLDERS:
        if all(key.startswith(holder) for key in tensors):
            found = {key.removeprefix(holder): value for key, value in tensors.items()}
            if _weights(found).keys() == _weights(expected).keys():
                return found, holder
    return tensors, ""


def _weights(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in tensors.items() if not key.endswith(COUNTER)}


def _pairs(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], ordered: bool) -> list[tuple[str, str]]:
    """(name in the file, name in the network) of all weights, by name or by order; empty where neither works."""
    mine, theirs = list(_weights(tensors)), list(_weights(expected))
    if set(mine) == set(theirs):
        return [(key, key) for key in theirs]
    same_kinds = [key.rpartition(".")[2] for key in mine] == [key.rpartition(".")[2] for key in theirs]
    return list(zip(mine, theirs, strict=True)) if ordered and same_kinds else []


def _of_another_size(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], pairs: list[tuple[str, str]],
                     channels: int, classes: int) -> str | None:
    """What is wrong where all weights have a partner, and some another shape: classes, channels, size, or others."""
    wrong = [(mine, tuple(tensors[mine].shape), tuple(expected[theirs].shape)) for mine, theirs in pairs
             if tensors[mine].shape != expected[theirs].shape]
    if not wrong:
        return None
    if all(found and want[:1] == (classes,) and found[1:] == want[1:] for _, found, want in wrong):
        return f"the weights are for {wrong[0][1][0]} classes, the data have {classes}"
    if len(wrong) == 1 and wrong[0][2][1:2] == (channels,) and len(wrong[0][1]) == 4:
        return f"the weights take images of {wrong[0][1][1]} channels, the data have {channels}"
    shown = ", ".join(f"{key} {found} instead of {want}" for key, found, want in wrong[:MOST_NAMES])
    # A linear layer on a flattened map, or a transformer's positions.
    if all(len(want) in (2, 3) and found[:1] + found[2:] == want[:1] + want[2:] for _, found, want in wrong):
        return f"the weights are for images of another size ({shown}{_more(len(wrong))})"
    return f"{len(wrong)} of {len(pairs)} weights have another shape ({shown}{_more(len(wrong))})"


def _differences(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    mine, theirs = _weights(tensors), _weights(expected)
    parts = [_listed("missing", [key for key in theirs if key not in mine]),
             _listed("unexpected", [key for key in mine if key not in theirs]),
             _listed("of another shape", [f"{key} {tuple(mine[key])} instead of {tuple(theirs[key])}" for key in theirs
                                          if key in mine and mine[key] != theirs[key]])]
    return f"the weights do not fit the network: {'; '.join(part for part in parts if part)}"


def _listed(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind} ({', '.join(names[:MOST_NAMES])}{_more(len(names))})" if names else ""


def _more(count: int) -> str:
    return ", ..." if count > MOST_NAMES else ""
