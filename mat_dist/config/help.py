"""Every setting in words: for `--help`, for the message when a value or a key is wrong, and for editors."""

from __future__ import annotations

import argparse
import json
import re
import textwrap
import types
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mat_dist.config.fields import Section, Written
from mat_dist.config.gone import VERSION, WENT
from mat_dist.config.methods import Registered, methods_model
from mat_dist.config.plugins import load_plugins
from mat_dist.config.schema import MAX_PEERS, Config, DataConfig, PeerConfig
from mat_dist.config.tree import (
    ALIASES,
    COMMAND_LINE,
    OTHER_NAMES,
    SHARED,
    SHORTHANDS,
    Node,
    Tree,
    joined,
    locate,
    printable,
    section_class,
)
from mat_dist.errors import ConfigError, HelpShown, nearest
from mat_dist.screens import arrived

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
    "attack.norm are other names for threat.eps and threat.norm. Another norm without a radius takes the standard one "
    "of the data set, and is refused where there is none.",
    "A file begins with `defaults: [base]` to build on another one; the command line comes last. A file, a peer or a "
    "command line that changes loss.preset starts from that preset: coefficients given for another one are dropped.",
)


@dataclass(frozen=True)
class Setting:
    """One setting: `kind` is number, integer, switch, text, choice, numbers (a list) or arguments (a mapping)."""

    key: str
    kind: Literal["number", "integer", "switch", "text", "choice", "numbers", "arguments"]
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
        names = {"integer": "whole number", "numbers": "list of numbers", "switch": "true | false",
                 "arguments": "NAME: VALUE, ..."}
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
        like = self.bounds.startswith(("like ", "of "))
        article = {"text": "text" if like else "text, in quotes where it looks like a number",
                   "number": 'a number such as 0.1, 1e-3 or "8/255"', "integer": "a whole number",
                   "switch": "true or false", "numbers": "a list of numbers such as [0.5, 0.75]",
                   "arguments": "names and values, such as {momentum: 0.8, nesterov: true}"}[self.kind]
        text = f"write {article}{'' if like or not self.bounds else ','} {self.bounds}".rstrip()
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
            parts.append("of letters, digits, dots, hyphens or underscores, at most "
                         f"{int(rest[1]) + 1}, the first a letter or digit")
        elif getattr(m, "min_length", None):
            parts.append("not empty")
    return ", ".join(parts)


def setting(key: str, field: FieldInfo) -> Setting:
    """A field of a section as a setting."""
    marked, optional = _inner(field.annotation)
    base = getattr(marked, "__origin__", marked) if get_origin(marked) not in (Literal, tuple) else marked
    kind: Any = {float: "number", int: "integer", bool: "switch", str: "text", dict: "arguments"}.get(base)
    choices: tuple[str, ...] | Registered = ()
    # Where null is allowed too, the mark stands at the type of the other values.
    marks = [m for m in (*field.metadata, *getattr(marked, "__metadata__", ())) if isinstance(m, (Registered, Written))]
    if marks and isinstance(marks[0], Registered):
        kind, choices = "choice", marks[0]
    elif get_origin(base) is Literal:
        kind, choices = "choice", get_args(base)
    elif get_origin(base) is tuple:
        kind = "numbers"
    bounds = f"like {marks[0].like}" if marks and isinstance(marks[0], Written) else _bounds(field)
    default = field.get_default(call_default_factory=True)
    return Setting(key, kind, choices, bounds, optional, default, field.description or "")


def _collect(model: type[Section], prefix: str, found: dict[str, Setting]) -> None:
    for name, field in model.model_fields.items():
        inner = section_class(model, [name])
        if inner is not None:
            _collect(inner, f"{prefix}{name}.", found)
        elif f"{prefix}{name}" != "peers":
            found[f"{prefix}{name}"] = setting(f"{prefix}{name}", field)


def settings() -> dict[str, Setting]:
    """Every setting by its dotted key, in the order of the schema; a peer's own ones as `peers.N.name`."""
    return _settings(methods_model())


@cache
def _settings(_: type[Section]) -> dict[str, Setting]:
    """`settings` for the registered sections of methods."""
    found: dict[str, Setting] = {}
    _collect(Config, "", found)
    for name in (name for name in PeerConfig.model_fields if name not in SHARED):
        found[f"{_ENTRY}.{name}"] = setting(f"{_ENTRY}.{name}", PeerConfig.model_fields[name])
    return found


