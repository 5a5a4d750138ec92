"""From YAML files and `key=value` settings to a checked, complete configuration.

Layers, lowest first: the files that `defaults` names, in order; the file; the command line. Mappings are merged
key by key, anything else is replaced. Then each peer's entry is laid over the sections that it shares with the top
level. A layer (or a peer) that changes `loss.preset` starts from its own coefficients: those that a lower layer gave
for another preset are dropped.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mat_dist.config import (  # noqa: F401  they register their rules
    rules,
    rules_attack,
    rules_learning,
    rules_sharing,
    rules_unions,
)
from mat_dist.config.fields import Section
from mat_dist.config.gone import is_gone, without_gone
from mat_dist.config.help import canonical, nearest, problem, settings
from mat_dist.config.presets import fill_attack, fill_loss, fill_optim, fill_threat
from mat_dist.config.registry import check
from mat_dist.config.schema import MAX_PEERS, Config, PeerConfig
from mat_dist.config.tree import (
    ALIASES,
    COMMAND_LINE,
    SHARED,
    Node,
    both_names,
    cut,
    joined,
    leaves,
    locate,
    merge,
    nest,
    normalise,
    normalise_sections,
    parse,
    plain,
    printable,
    read,
    section_class,
    without,
)
from mat_dist.errors import ConfigError

DEFAULT = "digits"
_MOST_FILES = 100  # a file may be named by several others, but not without end
_MOST_ERRORS = 100  # with more bad values than this the rules are not checked
_KEY = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*", re.ASCII)
ALL = "all"  # peers.all.x: the same for every peer
_HOW = "write key=value with a key such as train.epochs or peers.2.model (--help lists all)"


def config_folders() -> list[Path]:
    """Where the configurations that belong to the project are: the repository, or an installed wheel's data folder."""
    package = Path(__file__).resolve().parents[1]
    share = Path("share", "mat_dist", "configs")
    user = sysconfig.get_path("data", sysconfig.get_preferred_scheme("user"))
    return [package.parent / "configs", Path(sys.prefix, share), package.parent / share, Path(user, share)]


def _run_of(file: Path) -> str | None:
    """The file as in messages, where it holds the settings of a run in the run's folder."""
    return _display(file) if file.name == "config.yaml" and (file.parent / "environment.json").is_file() else None


def config_name(path: str | None) -> str:
    """The file's name without folder and `.yaml`, `digits` for None; fit to begin a run's name."""
    stem = os.path.basename(path or DEFAULT).removesuffix(".yaml").removesuffix(".yml")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:40] or "config"


def find_config(name: str, folders: Sequence[Path]) -> Path:
    """The file `name` or `name.yaml` in the first of `folders` that has it.

    Raises:
        ConfigError: there is none.
    """
    for folder in folders:
        for candidate in (name, f"{name}.yaml"):
            if os.path.isfile(folder / candidate):
                return folder / candidate
    known = sorted({path.stem for folder in config_folders() if folder.is_dir() for path in folder.glob("*.yaml")})
    near = nearest(os.path.basename(name).removesuffix(".yaml"), known)
    how = f"did you mean {near}?" if near else f"give the path of a YAML file or one of {', '.join(known)}"
    raise ConfigError("there is no such configuration file", ascii(name)[1:-1] or "no name", how)


def _display(path: Path) -> str:
    """The path for messages: relative where the file lies below the working directory."""
    absolute, here = os.path.abspath(path), os.getcwd() + os.sep
    return ascii(absolute.removeprefix(here))[1:-1]


