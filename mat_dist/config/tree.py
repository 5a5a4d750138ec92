"""Settings as given, each with its origin, before they are validated; YAML in and out.

A configuration is composed of layers (files, then the command line). Each value is a `Node`, so that an error can
name the file, line and key that gave it.

ruamel.yaml finds the syntax. Which values there are is decided here: data only (no tags but YAML's own, no merge keys,
no duplicate keys), bounded in size, depth and number, and plain scalars of YAML 1.2's core schema (`1e-3` is a number;
`010`, `yes` and dates are text).
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_origin

from mat_dist.config.fields import Section
from mat_dist.config.gone import MOVED
from mat_dist.config.methods import methods_model
from mat_dist.config.schema import Config, LossConfig, PeerConfig, ThreatConfig
from mat_dist.errors import ConfigError

COMMAND_LINE = "command line"
_DEFAULTS = {"loss": LossConfig.model_fields["preset"].default, "threat": ThreatConfig.model_fields["norm"].default}
_IN_ITS_NORM = [("threat", "eps"), ("attack", "step_size")]
# A section given as plain text means this setting of it.
SHORTHANDS = {"model": "name", "threat": "norm", "loss": "preset", "union": "strategy"}
# These settings of `attack` are other names for settings of `threat`.
ALIASES = ("eps", "norm")
# Other name -> setting, those of version 0.1 too.
OTHER_NAMES = {**{f"attack.{name}": f"threat.{name}" for name in ALIASES}, **MOVED}
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


Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Node:
    """A value, its source (`file:line` or `command line`) and its dotted key as the user wrote it."""

    value: Any  # a scalar, a list, or {}: what is in a mapping has nodes of its own
    source: str
    key: str

    @property
    def where(self) -> str:
        """The origin for an error message."""
        return f"{self.source}, {self.key}" if self.key else self.source


# The nodes of nested mappings, by path. A list is one node, but for lists of mappings: these have paths with numbers.
Tree = dict[Path, Node]


def joined(problems: Sequence[ConfigError], where: str) -> ConfigError:
    """One error that holds all of `problems` (at least one), each once."""
    unique = list({str(found): found for found in problems}.values())
    if len(unique) == 1:
        return unique[0]
    return ConfigError(f"{len(unique)} problems", where, " | ".join(map(str, unique)), list(unique))


def plain(tree: Tree) -> Any:
    """The values alone, as dicts, lists and scalars."""
    if () in tree:
        return tree[()].value
    values: dict[Any, Any] = {}
    for path, node in tree.items():
        inner = values
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = node.value
    return _with_lists(values)


def _with_lists(values: Any) -> Any:
    """Dicts whose keys are numbers as lists."""
    if not isinstance(values, dict):
        return values
    inner = {key: _with_lists(value) for key, value in values.items()}
    return [inner[key] for key in sorted(inner)] if inner and all(isinstance(key, int) for key in inner) else inner


def locate(tree: Tree, path: Sequence[str | int]) -> tuple[Node, int]:
    """The node at `path`, or the first one below it; else of the nearest mapping around it. And how far that leads."""
    for depth in range(len(path), -1, -1):
        head = tuple(path[:depth])
        if head in tree:
            return tree[head], depth
        for inside, node in tree.items():
            if inside[:depth] == head:
                parts = node.key.split(".")
                section = len(parts) == len(inside) and node.source != COMMAND_LINE
                return Node({}, node.source, ".".join(parts[:depth]) if section else node.key), depth
    return Node({}, "", ""), 0


def over(low: Tree, high: Tree) -> Tree:
    """`high` over `low`: mappings key by key, anything else replaced, as are peers.

    A `loss` section that changes the preset replaces the lower one: coefficients that were given for another
    preset do not leak into it. Nor do a radius and a step length into another norm.
    """
    if any(path[:1] == ("peers",) for path in high):
        low = cut(low, ("peers",))
    for section, name, lost in (("loss", "preset", [("loss",)]), ("threat", "norm", _IN_ITS_NORM)):
        chosen, before = high.get((section, name)), low.get((section, name))
        if chosen is not None and chosen.value != (before.value if before else _DEFAULTS[section]):
            low = {path: node for path, node in low.items() if not any(path[:len(one)] == one for one in lost)}
    sections = {path[:depth] for path in high for depth in range(len(path))}
    values = {path for path, node in high.items() if node.value != {}}
    kept = {path: node for path, node in low.items()
            if path not in sections and not any(path[:depth] in values for depth in range(len(path) + 1))}
    inside = {path[:depth] for path in kept for depth in range(len(path))}
    return {**kept, **{path: node for path, node in high.items() if path not in inside}}


def cut(tree: Tree, path: Path) -> Tree:
    """`tree` without what is at `path` and below it; a peer stays, and so does a mapping that had nothing else."""
    kept = {one: node for one, node in tree.items() if one[:len(path)] != path}
    if len(path) == 2 and _in_entry(path):
        kept[path] = Node({}, locate(tree, path)[0].source, "")
    elif path[:-1] and len(kept) < len(tree) and not any(one[:len(path) - 1] == path[:-1] for one in kept):
        kept[path[:-1]] = Node({}, locate(tree, path)[0].source, "")
    return kept


def section_class(model: type[Section] | None, path: Sequence[str | int]) -> type[Section] | None:
    """The class of the section at `path` inside `model`, None if it is not a section."""
    for name in map(str, path):
        field = model.model_fields.get(name) if model is not None else None
        if field is None:
            return None
        kind = methods_model() if name == "methods" else field.annotation
        model = kind if isinstance(kind, type) and issubclass(kind, Section) else None
    return model


def can_be_empty(model: type[Section], path: Sequence[str | int]) -> bool:
    """Whether null at `path` means nothing given: of a section, and of a mapping of arguments. At the section of a
    method it means that the method is not used."""
    if len(path) == 2 and path[0] == "methods":
        return False
    inside = section_class(model, path[:-1]) if path else None
    field = inside.model_fields.get(str(path[-1])) if inside is not None else None
    return section_class(model, path) is not None or (field is not None and get_origin(field.annotation) is dict)


def both_names(alias: Node, setting: Node) -> ConfigError:
    """The problem of a setting that is given under both of its names."""
    return ConfigError(f"{alias.key} is another name for {setting.key}, and both are given",
                       f"{alias.where}; {setting.where}", f"keep {setting.key} and delete {alias.key}")


def normalised(tree: Tree, problems: list[ConfigError], model: type[Section]) -> Tree:
    """The sections of the top level (`Config`) or of a peer (`PeerConfig`), without short forms.

    `model: resnet18` becomes `model: {name: resnet18}`, `attack.eps` becomes `threat.eps`, old names become new ones,
    and a section with nothing under its name is left out (all of its settings may be commented out).
    """
    tree = {(path[0], SHORTHANDS[str(path[0])]) if len(path) == 1 and path[0] in SHORTHANDS and
            isinstance(node.value, str) else path: node for path, node in tree.items()
            if node.value is not None or not can_be_empty(model, path)}
    for other, name in OTHER_NAMES.items():
        moved, path = tree.pop(tuple(other.split(".")), None), tuple(name.split("."))
        there = [tree[path[:depth]] for depth in range(1, len(path) + 1) if path[:depth] in tree]
        if moved is not None and there:
            problems.append(both_names(moved, there[0]))
        elif moved is not None:
            tree[path] = moved
    return tree


def layer_of(tree: Tree, problems: list[ConfigError]) -> Tree:
    """Settings of a file or of the command line without short forms."""
    given = tree.get(("peers",), Node({}, "", ""))
    if given.value is None:
        tree = cut(tree, ("peers",))
    elif isinstance(given.value, list) and given.value:  # of empty entries, or of scalars
        tree = with_entries(cut(tree, ("peers",)), [{(): Node(value, given.source, f"peers.{n}")}
                                                    for n, value in enumerate(given.value)])
    top = normalised({path: node for path, node in tree.items() if not _in_entry(path)}, problems, Config)
    return with_entries(top, [normalised(entry, problems, PeerConfig) for entry in entries(tree)])


def _in_entry(path: Path) -> bool:
    return len(path) > 1 and path[0] == "peers" and isinstance(path[1], int)


def entries(tree: Tree) -> list[Tree]:
    """The peers that are listed; none where only their number is given."""
    found: dict[str | int, Tree] = {}
    for path, node in tree.items():
        if _in_entry(path):
            found.setdefault(path[1], {})[path[2:]] = node
    return list(found.values())


def with_entries(tree: Tree, peers: Sequence[Tree]) -> Tree:
    """`tree` with these peers in place of the listed ones; one without settings is there too."""
    empty = {(): Node({}, "", "")}
    return {path: node for path, node in tree.items() if not _in_entry(path)} | {
        ("peers", n, *path): node for n, entry in enumerate(peers) for path, node in (entry or empty).items()}


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
    """Turns ruamel.yaml's nodes into `tree`. Aliases are counted each time, so that they cannot explode."""

    source: str
    problems: list[ConfigError]
    key: str
    numbered: bool
    count: int = 0
    tree: Tree = field(default_factory=dict)

    def node(self, value: Any, line: int, path: Path) -> Node:
        key = ".".join([self.key] * bool(self.key) + [printable(str(part)) for part in path])
        return Node(value, f"{self.source}:{line + 1}" if self.numbered else self.source, key)

    def fail(self, what: str, line: int, how: str, path: Path = ()) -> ConfigError:
        return ConfigError(what, self.node(None, line, path).where, how)

    def scalar(self, given: Any, path: Path) -> Any:
        """Count a node, check its tag -> its value where it is a scalar."""
        line, kind = given.start_mark.line, str(given.tag).removeprefix(_TAG)
        self.count += 1
        if kind not in _TAGS:
            raise self.fail(f"the tag {printable(str(given.tag))}", line,
                            "a configuration holds data only: remove the tag", path)
        if len(path) > MAX_DEPTH:
            raise self.fail(f"nested deeper than {MAX_DEPTH} levels", line, "remove brackets or aliases", path)
        if self.count > MAX_VALUES:
            raise self.fail(f"more than {MAX_VALUES} values", line, "remove some, or aliases of them", path)
        return given.value if kind == "str" or given.id != "scalar" else _plain_scalar(given.value)

    def add(self, given: Any, path: Path) -> None:
        """Put a node and what is in it into `tree`."""
        value = self.scalar(given, path)
        if given.id == "mapping":
            self.mapping(given, path)
        elif given.id == "sequence" and any(item.id != "scalar" and item.value for item in given.value):
            for number, item in enumerate(given.value):
                self.add(item, (*path, number))
        else:
            if given.id == "sequence":
                value = [{"mapping": {}, "sequence": []}.get(item.id, self.scalar(item, (*path, number)))
                         for number, item in enumerate(given.value)]
            self.tree[path] = self.node(value, given.start_mark.line, path)

    def mapping(self, given: Any, path: Path) -> None:
        lines: dict[str, int] = {}
        for name, child in given.value:
            line, inner = name.start_mark.line, (*path, str(name.value))
            named = self.scalar(name, inner)
            if name.id != "scalar" or not isinstance(named, str):
                self.problems.append(self.fail("a key that is not text", line, "give each setting its name", path))
            elif name.tag == f"{_TAG}merge":
                self.problems.append(self.fail("merge keys (<<) are not read", line, "use `defaults: [FILE]`, or the "
                                               "shared sections at the top level", path))
            elif named in lines:
                first = self.node(None, lines[named], ()).source
                self.problems.append(self.fail(f"the key {printable(named)} stands twice", line,
                                               f"delete one; the first is at {first}", inner))
            else:
                lines[named] = child.start_mark.line
                self.add(child, inner)
        if not lines:
            self.tree[path] = self.node({}, given.start_mark.line, path)