def general(path: tuple[str | int, ...]) -> str:
    """The key of a path, the same for each peer: `peers.2.threat.eps` is `threat.eps`."""
    parts = [str(part) for part in path]
    if len(parts) > 2 and parts[0] == "peers":
        parts = parts[2:] if parts[2] in SHARED else ["peers", PEER, *parts[2:]]
    return ".".join(parts)


def canonical(path: tuple[str | int, ...]) -> str:
    """The key under which `settings` knows a path: `peers.2.threat.eps` and `attack.eps` are both `threat.eps`."""
    return OTHER_NAMES.get(general(path), general(path))


def _section_names(path: tuple[str | int, ...]) -> list[str]:
    """Names that are known in the section at `path`."""
    inside = path[:1] == ("peers",)
    model = section_class(PeerConfig if inside else Config, path[2:] if inside else path)
    if model is None:
        return []
    more = ("defaults",) if model is Config else ALIASES if path[-1:] == ("attack",) else ()
    return [*model.model_fields, *more]


def unknown_key(path: tuple[str | int, ...], node: Node, below: Sequence[str | int] = ()) -> ConfigError:
    """The problem of a key that does not exist, with the nearest one that does, or what to do without it; `below`: what
    was given in a section of that name."""
    if (went := WENT.get(canonical(path))) is not None:
        return ConfigError(f"{node.key} went in version {VERSION}", node.where, went)
    *section, name = path
    names = _section_names(tuple(section))
    prefix = "".join(f"{part}." for part in section)
    near = nearest(str(name), names)
    elsewhere = {} if section[-1:] == ["methods"] else {key.rpartition(".")[2]: key for key in reversed(settings())}
    close = nearest(str(name), [*elsewhere, *settings()]) if near is None and elsewhere else None
    meant = f"{prefix}{near}" if close is None else elsewhere.get(close, close)
    whole = ".".join(map(str, (meant, *below)))
    meant = whole if canonical(tuple(whole.split("."))) in settings() else meant
    return ConfigError(f"there is no setting {node.key}", node.where, f"known here: {', '.join(names) or 'none'}"
                       if near is None and close is None else f"did you mean {meant}?")


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


def problem(error: ErrorDetails, tree: Tree) -> ConfigError:
    """One of pydantic's errors as ours."""
    path = faulty(error)
    node, depth = locate(tree, path)
    if error["type"] == "extra_forbidden":
        return unknown_key(path, node, next((key[len(path):] for key in tree if key[:len(path)] == path), ()))
    setting = settings().get(canonical(path))
    if setting is not None and setting.kind == "arguments" and error["type"] == "value_error":
        return ConfigError(f"{node.key} cannot be used: {error['msg'][13:]}", node.where, setting.allowed(None))
    if error["type"] in ("missing", "value_error") and setting is None:
        what = ".".join(map(str, error["loc"]))
        text = "is not given" if error["type"] == "missing" else f"cannot be used: {error['msg'][13:]}"
        return ConfigError(f"{what} {text}", node.where, f"see {canonical(error['loc'])} in --help")
    key, found = canonical(path), shown(error["input"])
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


# ---------------------------------------------------------------- options of commands


