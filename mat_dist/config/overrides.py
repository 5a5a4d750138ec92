"""`key=value` settings of the command line, as a layer over the files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mat_dist.config.describe import canonical, settings
from mat_dist.config.fields import Section
from mat_dist.config.nodes import (
    ALIASES,
    COMMAND_LINE,
    SHARED,
    Node,
    both_names,
    cut,
    leaves,
    locate,
    merge,
    nest,
    normalise_sections,
    section_class,
)
from mat_dist.config.schema import MAX_PEERS, Config, PeerConfig
from mat_dist.errors import ConfigError

_KEY = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*", re.ASCII)
ALL = "all"  # peers.all.x: the same for every peer
_HOW = "write key=value with a key such as train.epochs or peers.2.model (--help lists all)"


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
    from mat_dist.config.yaml_input import parse, printable  # PyYAML is loaded only where it is used

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
        used = any(located.source == COMMAND_LINE and depth == len(path) for path, _ in leaves(layer) for peer in peers
                   for located, depth in [locate(peer, path)])
        if not used:
            key = override.value.key
            found.append(ConfigError(f"{key} has no effect: each peer sets its own", f"{COMMAND_LINE}; {source}",
                                     f"write peers.{ALL}.{key}=... or peers.0.{key}=..."))
    return found