def parse(text: str, source: str, problems: list[ConfigError], key: str = "", *, numbered: bool = True) -> Tree:
    """The tree of a YAML document. Keys that cannot be used are left out and added to `problems`.

    Raises:
        ConfigError: not YAML, or outside the subset above.
    """
    from ruamel.yaml import YAML, YAMLError  # loaded only where it is used

    reader, parser = _Reader(source, problems, key, numbered), YAML(typ="safe", pure=True)
    parser.composer.warn_double_anchors = False
    try:
        root = parser.compose(text)
    except RecursionError:
        raise reader.fail(f"nested deeper than {MAX_DEPTH} levels", 0, "remove brackets") from None
    except (YAMLError, ValueError, LookupError, OverflowError) as error:  # directives, escapes beyond Unicode
        words = [getattr(error, name, None) for name in ("context", "problem")]
        what = ", ".join(filter(None, words)) or str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        line = mark.line if mark is not None else text.count("\n", 0, getattr(error, "position", 0))
        tabbed = "\t" in text.split("\n")[min(line, text.count("\n"))]
        what = "a tab, which YAML does not take here" if tabbed else printable(what)
        how = "write spaces" if tabbed else "correct the text here"
        raise reader.fail(f"not YAML: {what}", line, how) from None
    if root is None:
        return {(): Node(None, source, key)}
    reader.add(root, ())
    return reader.tree


def read(path: str, source: str, problems: list[ConfigError]) -> Tree:
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
    alone = tree.get(())
    if alone is not None and alone.value == {}:
        return {}
    if alone is not None or any(isinstance(path[0], int) for path in tree):
        found = "a list" if alone is None or isinstance(alone.value, list) else \
            "nothing" if alone.value is None else "a single value"
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
