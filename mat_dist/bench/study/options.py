"""The command lines of `bench evidence` and `bench search`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mat_dist
from mat_dist.config.help import nearest
from mat_dist.config.options import Options as CommandOptions
from mat_dist.config.tree import COMMAND_LINE, joined
from mat_dist.errors import ConfigError

VALUED = {"--suite": "NAME", "--only": "NAME,NAME", "--seeds": "0,1", "--jobs": "N", "--budget": "SECONDS",
          "--root": "FOLDER", "--file": "FILE", "--space": "FILE", "--out": "FOLDER"}
RESULTS = "benchmarks/results"


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        suite: of the file.
        file: the YAML file.
        only: names of rows (families, in a search); empty: all.
        seeds: empty: those of the file.
        jobs: runs at a time.
        budget: seconds; None: no end.
        root: folder of the runs.
        out: folder of the results.
        dry_run: print the plan, start nothing.
        settings: key=value for every run, laid over those of the file.
    """

    suite: str
    file: str
    only: tuple[str, ...]
    seeds: tuple[int, ...]
    jobs: int
    budget: float | None
    root: Path
    out: Path
    dry_run: bool
    settings: tuple[str, ...]

    @classmethod
    def read(cls, words: Sequence[str], command: str, default_file: str) -> Options:
        """From the words after the command's name. Raises ConfigError; `problems` has all of them."""
        options = CommandOptions(f"bench {command}", "", "[KEY=VALUE ...]", needs_words=False)
        for option, metavar in VALUED.items():
            options.add_argument(option, metavar=metavar, dest=option)
        options.add_argument("--dry-run", action="store_true")
        asked = options.read(words)
        found = {option: value for option, value in vars(asked).items() if option in VALUED and value is not None}
        problems = [ConfigError(f"unknown option {ascii(word)[1:-1][:80]}", COMMAND_LINE, f"see bench {command} --help")
                    for word in asked.words if "=" not in word]
        seeds = _parsed(found, "--seeds", lambda text: tuple(int(n) for n in text.split(",")), "0,1", problems)
        jobs = _parsed(found, "--jobs", _count, "4", problems)
        budget = _parsed(found, "--budget", _seconds, "500", problems)
        if problems:
            raise joined(problems, COMMAND_LINE)
        suite = found.get("--suite", "cpu")
        file = found.get("--file") or found.get("--space") or default_file
        return cls(suite, _existing(file), tuple(filter(None, found.get("--only", "").split(","))), seeds or (),
                   jobs or 1, budget, Path(found.get("--root", f"runs/{command}_{suite}")),
                   Path(found.get("--out", RESULTS)), asked.dry_run, asked.words)


def _parsed(found: dict[str, str], option: str, read: Any, example: str, problems: list[ConfigError]) -> Any:
    if option not in found:
        return None
    try:
        return read(found[option])
    except ValueError:
        problems.append(ConfigError(f"{option} {found[option][:40]!r}", COMMAND_LINE, f"write {option} {example}"))
        return None


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 256:
        raise ValueError(text)
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(text)
    return value


def _existing(file: str) -> str:
    """The file, in the working directory or beside the package."""
    beside = Path(mat_dist.__file__).resolve().parents[1] / file
    return str(beside) if not Path(file).is_file() and beside.is_file() else file


def chosen(asked: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """`asked`, or all of `known` where nothing was. Raises ConfigError for an unknown one."""
    for name in asked:
        if name not in known:
            near = nearest(name, known)
            raise ConfigError(f"there is no {what} {name[:40]!r}", COMMAND_LINE,
                              f"did you mean {near}?" if near else f"there are {', '.join(known)}")
    return list(asked) or list(known)
