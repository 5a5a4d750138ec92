"""The words of a command line: its options apart from everything else. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mat_dist.config.nodes import COMMAND_LINE, joined
from mat_dist.errors import ConfigError


@dataclass(frozen=True)
class Words:
    """A command line that was split.

    Attributes:
        values: of the options that take one, in their order, by option.
        flags: the options without value that were given.
        rest: all other words in their order, unknown options too.
        problems: options whose value is missing or begins with a dash.
    """

    values: Mapping[str, tuple[str, ...]]
    flags: frozenset[str]
    rest: tuple[str, ...]
    problems: tuple[ConfigError, ...]

    def last(self, option: str) -> str | None:
        """The value of an option, the last one where it was given several times; None where it was not."""
        return next(reversed(self.values.get(option, ())), None)

    def complain(self) -> None:
        """Raise the problems as one ConfigError, where there are some."""
        if self.problems:
            raise joined(self.problems, COMMAND_LINE)


def split(words: Sequence[str], valued: Mapping[str, str], flags: Collection[str] = ()) -> Words:
    """Split a command line.

    Args:
        words: without the program's name. A value follows its option, or stands behind `=`.
        valued: what the value of an option is, by option, as `--config FILE` in a message.
        flags: options without value.
    """
    values: dict[str, list[str]] = {}
    found: set[str] = set()
    rest: list[str] = []
    problems: list[ConfigError] = []
    queue = iter(words)
    for word in queue:
        option, equals, value = word.partition("=")
        if option in valued:
            value = value if equals else next(queue, "")
            if value and not value.startswith("-"):
                values.setdefault(option, []).append(value)
            else:
                problems.append(ConfigError(f"{option} {value[:40]!r}" if value else f"{option} without a value",
                                            COMMAND_LINE, f"write {option} {valued[option]}"))
        elif word in flags:
            found.add(word)
        else:
            rest.append(word)
    return Words({option: tuple(several) for option, several in values.items()}, frozenset(found), tuple(rest),
                 tuple(problems))


def whole_number(option: str, value: str) -> int:
    """The value of an option that counts something, 1 to 9,999,999. Raises ConfigError."""
    if not (value.isascii() and value.isdigit() and len(value) <= 7 and int(value) > 0):
        raise ConfigError(f"{option} {value[:40]!r}", COMMAND_LINE, f"write {option} and a whole number from 1")
    return int(value)
