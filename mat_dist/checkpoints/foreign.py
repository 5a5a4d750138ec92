"""A checkpoint that no run of ours wrote: the networks in a .pt or .safetensors file, and which of them fits a network.

A file is a tree of names. A network may stand anywhere in it, so whatever wrappers, training classes and scripts put
before its names is just a place. Nothing in a file is executed: objects that are neither tensors nor plain values are
left out if making them would run nothing, else the file is refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist.checkpoints.codes import CODES, Code
from mat_dist.checkpoints.peers import read_safetensors, read_torch, reason
from mat_dist.errors import CheckpointError, ConfigError

COMPILED = "_orig_mod."  # torch.compile, also of a part of a model
COUNTERS = ("num_batches_tracked", "n_averaged")  # of batch norm and of AveragedModel: without effect here
# Words for a mean and a deviation, whose names are else the same; a word ends where the letters end, or at a capital.
MEANS = ("mean", "means", "mu", "avg", "average")
DEVIATIONS = ("std", "stds", "sigma", "sd", "stdev", "stdevs", "stddev", "stddevs", "std_dev", "stdv", "dev",
              "deviation", "standard_deviation")
TOP = "."  # names the top of a file
MOST_NAMES = 3  # of each kind in a message
MOST_VALUES, LONGEST_NAME, LONGEST_LIST = 200_000, 2000, 64  # of a file's tree
BY_NAME, BY_ORDER = "by name", "by order, kind and shape, since the names differ"
BY_CODE = "by the names of a published code"
Normalisation = tuple[str, tuple[float, ...], tuple[float, ...]]  # name in the file, mean and deviation


@dataclass(frozen=True)
class TensorFile:
    """Tensors of a file by dotted name, in the file's order."""

    file: Path
    tensors: dict[str, Tensor]
    sha256: str  # of the file
    ordered: bool  # the order is that of the modules in the network that was saved
    skipped: tuple[str, ...] = ()  # classes of objects that were left out


@dataclass(frozen=True)
class Network:
    """A network in a file that fits one of ours."""

    source: TensorFile
    place: str  # what stands before its names in the file; ends with a dot where it is not empty
    names: dict[str, str]  # name in our network -> name in the file, of all weights
    by: str  # how they were matched, in words
    code: Code | None = None  # whose names they are, where they are not those of our network
    notes: tuple[str, ...] = ()  # what is worth telling, a line each
    moments: Normalisation | None = None  # that the architecture has by itself
    drawn: tuple[str, ...] = ()  # the weights of a new last layer, which stay as they were drawn
    stem: tuple[str, ...] = ()  # the first convolution, of whose kernels the middle is taken

    @property
    def classes(self) -> int:
        """That the file's last layer tells apart, where another one is drawn."""
        return int(self.source.tensors[self.names[self.drawn[0]]].shape[0]) if self.drawn else 0

    @property
    def label(self) -> str:
        return self.place.rstrip(".") or TOP

    def state(self, net: nn.Module) -> dict[str, Tensor]:
        """The weights under the names of `net`; its own counters where the file has none of that shape."""
        own, tensors = net.state_dict(), self.source.tensors
        found = {key: tensors.get(self.names.get(key, self.place + key), value) for key, value in own.items()}
        for key in self.stem:
            cut = [(theirs - ours) // 2 for theirs, ours in zip(found[key].shape[2:], own[key].shape[2:], strict=True)]
            found[key] = found[key][..., cut[0]:cut[0] + own[key].shape[2], cut[1]:cut[1] + own[key].shape[3]]
        return {key: value if value.shape == own[key].shape else own[key] for key, value in found.items()}

    def normalisations(self, channels: int) -> list[Normalisation]:
        """The pairs of per-channel tensors that stand nearest in the file, as far as they differ."""
        used = set(self.names.values())
        found: dict[int, dict[tuple[tuple[float, ...], tuple[float, ...]], str]] = {}
        for pair in _moments(self.source.tensors):
            values = [self.source.tensors[name].double().flatten() for name in pair]
            if used.isdisjoint(pair) and all(len(value) in (1, channels) for value in values):
                near = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(
                    pair[0].split("."), self.place.split("."), strict=False)))
                mean, std = (tuple(value.expand(channels).tolist()) for value in values)
                found.setdefault(near, {}).setdefault((mean, std), pair[0])
        return [(name, mean, std) for (mean, std), name in found[max(found)].items()] if found else []

    def normalisation(self, channels: int, how: str) -> Normalisation | None:
        """The one that stands nearest in the file, else the architecture's; None where there is none. Raises
        ConfigError, with `how` to mend it, where several differ, or it is not for pixels in [0, 1]."""
        found, file = self.normalisations(channels), str(self.source.file)
        if len(found) > 1:
            raise ConfigError(f"the file has {len(found)} normalisations: {', '.join(one[0] for one in found)}", file,
                              how)
        for name, mean, std in found:
            if not all(0 <= m <= 1 for m in mean) or not all(0 < s <= 1 for s in std):
                raise ConfigError(f"the normalisation {name} of the file is not for pixels in [0, 1]: "
                                  f"{moments_text(mean, std)}", file, how)
        return found[0] if found else self.moments

    def origin(self, found: Normalisation) -> str:
        """Whose it is, in words."""
        return "of the architecture" if found is self.moments else f"of the file ({found[0]})"


