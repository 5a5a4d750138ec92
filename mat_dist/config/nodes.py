"""Settings as given, each with its origin, before they are validated.

A configuration is composed of layers (files, then the command line). Layers are trees of `Node`, so that an
error can name the file, line and key of the value that caused it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mat_dist.config.fields import Section
from mat_dist.config.methods import methods_model
from mat_dist.config.schema import Config, LossConfig, PeerConfig
from mat_dist.errors import ConfigError

COMMAND_LINE = "command line"
DEFAULT_PRESET = LossConfig.model_fields["preset"].default
# A section given as plain text means this setting of it.
SHORTHANDS = {"model": "name", "threat": "norm", "loss": "preset", "union": "strategy"}
# These settings of `attack` are other names for settings of `threat`.
ALIASES = ("eps", "norm")
# Sections at the top level that are the defaults of every peer.
SHARED = ("model", "threat", "union", "attack", "loss", "optim", "methods")


@dataclass(frozen=True)
class Node:
    """A value, its source (`file:line` or `command line`) and its dotted key as the user wrote it."""

    value: Any  # dict[str, Node], tuple[Node, ...] or a scalar
    source: str
    key: str

    @property
    def where(self) -> str:
        """The origin for an error message."""
        return f"{self.source}, {self.key}" if self.key else self.source

    def get(self, name: str) -> Node | None:
        """The node of a key of a mapping, None where there is none."""
        return self.value.get(name) if isinstance(self.value, dict) else None


def joined(problems: Sequence[ConfigError], where: str) -> ConfigError:
    """One error that holds all of `problems` (at least one), each once."""
    unique = list({str(found): found for found in problems}.values())
    if len(unique) == 1:
        return unique[0]
    return ConfigError(f"{len(unique)} problems", where, " | ".join(map(str, unique)), list(unique))


def plain(node: Node) -> Any:
    """The values alone, as dicts, lists and scalars."""
    if isinstance(node.value, dict):
        return {name: plain(child) for name, child in node.value.items()}
    if isinstance(node.value, tuple):
        return [plain(child) for child in node.value]
    return node.value


def locate(node: Node, path: Sequence[str | int]) -> tuple[Node, int]:
    """The deepest node on `path` and the number of path parts that lead to it."""
    for depth, part in enumerate(path):
        child = None
        if isinstance(node.value, dict):
            child = node.value.get(str(part))
        elif isinstance(node.value, tuple) and str(part).isdecimal() and int(part) < len(node.value):
            child = node.value[int(part)]
        if child is None:
            return node, depth
        node = child
    return node, len(path)


def merge(low: Node | None, high: Node | None, name: str = "") -> Node | None:
    """`high` over `low`: mappings key by key, anything else replaced.

    A `loss` section that changes the preset replaces the lower one: coefficients that were given for another
    preset do not leak into it.
    """
    if low is None or high is None:
        return low if high is None else high
    if not (isinstance(low.value, dict) and isinstance(high.value, dict)):
        return high
    if name == "loss" and (preset := high.get("preset")) is not None:
        before = low.get("preset")
        if preset.value != (before.value if before else DEFAULT_PRESET):
            return high
    merged = {key: merge(low.get(key), high.get(key), key) for key in {**low.value, **high.value}}
    return replace(high, value=merged)


def nest(path: Sequence[str], value: Node) -> Node:
    """A tree that holds `value` at `path`."""
    for part in reversed(path):
        value = Node({part: value}, value.source, value.key)
    return value


def without(tree: Node, name: str) -> Node:
    """A mapping without one of its keys."""
    return replace(tree, value={key: child for key, child in tree.value.items() if key != name})


def cut(tree: Node, path: Sequence[str | int]) -> Node:
    """`tree` without what is at `path`. An entry of a list becomes an empty mapping: the others keep their place."""
    part, *rest = path
    child, depth = locate(tree, [part])
    if depth == 0:
        return tree
    if isinstance(tree.value, dict):
        return replace(tree, value={**tree.value, str(part): cut(child, rest)}) if rest else without(tree, str(part))
    items = list(tree.value)
    items[int(part)] = cut(child, rest) if rest else replace(child, value={})
    return replace(tree, value=tuple(items))


def leaves(tree: Node, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Node]]:
    """Every value below the mappings of `tree`, with its path; an empty mapping is a value."""
    if not isinstance(tree.value, dict) or not tree.value:
        yield path, tree
        return
    for name, child in tree.value.items():
        yield from leaves(child, (*path, name))


def _without_empty_sections(tree: Node, model: type[Section]) -> Node:
    """Leave out sections with nothing under their name (all of their settings may be commented out)."""
    if not isinstance(tree.value, dict):
        return tree
    kept = {}
    for name, child in tree.value.items():
        inner = section_class(model, name)
        if child.value is None and (inner is not None or name == "peers"):
            continue
        kept[name] = _without_empty_sections(child, inner) if inner else child
    return replace(tree, value=kept)


def section_class(model: type[Section], name: str) -> type[Section] | None:
    """The class of the section `name` inside `model`, None if it is not a section."""
    if name == "methods" and name in model.model_fields:
        return methods_model()
    annotation = model.model_fields[name].annotation if name in model.model_fields else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def normalise_sections(tree: Node, problems: list[ConfigError], model: type[Section]) -> Node:
    """Expand the shorthands in a mapping of sections: the top level (`Config`) or a peer (`PeerConfig`).

    `model: resnet18` becomes `model: {name: resnet18}`, `attack.eps` becomes `threat.eps`, and an empty section
    is left out.
    """
    tree = _without_empty_sections(tree, model)
    if not isinstance(tree.value, dict):
        return tree
    sections = dict(tree.value)
    for name, field in SHORTHANDS.items():
        if name in sections and isinstance(sections[name].value, str):
            sections[name] = nest([field], sections[name])
    attack = sections.get("attack")
    for alias in ALIASES:
        moved = attack.get(alias) if attack else None
        if attack is None or moved is None:
            continue
        attack = sections["attack"] = without(attack, alias)
        threat = sections.get("threat", Node({}, moved.source, moved.key))
        twice = threat.get(alias)
        if twice is not None:
            problems.append(both_names(moved, twice))
        elif isinstance(threat.value, dict):
            sections["threat"] = replace(threat, value={**threat.value, alias: moved})
    return replace(tree, value=sections)


def both_names(alias: Node, setting: Node) -> ConfigError:
    """The problem of a setting that is given under both of its names."""
    return ConfigError(f"{alias.key} is another name for {setting.key}, and both are given",
                       f"{alias.where}; {setting.where}", f"keep {setting.key} and delete {alias.key}")


def normalise(tree: Node, problems: list[ConfigError]) -> Node:
    """`normalise_sections` for a whole layer: the top level and each entry of `peers`."""
    tree = normalise_sections(tree, problems, Config)
    peers = tree.get("peers")
    if peers is None or not isinstance(peers.value, tuple):
        return tree
    entries = tuple(normalise_sections(replace(entry, value={}) if entry.value is None else entry, problems, PeerConfig)
                    for entry in peers.value)
    return replace(tree, value={**tree.value, "peers": replace(peers, value=entries)})
