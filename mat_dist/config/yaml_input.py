"""YAML in and out: the safe subset that a configuration needs, with the line of every value.

Stricter than PyYAML's SafeLoader: no tags, no merge keys, no duplicate keys, bounded size, depth and number of
values; scalars follow YAML 1.2's core schema (`1e-3` is a number; `010`, `yes` and dates are text).
"""

from __future__ import annotations

import os
import re
from typing import Any, ClassVar

import yaml

from mat_dist.config.nodes import Node
from mat_dist.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_VALUES = 50_000  # 256 peers written out in full are 25,000 keys and values
_MAX_DIGITS = 30  # longer numbers stay text: int() of a million digits takes minutes

_BOOL, _INT, _FLOAT, _NULL, _TEXT = (f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "null", "str"))
_SCALARS = (
    (_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    (_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    (_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    (_FLOAT, re.compile(
        r"^[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"),
     list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's composer with bounds; the construction of values is `_node`'s."""

    yaml_implicit_resolvers: ClassVar[dict[str, list]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.values += 1
        mark = self.peek_event().start_mark
        if self.depth > MAX_DEPTH + 1:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        if self.values > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_VALUES} values", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that the loader or another YAML 1.1 reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    ours = any(pattern.match(text) for _, pattern, _ in _SCALARS)
    return dumper.represent_scalar(_TEXT, text, style="'" if ours else None)


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
_Dumper.add_representer(str, _represent_text)


class _Builder:
    """Turns PyYAML's nodes into ours. Counts aliases each time they are used, so that they cannot explode."""

    def __init__(self, source: str, problems: list[ConfigError], numbered: bool) -> None:
        self.source, self.problems, self.numbered, self.count = source, problems, numbered, 0

    def _at(self, mark: Any) -> str:
        return f"{self.source}:{mark.line + 1}" if self.numbered and mark is not None else self.source

    def fail(self, what: str, mark: Any, key: str, how: str) -> ConfigError:
        where = self._at(mark)
        return ConfigError(what, f"{where}, {key}" if key else where, how)

    def node(self, found: yaml.Node, key: str, depth: int = 0) -> Node:
        self.count += 1
        if depth > MAX_DEPTH or self.count > MAX_VALUES:
            raise self.fail("aliases (*name) that expand without end", found.start_mark, key, "write the values out")
        where = self._at(found.start_mark)
        if isinstance(found, yaml.MappingNode) and found.tag == "tag:yaml.org,2002:map":
            return Node(self.mapping(found, key, depth), where, key)
        if isinstance(found, yaml.SequenceNode) and found.tag == "tag:yaml.org,2002:seq":
            items = (self.node(item, f"{key}.{n}" if key else str(n), depth + 1) for n, item in enumerate(found.value))
            return Node(tuple(items), where, key)
        if isinstance(found, yaml.ScalarNode) and found.tag in (_TEXT, _NULL, _BOOL, _INT, _FLOAT):
            return Node(_scalar(found), where, key)
        raise self.fail(f"the tag {printable(found.tag)}", found.start_mark, key,
                        "a configuration holds data only: remove the tag")

    def mapping(self, found: yaml.MappingNode, key: str, depth: int) -> dict[str, Node]:
        values: dict[str, Node] = {}
        for name, value in found.value:
            mark = name.start_mark
            if not isinstance(name, yaml.ScalarNode) or name.tag != _TEXT:
                self.problems.append(self.fail("a key that is not text", mark, key, "give each setting its name"))
                continue
            word = printable(name.value)
            inner = f"{key}.{word}" if key else word
            if name.value == "<<":
                self.problems.append(self.fail("merge keys (<<) are not read", mark, key,
                                               "use `defaults: [FILE]`, or the shared sections at the top level"))
            elif name.value in values:
                self.problems.append(self.fail(f"the key {word} stands twice", mark, inner,
                                               f"delete one; the first is at {values[name.value].source}"))
            else:
                values[name.value] = self.node(value, inner, depth + 1)
        return values


def _scalar(found: yaml.ScalarNode) -> Any:
    """The value of a scalar: None, a truth value, a number, or text."""
    text: str = found.value
    if found.tag == _NULL:
        return None
    if found.tag == _BOOL:
        return text.lower() == "true"
    try:
        if found.tag == _INT and len(text) <= _MAX_DIGITS:
            return int(text)
        if found.tag == _FLOAT:
            return float(text)
    except ValueError:  # an explicit tag on text that is no number: `!!int x`
        return text
    return text


def printable(text: str) -> str:
    """`text` for a message: ASCII, no control characters, at most 80 characters."""
    text = ascii(text)[1:-1]
    return text if len(text) <= 80 else f"{text[:77]}..."


def parse(text: str, source: str, problems: list[ConfigError], key: str = "", *, numbered: bool = True) -> Node:
    """The tree of a YAML document. Keys that cannot be used are left out and added to `problems`.

    Raises:
        ConfigError: not YAML, or outside the subset above.
    """
    builder = _Builder(source, problems, numbered)
    if len(text) > MAX_BYTES:
        raise builder.fail(f"more than {MAX_BYTES} characters", None, key, "a configuration is a few kilobytes")
    loader = None
    try:
        loader = _Loader(text)
        found = loader.get_single_node()
    except yaml.YAMLError as error:
        what, mark = getattr(error, "problem", None) or str(error), getattr(error, "problem_mark", None)
        raise builder.fail(f"not YAML: {what}", mark, key, "correct the text here") from None
    finally:
        if loader is not None:
            loader.dispose()
    if found is None:
        return Node(None, source, key)
    return builder.node(found, key)


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
    """`values` as YAML that `parse` reads back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=120)
