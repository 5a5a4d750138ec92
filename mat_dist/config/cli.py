"""The command line that all commands share, and its `--help`. Nothing here imports torch."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mat_dist.config.describe import Setting, nearest, settings
from mat_dist.config.nodes import COMMAND_LINE, SHARED, joined
from mat_dist.config.schema import MAX_PEERS, Config
from mat_dist.config.words import split
from mat_dist.errors import ConfigError

WIDTH = 100
_COLUMN = 36
_COMMANDS = ("python ", "torchrun ")
_OPTIONS = ("--config", "--plugin", "--dry-run", "--help")
_OPTION_TEXTS = (
    ("-c, --config FILE", "a YAML file, or the name of one in configs/; without it digits: 4 peers, embedded data"),
    ("--plugin FILE.py", "a file of yours that registers models, losses or data; may be given several times"),
    ("--dry-run", "show what would be run, and stop"),
    ("-h, --help", "this text"),
    ("KEY=VALUE", "a setting below; the value is YAML: 3, 8/255, 1e-3, true, null, [0.5, 0.75]"),
)
_NOTES = (
    "The sections model, threat, union, attack, loss, optim and methods hold for every peer. One peer: "
    "peers.2.model=wrn_28_10; every peer, also where a file gives each its own: peers.all.optim.lr=0.05. peers=4 is a "
    "number of equal peers.",
    "Short forms: model=resnet18 is model.name, threat=l2 is threat.norm, loss=at is loss.preset; attack.eps and "
    "attack.norm are other names for threat.eps and threat.norm.",
    "A file begins with `defaults: [base]` to build on another one; the command line comes last. A file, a peer or a "
    "command line that changes loss.preset starts from that preset: coefficients given for another one are dropped.",
)


@dataclass(frozen=True)
class Arguments:
    """What the command line asks for."""

    config_path: str | None = None
    overrides: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    dry_run: bool = False


def parse_command_line(argv: Sequence[str], *, prog: str, description: str) -> Arguments:
    """Read `argv` (without the program's name). `--help` prints the help and raises SystemExit(0).

    Raises:
        ConfigError: an unknown option or word, or an option without its file; `problems` has all of them.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(help_text(prog, description))
        raise SystemExit(0)
    words = split(argv, {"-c": "FILE", "--config": "FILE", "--plugin": "FILE.py"}, ("--dry-run",))
    overrides = [word for word in words.rest if "=" in word and not word.startswith("-")]
    problems = [*words.problems, *(_unknown(word) for word in words.rest if word not in overrides)]
    configs = (*words.values.get("-c", ()), *words.values.get("--config", ()))
    if len(configs) > 1:
        problems.append(ConfigError(f"--config is given {len(configs)} times", COMMAND_LINE,
                                    "give it once; a file builds on others with `defaults: [FILE]`"))
    if problems:
        raise joined(problems, COMMAND_LINE)
    return Arguments(configs[0] if configs else None, tuple(overrides), words.values.get("--plugin", ()),
                     bool(words.flags))


def _unknown(word: str) -> ConfigError:
    """The problem of a word that is neither an option nor `key=value`."""
    option, equals, value = word.partition("=")
    known = list(settings())
    if not word.startswith("-"):
        hints = {**{option[2:]: option for option in _OPTIONS}, **{key: f"{key}=VALUE" for key in known}}
        near = nearest(word, hints)
        hint = f"--config {word}" if word.endswith((".yaml", ".yml")) else hints[near] if near else None
        how = f"did you mean {hint}?" if hint else "settings are written key=value; --help lists them"
    else:
        bare = option.lstrip("-")
        near = nearest(option, _OPTIONS)
        key = bare if bare in settings() or bare.startswith("peers.") else nearest(bare, known)
        if near:
            how = f"did you mean {near}?"
        elif key:
            how = f"did you mean {key}={value if equals else 'VALUE'}? Settings have no dashes"
        else:
            how = f"options are {', '.join(_OPTIONS)}; settings are written key=value"
    return ConfigError(f"unknown option {ascii(word)[1:-1]}", COMMAND_LINE, how)


def _entry(left: str, right: str, column: int = _COLUMN) -> Iterator[str]:
    """`right` wrapped beside `left`, or below it where `left` is too long."""
    lines = textwrap.wrap(right, WIDTH - column - 2, break_on_hyphens=False)
    if len(left) > column - 2:
        yield f"  {left}"
        left = ""
    for number, line in enumerate(lines):
        yield f"  {left if number == 0 else '':<{column}}{line}"


def _rows(rows: Sequence[Setting]) -> Iterator[str]:
    for row in rows:
        yield from _entry(f"{row.key}={row.default_text}", f"{row.description} [{row.type_text}]")


def _described(text: str) -> Iterator[str]:
    """Paragraphs of a docstring, wrapped; one that begins with a command keeps its lines."""
    for number, paragraph in enumerate(text.strip().split("\n\n")):
        if number:
            yield ""
        if paragraph.startswith(_COMMANDS):
            yield from textwrap.indent(paragraph, "  ").splitlines()
        else:
            yield from textwrap.wrap(paragraph, WIDTH, break_on_hyphens=False)


def help_text(prog: str, description: str) -> str:
    """Options, every setting by section with default, meaning and type, and examples; at most 100 columns."""
    lines = [f"usage: {prog} [--config FILE] [--plugin FILE.py] [--dry-run] [KEY=VALUE ...]", ""]
    lines += [*_described(description), "", "Options"]
    for left, right in _OPTION_TEXTS:
        lines += _entry(left, right, 20)
    lines += ["", "Settings: key=default (where no file sets it), meaning [type]"]
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
        lines += _rows(rows)
    return "\n".join([*lines, "", "Examples", *_examples(prog)])


def _examples(prog: str) -> list[str]:
    module = prog.removeprefix("python -m ")
    return [f"  {prog}",
            f"  {prog} -c cifar10_resnet18 attack.eps=4/255 --dry-run",
            f"  {prog} peers.2.model=wrn_28_10 peers.2.threat=l2",
            f"  {prog} -c my.yaml --plugin my_model.py model=my_model",
            f"  torchrun --standalone --nproc_per_node=4 -m {module} -c cifar10_resnet18 data.root=DATA"]