class _Files:
    """Reads a file and those that its `defaults` name."""

    def __init__(self, problems: list[ConfigError]) -> None:
        self.problems, self.count = problems, 0

    def compose(self, path: Path, chain: tuple[str, ...] = ()) -> Node:
        """The merged tree of `path`; `chain` holds the files that led here, to find cycles."""
        source, real = _display(path), os.path.realpath(path)
        self.count += 1
        if real in chain:
            names = " -> ".join(os.path.basename(p) for p in (*chain[chain.index(real):], real))
            raise ConfigError(f"files that name each other: {names}", f"{source}, defaults", "remove one of the names")
        if self.count > _MOST_FILES:
            raise ConfigError(f"more than {_MOST_FILES} files", f"{source}, defaults", "name each file once")
        tree = read(str(path), source, self.problems)
        below = None
        for name in self._bases(tree.get("defaults")):
            try:
                base = find_config(name, [path.parent, *config_folders()])
            except ConfigError as missing:
                what = f"{missing.what}: {missing.where}"
                self.problems.append(ConfigError(what, f"{source}, defaults", missing.how))
                continue
            below = merge(below, self.compose(base, (*chain, real)))
        own = normalise(without(tree, "defaults"), self.problems)
        return merge(below, own) or own

    def _bases(self, node: Node | None) -> list[str]:
        names = [] if node is None or node.value is None else plain(node)
        names = [names] if isinstance(names, str) else names
        if node is not None and not (isinstance(names, list) and all(isinstance(n, str) and n for n in names)):
            self.problems.append(ConfigError("defaults is not a list of files", node.where, "write defaults: [base]"))
            return []
        return names


@dataclass(frozen=True)
class Override:
    """One `key=value`, its key cut at the dots and its value read."""

    path: tuple[str, ...]
    value: Node

    @property
    def rank(self) -> int:
        """Order of application: the number of peers, then presets, then what builds on them."""
        if self.path == ("peers",):
            return 0
        return 1 if self.path[-1] == "loss" or self.path[-2:] == ("loss", "preset") else 2


def _read(item: str, problems: list[ConfigError]) -> Override | None:
    """`key=value` as an Override; None, with the reason in `problems`, where it is not one."""
    key, equals, text = item.partition("=")
    if not equals or not _KEY.fullmatch(key):
        problems.append(ConfigError(f"{printable(item)} is not a setting", COMMAND_LINE, _HOW))
        return None
    if not text.strip():
        problems.append(ConfigError(f"{key} has no value", COMMAND_LINE, f"write {key}=VALUE; null empties a setting"))
        return None
    path = tuple(key.split("."))
    if path[0] == "defaults":
        problems.append(ConfigError("defaults is for files", f"{COMMAND_LINE}, {key}", "write --config FILE"))
        return None
    setting = settings().get(canonical(path))
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if setting is not None and setting.kind == "text" and text != "null" and not quoted:
        return Override(path, Node(text, COMMAND_LINE, key))  # run.name=007 is a name, not a number
    found: list[ConfigError] = []
    try:
        node = parse(text, COMMAND_LINE, found, key, numbered=False)
    except ConfigError as problem:
        found.append(problem)
    problems += found
    return None if found else Override(path, node)


def read_overrides(items: Sequence[str], problems: list[ConfigError]) -> list[Override]:
    """The overrides that can be read, in the order of application; what is wrong with the others goes to `problems`."""
    found = sorted(filter(None, (_read(item, problems) for item in items)), key=lambda override: override.rank)
    for alias in ALIASES:
        for other in found:
            twin = next((o for o in found if o.path == (*other.path[:-2], "attack", alias)), None)
            if other.path[-2:] == ("threat", alias) and twin is not None:
                problems.append(both_names(twin.value, other.value))
    return found


def expand_peers(tree: Node, source: str) -> Node:
    """`tree` with `peers` as a list: a number becomes that many empty entries, none at all the default number."""
    peers = tree.get("peers") or Node(len(Config.model_fields["peers"].default), source, "peers")
    if isinstance(peers.value, int) and not isinstance(peers.value, bool) and 1 <= peers.value <= MAX_PEERS:
        peers = replace(peers, value=tuple(Node({}, peers.source, f"peers.{n}") for n in range(peers.value)))
    return replace(tree, value={**tree.value, "peers": peers})


def _is_section(model: type[Section] | None, path: Sequence[str]) -> bool:
    for part in path:
        model = section_class(model, part) if model is not None else None
    return model is not None


