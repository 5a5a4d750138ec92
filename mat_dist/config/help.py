"""Every setting in words: for `--help`, for the message when a value or a key is wrong, and for editors."""

from __future__ import annotations

import difflib
import json
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mat_dist.config.fields import Section
from mat_dist.config.methods import Registered, methods_model
from mat_dist.config.schema import MAX_PEERS, Config, DataConfig, PeerConfig
from mat_dist.config.tree import ALIASES, SHARED, SHORTHANDS, Layer, Node, section_class
from mat_dist.errors import ConfigError

PEER = "N"  # stands for a peer's index in the keys below
_ENTRY = f"peers.{PEER}"
WIDTH = 100
_COLUMN = 36
# 8, -0.5, 1e-3, 8/255
_NUMBER_TEXT = r"^\s*[-+]?[0-9.]+([eE][-+]?[0-9]+)?(\s*/\s*[0-9]+)?\s*$"
_NOTES = (
    f"The sections {', '.join(SHARED[:-1])} and {SHARED[-1]} hold for every peer. One peer: peers.2.model=wrn_28_10; "
    "every peer, also where a file gives each its own: peers.all.optim.lr=0.05. peers=4 is a number of equal peers.",
    "Short forms: model=resnet18 is model.name, threat=l2 is threat.norm, loss=at is loss.preset; attack.eps and "
    "attack.norm are other names for threat.eps and threat.norm.",
    "A file begins with `defaults: [base]` to build on another one; the command line comes last. A file, a peer or a "
    "command line that changes loss.preset starts from that preset: coefficients given for another one are dropped.",
)
_SUGGEST = 30  # after so many unknown keys no nearest one is searched: difflib takes a millisecond each


@dataclass(frozen=True)
class Setting:
    """One setting: `kind` is number, integer, switch, text, choice or numbers (a list)."""

    key: str
    kind: Literal["number", "integer", "switch", "text", "choice", "numbers"]
    names: tuple[str, ...] | Registered
    bounds: str
    optional: bool
    default: Any
    description: str

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a choice, with those that plug-ins have registered by now."""
        return tuple(self.names.known()) if isinstance(self.names, Registered) else self.names

    @property
    def type_text(self) -> str:
        """The type and range, for the help."""
        names = {"integer": "whole number", "numbers": "list of numbers", "switch": "true | false"}
        text = " | ".join(self.choices) or f"{names.get(self.kind, self.kind)} {self.bounds}".rstrip()
        return f"{text} | null" if self.optional else text

    @property
    def default_text(self) -> str:
        """The default as it would be written in YAML."""
        if isinstance(self.default, bool) or self.default is None:
            return {True: "true", False: "false", None: "null"}[self.default]
        return f"[{', '.join(map(str, self.default))}]" if isinstance(self.default, tuple) else str(self.default)

    def allowed(self, found: Any) -> str:
        """What to write instead of `found`."""
        if self.kind == "choice":
            near = nearest(str(found), self.choices)
            hint = f" (did you mean {near}?)" if near else ""
            more = ", or a name from --plugin" if isinstance(self.names, Registered) else ""
            return f"choose one of {', '.join(self.choices)}{', null' if self.optional else ''}{more}{hint}"
        if self.kind == "text":
            if "letter" in self.bounds:
                return "write letters, digits, dots, hyphens or underscores, " + self.bounds
            return "write text, in quotes where it looks like a number" + (f", {self.bounds}" if self.bounds else "")
        article = {"number": 'a number such as 0.1, 1e-3 or "8/255"', "integer": "a whole number",
                   "switch": "true or false", "numbers": "a list of numbers such as [0.5, 0.75]"}[self.kind]
        text = f"write {article}" + (f", {self.bounds}" if self.bounds else "")
        return f"{text}, or null" if self.optional else text


def _inner(annotation: Any) -> tuple[Any, bool]:
    """The type without `| None`, and whether None is allowed."""
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return parts[0], len(parts) < len(get_args(annotation))
    return annotation, False


def _plain_number(value: float) -> str:
    """A bound without rounding: 2**63 rather than 9.22337e+18."""
    return f"2**{value.bit_length() - 1}" if isinstance(value, int) and value >= 1 << 20 else f"{value:g}"


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    parts = [f"{sign} {_plain_number(getattr(m, name))}" for m in field.metadata for name, sign in signs.items()
             if hasattr(m, name)]
    for m in field.metadata:
        if pattern := getattr(m, "pattern", None):
            rest = re.search(r"\{0,(\d+)\}", pattern)
            assert rest is not None
            parts.append(f"at most {int(rest[1]) + 1}, the first a letter or digit")
        elif getattr(m, "min_length", None):
            parts.append("not empty")
    return ", ".join(parts)


def _setting(key: str, field: FieldInfo) -> Setting:
    marked, optional = _inner(field.annotation)
    base = getattr(marked, "__origin__", marked) if get_origin(marked) not in (Literal, tuple) else marked
    kind: Any = {float: "number", int: "integer", bool: "switch", str: "text"}.get(base)
    choices: tuple[str, ...] | Registered = ()
    # Where null is allowed too, the mark stands at the type of the other values.
    marks = [m for m in (*field.metadata, *getattr(marked, "__metadata__", ())) if isinstance(m, Registered)]
    if marks:
        kind, choices = "choice", marks[0]
    elif get_origin(base) is Literal:
        kind, choices = "choice", get_args(base)
    elif get_origin(base) is tuple:
        kind = "numbers"
    return Setting(key, kind, choices, _bounds(field), optional, field.default, field.description or "")


def _collect(model: type[Section], prefix: str, found: dict[str, Setting]) -> None:
    for name, field in model.model_fields.items():
        inner = section_class(model, [name])
        if inner is not None:
            _collect(inner, f"{prefix}{name}.", found)
        elif f"{prefix}{name}" != "peers":
            found[f"{prefix}{name}"] = _setting(f"{prefix}{name}", field)


def settings() -> dict[str, Setting]:
    """Every setting by its dotted key, in the order of the schema; a peer's own ones as `peers.N.name`."""
    return _settings(methods_model())