class Options(argparse.ArgumentParser):
    """What a command understands. Other words, such as settings and folders of runs, are left to it as `words`.

    `--help` shows the usage, the text (the command's docstring), the options and `epilog`.

    Args:
        command: its name behind `python -m mat_dist.`.
        text: what it does.
        words: what its other words are, for the usage.
        needs_words: without any it can do nothing.
    """

    def __init__(self, command: str, text: str | None, words: str, *, needs_words: bool = True,
                 epilog: str | None = None) -> None:
        self.takes, self.needs_words = words, needs_words
        self.known: list[argparse.Action] = []
        formatter: Any = partial(argparse.RawDescriptionHelpFormatter, width=WIDTH, max_help_position=28)
        super().__init__(f"python -m mat_dist.{command}", usage=f"%(prog)s {words} [options]", description=text,
                         epilog=epilog, formatter_class=formatter, allow_abbrev=False, exit_on_error=False)

    def add_argument(self, *names: Any, **more: Any) -> argparse.Action:
        """An option; see argparse. `known` holds them all."""
        self.known.append(super().add_argument(*names, **more))
        return self.known[-1]

    def add_plugin(self) -> None:
        """`--plugin FILE.py`, as often as needed, as `plugin`."""
        self.add_argument("--plugin", metavar="FILE.py", action="append", default=[], type=_given,
                          help="a file of yours that registers models, norms, methods or data; may be given again")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The values of the options, and `words`: all words that are none. Help raises HelpShown.

        Raises:
            ConfigError: an unknown option, or one without its value; `problems` has all of them. No word where it needs
                some.
        """
        if {"-h", "--help"} & set(words):
            with suppress(argparse.ArgumentError):
                found, _ = self.parse_known_args([word for word in words if word not in ("-h", "--help")])
                load_plugins(getattr(found, "plugin", ()))  # the help has what they register
            self.print_help()
            arrived()
            raise HelpShown
        if self.needs_words and not words:
            raise ConfigError("nothing is given", COMMAND_LINE, f"write {self.prog} {self.takes}; --help tells more")
        try:
            found, rest = self.parse_known_args(words)
        except argparse.ArgumentError as error:
            option = str(error.argument_name).rpartition("/")[2]
            metavar = next((action.metavar for action in self.known if option in action.option_strings), None)
            raise ConfigError(f"{option}: {error.message}", COMMAND_LINE,
                              f"write {option} {metavar}" if metavar else f"write {option} alone") from None
        problems = [ConfigError(f"unknown option {printable(word)}", COMMAND_LINE, self.meant(word))
                    for word in rest if not self.usable(word)]
        if problems:
            raise joined(problems, COMMAND_LINE)
        found.words = tuple(rest)
        return found

    @property
    def names(self) -> list[str]:
        """All options."""
        return [name for action in self.known for name in action.option_strings if name.startswith("--")]

    def usable(self, word: str) -> bool:
        """Whether the command may have a use for a word that is no option."""
        return not word.startswith("-")

    def meant(self, word: str) -> str:
        """What an unknown word may be meant for."""
        near = nearest(word.partition("=")[0], self.names)
        return f"did you mean {near}?" if near else f"options are {', '.join(self.names)}; see {self.prog} --help"


class TrainingOptions(Options):
    """Options of a command that needs the settings of a training: `config`, `plugin`, and the settings as `words`."""

    def __init__(self, command: str, text: str | None) -> None:
        super().__init__(command, text, "[KEY=VALUE ...]", needs_words=False)
        self.add_argument("-c", "--config", metavar="FILE", action="append", default=[], type=_given,
                          help="a YAML file, or the name of one in configs/; without it digits: 4 peers, embedded data")
        self.add_plugin()

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """As for all options; `config` is None where no file is given."""
        found = super().read(words)
        if len(found.config) > 1:
            raise ConfigError(f"--config is given {len(found.config)} times", COMMAND_LINE,
                              "give it once; a file builds on others with `defaults: [FILE]`")
        found.config = found.config[0] if found.config else None
        return found

    def usable(self, word: str) -> bool:
        """Only settings may be left."""
        return "=" in word and not word.startswith("-")

    def meant(self, word: str) -> str:
        """An option, a setting, also one with dashes, or a file."""
        bare, equals, value = word.lstrip("-").partition("=")
        if bare.endswith((".yaml", ".yml")):
            return f"did you mean --config {printable(bare)}?"
        given = f"={printable(value)}" if equals else "=VALUE"
        hints = {name[2:]: name for name in self.names} | {key: f"{key}{given}" for key in settings()}
        near = hints.get(nearest(bare, hints) or "") if not bare.startswith("peers.") else f"{printable(bare)}{given}"
        if near is None:
            return f"options are {', '.join(self.names)}; settings are written key=value; --help lists them"
        dashed = word.startswith("-") and not near.startswith("-")
        return f"did you mean {near}?" + (" Settings have no dashes" if dashed else "")

    def format_help(self) -> str:
        """Also all settings, and examples."""
        module = self.prog.removeprefix("python -m ")
        examples = (self.prog, f"{self.prog} -c cifar10_resnet18 attack.eps=4/255",
                    f"{self.prog} peers.2.model=wrn_28_10 peers.2.threat=l2 peers.2.attack.eps=1/2",
                    f"{self.prog} -c my.yaml --plugin my_model.py model=my_model",
                    f"torchrun --standalone --nproc_per_node=4 -m {module} -c cifar10_resnet18 data.root=DATA")
        lines = [super().format_help(), settings_help(), "", "Examples", *(f"  {line}" for line in examples)]
        return "\n".join([*lines, ""])


def count(text: str) -> int:
    """A number of things, 1 to 9,999,999, for `type`."""
    if not (text.isascii() and text.isdigit() and len(text) <= 7 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from 1")
    return int(text)


def _given(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("no value")
    return text