def _layer(tree: Node, path: tuple[str, ...], value: Node, model: type[Section], problems: list[ConfigError]) -> Node:
    """`tree` (the top level, or a peer) with `value` at `path`."""
    if not path:
        empty = Node({}, value.source, value.key)
        return merge(tree, normalise_sections(value, problems, model)) or empty if value.value is not None else empty
    if value.value is None and (path == ("peers",) or _is_section(model, path)):
        return cut(tree, path)
    if path[-1].isdecimal() and len(path) > 1:
        path, value = path[:-1], _with_item(tree, path[:-1], int(path[-1]), value)
    return merge(tree, normalise_sections(nest(path, value), problems, model)) or tree


def _with_item(tree: Node, path: tuple[str, ...], index: int, value: Node) -> Node:
    """The list at `path` with one item replaced, or `value` itself where there is no such list."""
    current, depth = locate(tree, path)
    setting = settings().get(canonical(path))
    if setting is None or setting.kind != "numbers":
        return nest([str(index)], value)
    default = tuple(Node(item, value.source, value.key) for item in setting.default)
    items: Any = current.value if depth == len(path) else default
    if not isinstance(items, tuple) or index >= len(items):
        raise ConfigError(f"{'.'.join(path)} has {len(items) if isinstance(items, tuple) else 'no'} items", value.where,
                          f"set the whole list: {'.'.join(path)}=[...]")
    return replace(value, value=(*items[:index], value, *items[index + 1:]))


def _apply(tree: Node, override: Override, source: str, problems: list[ConfigError]) -> Node:
    path, value = override.path, override.value
    if path[0] != "peers" or len(path) == 1:
        return _layer(tree, path, value, Config, problems)
    tree = expand_peers(tree, source)
    peers = tree.value["peers"]
    if not isinstance(peers.value, tuple):
        return tree  # what is wrong with `peers` itself is reported when it is validated
    entries, which = list(peers.value), path[1]
    if which != ALL and not (which.isdecimal() and int(which) < len(entries)):
        raise ConfigError(f"there is no peer {which}", value.where,
                          f"the peers are 0 to {len(entries) - 1}, or {ALL}; more peers: peers={len(entries) + 1}")
    for n in range(len(entries)) if which == ALL else (int(which),):
        entries[n] = _layer(entries[n], path[2:], value, PeerConfig, problems)
    return replace(tree, value={**tree.value, "peers": replace(peers, value=tuple(entries))})


def apply_overrides(tree: Node, overrides: Sequence[Override], source: str, problems: list[ConfigError]) -> Node:
    """`tree` (the files, normalised; `source` names them) with the overrides; problems are added to `problems`."""
    for override in overrides:
        try:
            tree = _apply(tree, override, source, problems)
        except ConfigError as problem:
            problems.append(problem)
    return tree


def without_effect(overrides: Sequence[Override], peers: Sequence[Node], source: str) -> list[ConfigError]:
    """Overrides of shared sections that no peer takes over, since each has an own value (as in a resolved file)."""
    found = []
    for override in overrides:
        layer = normalise_sections(nest(override.path, override.value), [], Config)
        if override.path[0] not in SHARED or override.value.value is None or not isinstance(layer.value, dict):
            continue
        paths = [path for path, _ in leaves(layer) if not is_gone(path)]
        used = any(located.source == COMMAND_LINE and depth == len(path) for path in paths for peer in peers
                   for located, depth in [locate(peer, path)])
        if paths and not used:
            key = override.value.key
            found.append(ConfigError(f"{key} has no effect: each peer sets its own", f"{COMMAND_LINE}; {source}",
                                     f"write peers.{ALL}.{key}=... or peers.0.{key}=..."))
    return found