def read_tensors(file: Path) -> TensorFile:
    """All tensors in a file. Raises CheckpointError: no such file, objects in it that would run something, or no
    tensor in it."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read the file: {error.strerror}", str(file), "give the path of a state dict, "
                              "or the folder of a run") from error
    safe, skipped = file.suffix == ".safetensors", list[str]()
    try:
        content = read_safetensors(data) if safe else read_torch(data, skipped)
        leaves = {name.replace(COMPILED, ""): value for name, value in _leaves(content, "", [0])}
    except Exception as error:  # damaged or hostile bytes make the libraries raise nearly anything
        what, how = "a safetensors file", "use another checkpoint"
        if not safe:
            what = "a file of tensors and plain values"
            how = 'nothing in it was executed; save the tensors alone: torch.save(model.state_dict(), "FILE.pt")'
        raise CheckpointError(f"not {what}: {reason(error)}", str(file), how) from error
    if not leaves:
        held = ", ".join(ascii(key)[:40] for key in list(content)[:8]) if isinstance(content, dict) else ""
        kind = f"objects of {', '.join(skipped[:MOST_NAMES])}" if skipped else f"{type(content).__name__} {held}"
        raise CheckpointError(f"no state dict in it, but {kind}".rstrip(), str(file), "nothing in it was executed; "
                              'save tensors by name: torch.save(model.state_dict(), "FILE.pt")')
    return TensorFile(file, leaves, hashlib.sha256(data).hexdigest(), not safe, tuple(skipped))


def _leaves(content: Any, name: str, count: list[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a tree by dotted name, and lists of numbers that may be a mean or a deviation. Raises ValueError
    for a tree without end: a hostile file can hold a dictionary that contains itself, or the same one 2^50 times."""
    count[0] += 1
    if count[0] > MOST_VALUES or len(name) > LONGEST_NAME:
        raise ValueError("too many or too deep entries")
    numbers = content if type(content) in (list, tuple) else [content]
    if type(content) in (Tensor, nn.Parameter) and content.layout == torch.strided and not (
            content.is_quantized or content.is_meta):
        yield name, content.detach()
    elif numbers and all(type(value) in (int, float) for value in numbers):
        if len(numbers) <= LONGEST_LIST and any(_has(word, _words(name), "") is not None
                                                for word in (*MEANS, *DEVIATIONS)):
            yield name, torch.tensor(numbers, dtype=torch.float64)
    elif isinstance(content, dict) or (type(content) in (list, tuple) and len(content) <= LONGEST_LIST):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _leaves(value, f"{name}.{key}" if name else str(key), count)


def moments_text(mean: Sequence[float], std: Sequence[float]) -> str:
    """A mean and a deviation per channel, for people."""
    mean_text, std_text = ("/".join(f"{value:.4g}" for value in values) for values in (mean, std))
    return f"mean {mean_text}, std {std_text}"


