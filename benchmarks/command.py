"""What the command lines of the benchmarks share."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from mat_dist.config.help import nearest
from mat_dist.config.tree import COMMAND_LINE
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import ConfigError

EVERY = 5.0  # seconds between two lines about how far a long work is


class Parser(argparse.ArgumentParser):
    """Options by argparse; mistakes are our one line, and words that are no option come back as settings."""

    def __init__(self, **more: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(message, COMMAND_LINE, f"see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None  # type: ignore[override]
                         ) -> tuple[argparse.Namespace, list[str]]:
        """Namespace and settings. Raises ConfigError for an unknown option."""
        found, rest = super().parse_known_args(args, namespace)
        for word in rest:
            if word.startswith("-"):
                near = nearest(word.partition("=")[0], re.findall(r"--[\w-]+", self.format_usage()))
                raise ConfigError(f"unknown option {ascii(word)[1:-1][:80]}", COMMAND_LINE,
                                  f"did you mean {near}?" if near else f"see {self.prog} --help")
        return found, rest


def whole_number(text: str) -> int:
    """Of an option that counts something, 1 to 9,999,999."""
    if not (text.isascii() and text.isdigit() and len(text) <= 7 and int(text)):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number from 1")
    return int(text)


def chosen(asked: Sequence[Any], known: Sequence[Any], what: str) -> list[Any]:
    """`asked`, or all of `known` where nothing was. Raises ConfigError for an unknown one."""
    for name in asked:
        if name not in known:
            near = nearest(str(name), list(map(str, known)))
            raise ConfigError(f"there is no {what} {str(name)[:40]!r}", COMMAND_LINE,
                              f"did you mean {near}?" if near else f"there are {', '.join(map(str, known))}")
    return list(asked) or list(known)


class Watch:
    """Says how far a long work is, and knows whether it was asked to end.

    Args:
        stop: set by a signal; None: nobody asks.
        tell: called with lines for people; None: nobody listens.
    """

    def __init__(self, stop: StopFlag | None = None, tell: Callable[[str], None] | None = None) -> None:
        self._stop, self._tell, self._told = stop, tell, time.monotonic()

    @property
    def stopped(self) -> bool:
        return self._stop is not None and self._stop.requested

    def say(self, text: str) -> None:
        """At once."""
        if self._tell is not None:
            self._tell(text)
        self._told = time.monotonic()

    def now(self, text: str) -> None:
        """Where nothing was said for some seconds."""
        if time.monotonic() - self._told >= EVERY:
            self.say(text)
