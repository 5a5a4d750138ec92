"""YAML in and out: the safe subset that a configuration needs, with the line of every value.

Built on PyYAML's parser events. Stricter than its SafeLoader: no tags, no merge keys, no duplicate keys, bounded
size, depth and number of values; plain scalars follow YAML 1.2's core schema (`1e-3` is a number; `010`, `yes` and
dates are text).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import yaml

from mat_dist.config.nodes import Node
from mat_dist.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_VALUES = 50_000  # 256 peers written out in full are 25,000 keys and values
_MAX_DIGITS = 30  # longer numbers stay text: int() of a million digits takes minutes

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(rf"[-+]?(?:0|[1-9][0-9]{{0,{_MAX_DIGITS - 1}}})")
_FLOAT = re.compile(r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)")


def _plain_scalar(text: str) -> Any:
    """The value of a scalar without quotes: None, a truth value, a number, or text."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _events(text: str) -> Iterator[Any]:
    loader = (yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader)(text)
    try:
        while loader.check_event():
            yield loader.get_event()
    finally:
        loader.dispose()


class _Builder:
    """Builds the tree from parser events."""

    def __init__(self, text: str, source: str, problems: list[ConfigError], numbered: bool) -> None:
        self.events = _events(text)
        self.source, self.problems, self.numbered = source, problems, numbered
        self.count = 0
        self.anchors: dict[str, tuple[Node, int, int]] = {}  # node, number of values, height

    def fail(self, what: str, mark: Any, key: str, how: str) -> ConfigError:
        where = self.at(mark)
        return ConfigError(what, f"{where}, {key}" if key else where, how)

    def at(self, mark: Any) -> str:
        return f"{self.source}:{mark.line + 1}" if self.numbered and mark is not None else self.source

    def document(self, key: str) -> Node:
        """The only document of the stream."""
        next(self.events)
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            return Node(None, self.source, key)
        node, _ = self.node(next(self.events), key, 0)
        next(self.events)
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise self.fail("a second document (---)", event.start_mark, key, "write one document to a file")
        return node

    def node(self, event: Any, key: str, depth: int) -> tuple[Node, int]:
        """The value that begins with `event`, and its height (0 for a scalar)."""
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, key, depth)
        if event.tag is not None:
            raise self.fail(f"the tag {printable(event.tag)}", event.start_mark, key,
                            "a configuration holds data only: remove the tag")
        before, height = self.count, 0
        self.grow(1, depth, event, key)
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value = _plain_scalar(event.value) if event.implicit[0] else event.value
        elif isinstance(event, yaml.SequenceStartEvent):
            items = list(self.items(key, depth))
            value, height = tuple(item for item, _ in items), 1 + max((below for _, below in items), default=0)
        else:
            value, height = self.mapping(key, depth)
        node = Node(value, self.at(event.start_mark), key)
        if event.anchor is not None:
            self.anchors[event.anchor] = (node, self.count - before, height)
        return node, height

    def grow(self, count: int, depth: int, event: Any, key: str) -> None:
        self.count += count
        if depth > MAX_DEPTH:
            raise self.fail(f"nested deeper than {MAX_DEPTH} levels", event.start_mark, key,
                            "remove brackets or aliases")
        if self.count > MAX_VALUES:
            raise self.fail(f"more than {MAX_VALUES} values", event.start_mark, key, "remove some, or aliases of them")

    def alias(self, event: Any, key: str, depth: int) -> tuple[Node, int]:
        """The node of an anchor, counted again, so that aliases of aliases cannot explode."""
        if event.anchor not in self.anchors:
            raise self.fail(f"the alias *{printable(event.anchor)} without a complete value before it",
                            event.start_mark, key, "write the value out")
        node, count, height = self.anchors[event.anchor]
        self.grow(count, depth + height, event, key)
        return node, height

    def items(self, key: str, depth: int) -> Iterator[tuple[Node, int]]:
        number = 0
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            yield self.node(event, f"{key}.{number}" if key else str(number), depth + 1)
            number += 1

    def mapping(self, key: str, depth: int) -> tuple[dict[str, Node], int]:
        values: dict[str, Node] = {}
        height = 1
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            name = getattr(event, "value", None)
            word = printable(str(name))
            inner = f"{key}.{word}" if key else word
            named = self.node(event, inner, depth + 1)[0]
            value, below = self.node(next(self.events), inner, depth + 1)
            height = max(height, 1 + below)
            if not isinstance(named.value, str) or name is None:
                self.problems.append(self.fail("a key that is not text", event.start_mark, key,
                                               "give each setting its name"))
            elif name == "<<" and event.implicit[0]:
                self.problems.append(self.fail("merge keys (<<) are not read", event.start_mark, key,
                                               "use `defaults: [FILE]`, or the shared sections at the top level"))
            elif name in values:
                self.problems.append(self.fail(f"the key {word} stands twice", event.start_mark, inner,
                                               f"delete one; the first is at {values[name].source}"))
            else:
                values[name] = value
        return values, height


def printable(text: str) -> str:
    """`text` for a message: ASCII, no control characters, at most 80 characters."""
    text = ascii(text)[1:-1]
    return text if len(text) <= 80 else f"{text[:77]}..."


def parse(text: str, source: str, problems: list[ConfigError], key: str = "", *, numbered: bool = True) -> Node:
    """The tree of a YAML document. Keys that cannot be used are left out and added to `problems`.

    Raises:
        ConfigError: not YAML, or outside the subset above.
    """
    builder = _Builder(text, source, problems, numbered)
    if len(text) > MAX_BYTES:
        raise builder.fail(f"more than {MAX_BYTES} characters", None, key, "a configuration is a few kilobytes")
    try:
        return builder.document(key)
    except (yaml.YAMLError, UnicodeError) as error:
        what, mark = getattr(error, "problem", None) or str(error), getattr(error, "problem_mark", None)
        raise builder.fail(f"not YAML: {printable(what)}", mark, key, "correct the text here") from None


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


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes wherever this module or a YAML 1.1 reader would take it for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "'" if _plain_scalar(text) != text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def write(values: dict[str, Any]) -> str:
    """`values` as YAML that `parse` reads back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=120)