def _words(name: str) -> str:
    """A name in small letters, its words apart: pixelMean is pixel_mean."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _has(word: str, name: str, instead: str) -> str | None:
    """The name with another word instead; None where it does not have the word."""
    found, count = re.subn(rf"(?<![a-z]){word}(?![a-z])", instead, name)
    return found if count else None


def _moments(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Names of tensors that differ in the words of a mean and a deviation alone."""
    spelt = {_words(name): name for name in tensors}
    for name, shown in spelt.items():
        for mean, std in product(MEANS, DEVIATIONS) if any(map(name.__contains__, MEANS)) else ():
            other = _has(mean, name, std)
            if other in spelt:
                yield shown, spelt[other]


# ------------------------------------------------------------------------------------------------ into a network


def find_network(source: TensorFile, net: nn.Module, *, channels: int, classes: int, entry: str | None = None,
                 choose: str = "entry={}", adapt: bool = False) -> Network:
    """The network in a file that fits ours: by the names of `net`, or in the order of its modules by kind and shape.

    Args:
        channels, classes: of the data, that the weights are made for.
        entry: where in the file to look; the start of the names of the network that is meant.
        choose: how a user writes that, with {} for the entry.
        adapt: whether it may be for other classes, whose last layer is left out, and have larger kernels in the stem.

    Raises CheckpointError where none fits, ConfigError where several do that differ, or there is no such entry.
    """
    expected: Mapping[str, Tensor] = net.state_dict()
    start = "" if entry in (None, TOP) else f"{entry}."
    found = [one for one in _candidates(source, net)
             if one.place.startswith(start) and (entry != TOP or not one.place)]
    fits = [fit for one in found if (fit := _fitting(one, expected, classes, adapt))]
    if not fits:
        raise _misfit(source, start, found, net, channels, classes)
    distinct = [one for number, one in enumerate(fits) if not any(_equal(one, other) for other in fits[:number])]
    if len(distinct) > 1:
        labels = [one.label for one in distinct]
        raise ConfigError(f"the file holds {len(labels)} networks that fit: {', '.join(labels[:8])}", str(source.file),
                          f"write {' or '.join(choose.format(label) for label in labels[:8])}")
    _check_values(distinct[0])
    return _told(distinct[0], fits, net)


def _misfit(source: TensorFile, start: str, found: Sequence[Network], net: nn.Module, channels: int,
            classes: int) -> CheckpointError | ConfigError:
    """What is wrong where no network in the file, below `start`, fits ours; some may be `found` of other shapes."""
    tensors = {key: value for key, value in source.tensors.items() if key.startswith(start)}
    if not tensors:
        tops = dict.fromkeys(key.partition(".")[0] for key in source.tensors)
        return ConfigError(f"there is no entry {start[:-1]!a} with tensors", str(source.file),
                           f"choose from {', '.join(list(tops)[:8])}")
    expected, own, how = net.state_dict(), _own_moments(net), ""
    what = _differences(tensors, {key: value for key, value in expected.items() if key not in own})
    if found:
        _code(found[0], net)
        what = _of_another_size(found[0], expected, channels, classes)
        if any(_fitting(one, expected, classes, True) for one in found):
            how = "; a training takes the other layers with init_from=pretrained:FILE"
    return CheckpointError(what, str(source.file), "name the architecture that was trained (model=..., model.width=...;"
                           f" with other layers or names: --plugin FILE.py), and its data set{how}")


def _fitting(one: Network, expected: Mapping[str, Tensor], classes: int, adapt: bool) -> Network | None:
    """The same where the shapes are equal, or may be made so."""
    stem = next((key for key, value in expected.items() if value.ndim == 4), None)
    shapes = [(key, tuple(one.source.tensors[name].shape), tuple(expected[key].shape)) for key, name in
              one.names.items()]
    wrong = [pair for pair in shapes if pair[1] != pair[2]]
    drawn = tuple(key for key, theirs, ours in wrong if ours[:1] == (classes,) and theirs[1:] == ours[1:])
    cut = tuple(key for key, theirs, ours in wrong if key == stem and theirs[:2] == ours[:2] and all(
        more >= less and more % 2 == less % 2 for more, less in zip(theirs[2:], ours[2:], strict=True)))
    if not wrong or (adapt and len(wrong) == len(drawn) + len(cut)):
        return replace(one, drawn=drawn, stem=cut)
    return None