@cache
def _settings(_: type[Section]) -> dict[str, Setting]:
    """`settings` for the registered sections of methods."""
    found: dict[str, Setting] = {}
    _collect(Config, "", found)
    for name in (name for name in PeerConfig.model_fields if name not in SHARED):
        found[f"{_ENTRY}.{name}"] = _setting(f"{_ENTRY}.{name}", PeerConfig.model_fields[name])
    return found


def canonical(path: tuple[str | int, ...]) -> str:
    """The key under which `settings` knows a path: `peers.2.threat.eps` and `attack.eps` are both `threat.eps`."""
    parts = [str(part) for part in path]
    if len(parts) > 2 and parts[0] == "peers":
        parts = parts[2:] if parts[2] in SHARED else ["peers", PEER, *parts[2:]]
    if len(parts) == 2 and parts[0] == "attack" and parts[1] in ALIASES:
        parts[0] = "threat"
    return ".".join(parts)


def nearest(word: str, known: Any) -> str | None:
    """The known word that `word` may be a misspelling of."""
    found = difflib.get_close_matches(word[:80], list(known), 1, 0.6)
    return found[0] if found else None


def _section_names(path: tuple[str | int, ...]) -> list[str]:
    """Names that are known in the section at `path`."""
    inside = path[:1] == ("peers",)
    model = section_class(PeerConfig if inside else Config, path[2:] if inside else path)
    if model is None:
        return []
    more = ("defaults",) if model is Config else ALIASES if path[-1:] == ("attack",) else ()
    return [*model.model_fields, *more]


def unknown_key(path: tuple[str | int, ...], node: Node, search: bool = True) -> ConfigError:
    """The problem of a key that does not exist, with the nearest one that does."""
    *section, name = path
    names = _section_names(tuple(section))
    prefix = "".join(f"{part}." for part in section)
    how = f"known here: {', '.join(names) or 'none'}"
    if search:
        word = str(name)
        near = nearest(word, names)
        elsewhere = [key for key in settings() if key.endswith(f".{word}") and key.split(".")[0] not in path[:1]]
        if near is None and not elsewhere and section[-1:] != ["methods"]:
            leaves = {key.rpartition(".")[2]: key for key in reversed(settings())}
            close = nearest(word, [*leaves, *settings()])
            elsewhere = [leaves.get(close, close)] if close else []
        if near is not None:
            how = f"did you mean {prefix}{near}?"
        elif elsewhere:
            how = f"did you mean {' or '.join(elsewhere[:3])}?"
    return ConfigError(f"there is no setting {node.key}", node.where, how)


def shown(value: Any) -> str:
    """A value as it was written, shortened, on one line, in ASCII."""
    if isinstance(value, (dict, list, tuple)):
        return "a section" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def faulty(error: ErrorDetails) -> tuple[str | int, ...]:
    """The path of what one of pydantic's errors is about: of a whole list, and of the section where a setting lacks."""
    path = error["loc"]
    return path[:-1] if canonical(path[:-1]) in settings() or error["type"] == "missing" else path