def _shorten(path: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The path of the setting that holds an item of a list."""
    return path[:-1] if canonical(path[:-1]) in settings() else path


def _validate(tree: Node, problems: list[ConfigError]) -> tuple[Node, frozenset[str]]:
    """Check every value by itself. Returns the tree without the bad ones, and the sections that had some."""
    try:
        Config.model_validate(plain(tree))
        return tree, frozenset()
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
    problems += [problem(found, tree, count) for count, found in enumerate(errors)]
    if len(errors) > _MOST_ERRORS:
        raise joined(problems, tree.source)
    for found in errors:
        tree = cut(tree, _shorten(found["loc"]))
    return expand_peers(tree, tree.source), frozenset(canonical(found["loc"]).split(".")[0] for found in errors)


def _under_peers(tree: Node) -> Node:
    """`tree` with complete peers: each entry laid over the shared sections, which are then left out."""
    shared = {name: tree.get(name) for name in SHARED}
    entries = []
    for entry in tree.value["peers"].value:
        sections = dict(entry.value)
        for name in SHARED:
            if (section := merge(shared[name], entry.get(name), name)) is not None:
                sections[name] = section
        entries.append(replace(entry, value=sections))
    top = {name: child for name, child in tree.value.items() if name not in SHARED}
    return replace(tree, value={**top, "peers": replace(tree.value["peers"], value=tuple(entries))})


def _filled(peer: PeerConfig, index: int, peers: int) -> PeerConfig:
    loss = fill_loss(peer.loss, index, peers, peer.role, peer.union)
    threat = fill_threat(peer.threat, peer.union)
    attack = fill_attack(peer.attack, loss.preset, index, threat)
    return peer.model_copy(update={"name": peer.name or f"peer{index}", "loss": loss, "threat": threat,
                                   "attack": attack, "optim": fill_optim(peer.optim, loss.preset),
                                   "stream": index if peer.stream is None else peer.stream})


def resolve(tree: Node) -> Config:
    """The configuration of a checked tree whose peers are complete; presets and defaults filled in."""
    config = Config.model_validate(plain(tree))
    peers = tuple(_filled(peer, index, len(config.peers)) for index, peer in enumerate(config.peers))
    return config.model_copy(update={"peers": peers})


def _placed(found: ConfigError, tree: Node, source: str) -> ConfigError:
    """A rule's problem (its `where` is a key) with the file and line that gave the value."""
    path = found.where.split(".")
    node, depth = locate(tree, path)
    if depth == len(path):
        return ConfigError(found.what, node.where, found.how)
    key = ".".join(path[2:]) if path[0] == "peers" and len(path) > 2 and path[2] in SHARED else found.where
    return ConfigError(found.what, f"{source}, {key}", found.how)


def load_config(path: str | None, overrides: Sequence[str] = ()) -> Config:
    """The complete configuration of a run.

    `peers` of the result holds complete entries: name, stream, loss and attack are filled in. The shared sections
    have done their work and are back at their defaults; read `config.peers` only.

    Args:
        path: a YAML file, or the name of one in the project's `configs`; None: `digits`.
        overrides: `key=value`, the value in YAML; keys with dots and list indices. `peers.all.x` is every peer.

    Raises:
        ConfigError: `problems` has everything that is wrong, each with the file, line and key.
        CheckpointError: the file is that of a run which an older version trained with settings that went.
    """
    problems: list[ConfigError] = []
    folders = config_folders() if path is None else [Path(), *config_folders()]
    file = find_config(DEFAULT if path is None else path, folders)
    source = _display(file)
    changes = read_overrides(overrides, problems)
    try:
        tree = _Files(problems).compose(file)
    except ConfigError as unreadable:
        raise joined([*problems, unreadable], source) from None
    tree = expand_peers(apply_overrides(tree, changes, source, problems), source)
    tree = without_gone(tree, problems, run=_run_of(file))
    tree, broken = _validate(tree, problems)
    complete = _under_peers(tree)
    sound = [change for change in changes if change.path[0] not in broken]
    problems += without_effect(sound, complete.value["peers"].value, source)
    config = resolve(complete)
    problems += [_placed(found, complete, source) for found in check(config, broken)]
    if problems:
        raise joined(problems, source)
    return config