def _check_values(network: Network) -> None:
    """Raises CheckpointError for weights that are no finite real numbers."""
    for key in network.names.values():
        tensor, where = network.source.tensors[key], f"{network.source.file}, {key}"
        if not tensor.is_floating_point():  # codes of a quantised network, which need their scales
            raise CheckpointError(f"the weights are {str(tensor.dtype).removeprefix('torch.')}, no real numbers",
                                  where, "save the network's own weights, in floating point")
        if not tensor.isfinite().all():
            raise CheckpointError("NaN or infinite values in the weights", where, "use another checkpoint")


def _code(found: Network, net: nn.Module) -> Code | None:
    """The published code whose names the weights have. Raises CheckpointError where it computes something else."""
    code = found.code or next((one for one in CODES if found.by == BY_ORDER and one.same and any(
        f".{one.layers['norm1']}." in name for name in found.names.values())), None)
    if code and code.same != any(getattr(module, "same", False) for module in net.modules()):
        raise CheckpointError(f"its names are those of {code.text}; the network computes something else",
                              str(found.source.file), f"{'write +dm behind' if code.same else 'leave +dm out of'} the "
                              "name of the model, such as model=wrn_28_10+dm, or register the original network: "
                              "--plugin FILE.py")
    return code


def _told(chosen: Network, fits: Sequence[Network], net: nn.Module) -> Network:
    """The chosen network with what is worth telling about it."""
    source, used = chosen.source, set(chosen.names.values())
    notes = [f"weights {f'of {chosen.label!a} ' if chosen.place else ''}matched {chosen.by}"]
    if code := _code(chosen, net):
        notes.append(f"its names are those of {code.text}")
    if chosen.drawn:
        count = net.state_dict()[chosen.drawn[0]].shape[0]
        notes.append(f"a new last layer ({', '.join(chosen.drawn)}) for {count} classes, the weights are for "
                     f"{chosen.classes}")
    if chosen.stem:
        notes.append(f"of the kernels of the first convolution, {chosen.names[chosen.stem[0]]}, the middle is taken")
    if missing := [key for key in _own_moments(net) if key not in chosen.names]:
        notes.append(f"the network's own {', '.join(missing)} stay, since the file has none")
    if twins := [one.label for one in fits if one is not chosen]:
        notes.append(f"equal weights stand at {', '.join(map(ascii, twins[:MOST_NAMES]))}")
    ignored = used.union(*_moments(source.tensors), *(one.names.values() for one in fits))
    left = [key for key in source.tensors if key not in ignored and not key.endswith(COUNTERS)]
    if left:
        notes.append(f"left out: {_listed('tensors beside the network', left)}")
    if source.skipped:
        notes.append(f"left out: objects of {', '.join(source.skipped[:8])}; nothing of them was executed")
    own = getattr(net, "normalisation", None)
    return replace(chosen, notes=tuple(notes), moments=("", tuple(own[0]), tuple(own[1])) if own else None)


def _equal(one: Network, other: Network) -> bool:
    if one.names.keys() != other.names.keys():
        return False
    pairs = [(one.source.tensors[name], other.source.tensors[other.names[key]]) for key, name in one.names.items()]
    return all(mine.dtype == theirs.dtype and torch.equal(mine, theirs) for mine, theirs in pairs)


