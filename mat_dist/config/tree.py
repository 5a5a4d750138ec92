"""Settings as given, each with its origin, before they are validated; YAML in and out.

A configuration is composed of layers (files, then the command line). Layers are trees of `Node`, so that an
error can name the file, line and key of the value that caused it.

ruamel.yaml finds the syntax. Which values there are is decided here: data only (no tags but YAML's own, no merge keys,
no duplicate keys), bounded in size, depth and number, and plain scalars of YAML 1.2's core schema (`1e-3` is a number;
`010`, `yes` and dates are text).
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mat_dist.config.fields import Section, methods_model
from mat_dist.config.schema import Config, LossConfig, PeerConfig
from mat_dist.errors import ConfigError

COMMAND_LINE = "command line"
DEFAULT_PRESET = LossConfig.model_fields["preset"].default
# A section given as plain text means this setting of it.
SHORTHANDS = {"model": "name", "threat": "norm", "loss": "preset", "union": "strategy"}
# These settings of `attack` are other names for settings of `threat`.
ALIASES = ("eps", "norm")
# Sections at the top level that are the defaults of every peer.
SHARED = tuple(name for name in PeerConfig.model_fields if name in Config.model_fields)
MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_VALUES = 50_000  # 256 peers written out in full are 25,000 keys and values
_MAX_DIGITS = 30  # longer numbers stay text: int() of a million digits takes minutes

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(rf"[-+]?(?:0|[1-9][0-9]{{0,{_MAX_DIGITS - 1}}})")
_FLOAT = re.compile(r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)")
_TAG = "tag:yaml.org,2002:"
# What YAML itself makes of plain text and brackets; `timestamp` and `value` (=) are text here.
_TAGS = ("null", "bool", "int", "float", "str", "timestamp", "value", "merge", "map", "seq")


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


def printable(text: str) -> str:
    """`text` for a message: ASCII, no control characters, at most 80 characters."""
    text = ascii(text)[1:-1]
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain_scalar(text: str) -> Any:
    """The value of a scalar without quotes: None, a truth value, a number, or text."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


@dataclass
class _Reader:
    """Turns ruamel.yaml's nodes into ours. Aliases are counted each time, so that they cannot explode."""

    source: str
    problems: list[ConfigError]
    numbered: bool
    count: int = 0

    def at(self, line: int) -> str:
        return f"{self.source}:{line + 1}" if self.numbered else self.source

    def fail(self, what: str, line: int, key: str, how: str) -> ConfigError:
        return ConfigError(what, f"{self.at(line)}, {key}" if key else self.at(line), how)

    def node(self, given: Any, key: str, depth: int = 0) -> Node:
        """The tree of a node of ruamel.yaml."""
        line, kind = given.start_mark.line, str(given.tag).removeprefix(_TAG)
        self.count += 1
        if kind not in _TAGS:
            raise self.fail(f"the tag {printable(str(given.tag))}", line, key,
                            "a configuration holds data only: remove the tag")
        if depth > MAX_DEPTH:
            raise self.fail(f"nested deeper than {MAX_DEPTH} levels", line, key, "remove brackets or aliases")
        if self.count > MAX_VALUES:
            raise self.fail(f"more than {MAX_VALUES} values", line, key, "remove some, or aliases of them")
        value: Any
        if given.id == "mapping":
            value = self.mapping(given, key, depth)
        elif given.id == "sequence":
            value = tuple(self.node(item, f"{key}.{number}" if key else str(number), depth + 1)
                          for number, item in enumerate(given.value))
        else:
            value = given.value if kind == "str" else _plain_scalar(given.value)
        return Node(value, self.at(line), key)

    def mapping(self, given: Any, key: str, depth: int) -> dict[str, Node]:
        values: dict[str, Node] = {}
        for name, child in given.value:
            line, word = name.start_mark.line, printable(str(name.value))
            inner = f"{key}.{word}" if key else word
            named = self.node(name, inner, depth + 1)
            value = self.node(child, inner, depth + 1)
            if name.id != "scalar" or not isinstance(named.value, str):
                self.problems.append(self.fail("a key that is not text", line, key, "give each setting its name"))
            elif name.tag == f"{_TAG}merge":
                self.problems.append(self.fail("merge keys (<<) are not read", line, key, "use `defaults: [FILE]`, or "
                                                                                          "the shared sections at the "
                                                                                          "top level"))
            elif name.value in values:
                self.problems.append(self.fail(f"the key {word} stands twice", line, inner,
                                               f"delete one; the first is at {values[name.value].source}"))
            else:
                values[name.value] = value
        return values


def parse(text: str, source: str, problems: list[ConfigError], key: str = "", *, numbered: bool = True) -> Node:
    """The tree of a YAML document. Keys that cannot be used are left out and added to `problems`.

    Raises:
        ConfigError: not YAML, or outside the subset above.
    """
    from ruamel.yaml import YAML, YAMLError  # loaded only where it is used

    reader, parser = _Reader(source, problems, numbered), YAML(typ="safe", pure=True)
    parser.composer.warn_double_anchors = False
    if len(text) > MAX_BYTES:
        raise reader.fail(f"more than {MAX_BYTES} characters", 0, key, "a configuration is a few kilobytes")
    try:
        root = parser.compose(text)
    except RecursionError:
        raise reader.fail(f"nested deeper than {MAX_DEPTH} levels", 0, key, "remove brackets") from None
    except (YAMLError, ValueError, LookupError, OverflowError) as error:  # directives, escapes beyond Unicode
        words = [getattr(error, name, None) for name in ("context", "problem")]
        what = ", ".join(filter(None, words)) or str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        line = mark.line if mark is not None else text.count("\n", 0, getattr(error, "position", 0))
        raise reader.fail(f"not YAML: {printable(what)}", line, key, "correct the text here") from None
    return Node(None, source, key) if root is None else reader.node(root, key)


def read(path: str, source: str, problems: list[ConfigError]) -> Node:
    """The mapping in the file `path`; `source` is its name in messages, `problems` as for `parse`.

    Raises:
        ConfigError: unreadable, too large, not UTF-8, not YAML, or not a mapping.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ConfigError(f"cannot read the file: {reason}", source, "check the path and its permissions") from None
    if len(data) > MAX_BYTES:
        raise ConfigError("larger than 1 MiB", source, "a configuration is a few kilobytes: check the path")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError("not UTF-8 text", f"{source}:{line}", "save the file as UTF-8") from None
    tree = parse(text, source, problems)
    if not isinstance(tree.value, dict):
        found = "nothing" if tree.value is None else "a list" if isinstance(tree.value, tuple) else "a single value"
        raise ConfigError(f"found {found} at the top level", source, "write `section:` lines with their settings below")
    return tree


def write(values: dict[str, Any]) -> str:
    """`values` as YAML that `parse` reads back to the same values, and a reader of YAML 1.1 too."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import SafeRepresenter

    class Representer(SafeRepresenter):
        def ignore_aliases(self, data: Any) -> bool:
            return True

        def represent_text(self, text: str) -> Any:
            return self.represent_scalar(f"{_TAG}str", text, style="'" if _plain_scalar(text) != text else None)

    Representer.add_representer(str, Representer.represent_text)
    writer: Any = YAML(typ="safe", pure=True)
    text = io.StringIO()
    writer.Representer, writer.version, writer.width = Representer, (1, 1), 120
    writer.allow_unicode = writer.default_flow_style = writer.sort_base_mapping_type_on_output = False
    writer.dump(values, text)
    return text.getvalue().partition("---\n")[2]  # without the version's line