def problem(error: ErrorDetails, layer: Layer, count: int) -> ConfigError:
    """One of pydantic's errors as ours. `count` errors came before it."""
    path = faulty(error)
    node, depth = layer.locate(path)
    if error["type"] == "extra_forbidden":
        return unknown_key(path, node, search=count < _SUGGEST)
    if error["type"] in ("missing", "value_error") and canonical(path) not in settings():
        what = ".".join(map(str, error["loc"]))
        text = "is not given" if error["type"] == "missing" else f"cannot be used: {error['msg'][13:]}"
        return ConfigError(f"{what} {text}", node.where, f"see {canonical(error['loc'])} in --help")
    key = canonical(path)
    setting = settings().get(key)
    found = shown(error["input"])
    if setting is not None and depth == len(path):
        return ConfigError(f"{found} cannot be used for {node.key}", node.where, setting.allowed(error["input"]))
    if key == "peers":
        return ConfigError(f"{found} cannot be used for peers", node.where, "write a number of peers or a list with an "
                                                                            f"entry per peer, 1 to {MAX_PEERS}")
    name = ".".join(map(str, path))
    short = f" (or {SHORTHANDS[key]} alone)" if key in SHORTHANDS else ""
    return ConfigError(f"{found} cannot be used for the section {name}", node.where,
                       f"write its settings below it: {', '.join(_section_names(path))}{short}")


def _entry(left: str, right: str) -> Iterator[str]:
    """`right` wrapped beside `left`, or below it where `left` is too long."""
    lines = textwrap.wrap(right, WIDTH - _COLUMN - 2, break_on_hyphens=False)
    if len(left) > _COLUMN - 2:
        yield f"  {left}"
        left = ""
    for number, line in enumerate(lines):
        yield f"  {left if number == 0 else '':<{_COLUMN}}{line}"


def settings_help() -> str:
    """Every setting by section, with default, meaning and type; at most 100 columns."""
    lines = ["Settings: key=default (where no file sets it), meaning [type]. Values are YAML: 3, 8/255, 1e-3, null"]
    for note in _NOTES:
        lines += textwrap.wrap(note, WIDTH - 2, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    for section, field in Config.model_fields.items():
        rows = [row for key, row in settings().items() if key.split(".")[0] == section]
        if not rows:
            continue  # methods, where none has settings
        each = " (of every peer)" if section in SHARED else ""
        lines += ["", f"{section}: {field.description}{'' if 'of the peers' in (field.description or '') else each}"]
        if section == "peers":
            lines += _entry(f"peers={len(field.default)}", "number of peers, or a list with an entry per peer "
                                                            f"[1 to {MAX_PEERS}]; N is an index from 0")
        for row in rows:
            lines += _entry(f"{row.key}={row.default_text}", f"{row.description} [{row.type_text}]")
    return "\n".join(lines)


def _accept_fractions(schema: Any) -> Any:
    """`schema` with every number also as text."""
    if isinstance(schema, list):
        return [_accept_fractions(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("type") == "number":
        told = {key: schema[key] for key in ("title", "description", "default") if key in schema}
        number = {key: value for key, value in schema.items() if key not in told}
        return {**told, "anyOf": [number, {"type": "string", "pattern": _NUMBER_TEXT}]}
    return {key: _accept_fractions(value) for key, value in schema.items()}


def _accept_short_sections(properties: dict[str, Any], model: type[Section]) -> None:
    """Sections of `model` may be empty, and those with a short form may be text."""
    for name, field in model.model_fields.items():
        if "$ref" not in properties[name]:
            continue
        forms: list[dict[str, Any]] = [{"$ref": properties[name]["$ref"]}, {"type": "null"}]
        forms += [{"type": "string"}] if name in SHORTHANDS else []
        properties[name] = {"description": field.description, "anyOf": forms}


def schema_json() -> str:
    """The text of `configs/schema.json`."""
    schema = _accept_fractions(Config.model_json_schema())
    sections, top = schema["$defs"], schema["properties"]
    _accept_short_sections(top, Config)
    _accept_short_sections(sections["PeerConfig"]["properties"], PeerConfig)
    _accept_short_sections(sections["DataConfig"]["properties"], DataConfig)
    for alias in ALIASES:
        same = {**sections["ThreatConfig"]["properties"][alias], "description": f"another name for threat.{alias}"}
        sections["AttackConfig"]["properties"][alias] = same
    many = {"type": "array", "items": top["peers"]["items"], "minItems": 1, "maxItems": MAX_PEERS}
    top["peers"] = {"description": Config.model_fields["peers"].description,
                    "anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_PEERS}, many]}
    names = {"type": "string", "minLength": 1}
    top["defaults"] = {"description": "files that this one builds on",
                       "anyOf": [names, {"type": "array", "items": names}]}
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "mat_dist configuration"}
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"