def _candidates(source: TensorFile, net: nn.Module) -> list[Network]:
    """Networks in the file that have the names of ours, or its kinds of tensors in its order; shapes may differ."""
    tensors, own, expected = source.tensors, _own_moments(net), net.state_dict()
    want = [key for key in expected if not key.endswith(COUNTERS) and key not in own]
    moments = {name for pair in _moments(tensors) for name in pair}
    places, found = _places(tensors), list[Network]()
    codes: list[tuple[Code | None, dict[str, str]]] = [(None, {key: key for key in want})]
    codes += [(code, {key: called[key] for key in want}) for code in CODES if (called := code.names(expected))]
    for place, names in places.items():
        for code, theirs in codes:
            if all(place + name in tensors for name in theirs.values()):
                mine = {key: place + name for key, name in theirs.items()} | {
                    key: place + key for key in own if code is None and place + key in tensors}
                stems = {_stem(name) for name in (*theirs.values(), *(code.layers.values() if code else ()))}
                known = moments.union(mine.values())
                # More layers of the same kind: it is a larger network than ours.
                if not any(_stem(name.removeprefix(place)) in stems for name in names
                           if name not in known and not name.endswith(COUNTERS)):
                    found.append(Network(source, place, mine, BY_CODE if code else BY_NAME, code))
    named = {name for one in found for name in one.names.values()}
    kinds = [name.rpartition(".")[2] for name in want]  # weight, bias, running_mean, ...
    for place, names in reversed(places.items()) if source.ordered else ():  # the longest place of equal ones
        every = [name for name in names if not name.endswith(COUNTERS)]
        for some in (every, [name for name in every if name not in moments]):
            if [name.rpartition(".")[2] for name in some] == kinds and named.isdisjoint(some):
                found.append(Network(source, place, dict(zip(want, some, strict=True)), BY_ORDER))
                named.update(some)
    return found


def _own_moments(net: nn.Module) -> dict[str, None]:
    """The buffers of a normalisation inside the network, which files often do not have."""
    return dict.fromkeys(name for pair in _moments(dict(net.named_buffers())) for name in pair)


def _places(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names that stand below each place in a file."""
    places: dict[str, list[str]] = {}
    for name in tensors:
        for part in re.finditer(r"^|\.", name):
            places.setdefault(name[:part.end()], []).append(name)
    return places


def _stem(key: str) -> str:
    return key.partition(".")[0].rstrip("0123456789_")


# ------------------------------------------------------------------------------------------------ what does not fit


def _of_another_size(network: Network, expected: Mapping[str, Tensor], channels: int, classes: int) -> str:
    """What is wrong where all weights have a partner, and some another shape: classes, channels, size, or others."""
    pairs = [(mine, tuple(network.source.tensors[mine].shape), tuple(expected[theirs].shape))
             for theirs, mine in network.names.items()]
    wrong = [pair for pair in pairs if pair[1] != pair[2]]
    mine, found, want = wrong[0]
    if all(theirs and ours[:1] == (classes,) and theirs[1:] == ours[1:] for _, theirs, ours in wrong):
        return f"the weights are for {found[0]} classes, the data have {classes}"
    if len(wrong) == 1 and len(found) == len(want) == 4:
        if want[1] == channels and found[:1] + found[2:] == want[:1] + want[2:]:
            return f"the weights take images of {found[1]} channels, the data have {channels}"
        if found[:2] == want[:2]:
            return (f"the convolution {mine} has kernels of {found[2]}x{found[3]}, that of the network for images of "
                    f"this size {want[2]}x{want[3]}")
    shown = ", ".join(f"{key} {theirs} instead of {ours}" for key, theirs, ours in wrong[:MOST_NAMES])
    # A linear layer on a flattened map, or a transformer's positions.
    if all(len(ours) in (2, 3) and theirs[:1] + theirs[2:] == ours[:1] + ours[2:] for _, theirs, ours in wrong):
        return f"the weights are for images of another size ({shown}{_more(len(wrong))})"
    return f"{len(wrong)} of {len(pairs)} weights have another shape ({shown}{_more(len(wrong))})"


def _differences(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What lacks and what is too much at the place in the file that has most of the names."""
    theirs = {key: value.shape for key, value in expected.items() if not key.endswith(COUNTERS)}
    place = max(_places(tensors), key=lambda one: (sum(one + key in tensors for key in theirs), -len(one)))
    mine = {key.removeprefix(place): value.shape for key, value in tensors.items()
            if key.startswith(place) and not key.endswith(COUNTERS)}
    parts = [_listed("missing", [key for key in theirs if key not in mine]),
             _listed("unexpected", [key for key in mine if key not in theirs]),
             _listed("of another shape", [f"{key} {tuple(mine[key])} instead of {tuple(theirs[key])}" for key in theirs
                                          if key in mine and mine[key] != theirs[key]])]
    return f"the weights do not fit the network: {'; '.join(part for part in parts if part)}"


def _listed(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind} ({', '.join(names[:MOST_NAMES])}{_more(len(names))})" if names else ""


def _more(count: int) -> str:
    return ", ..." if count > MOST_NAMES else ""
