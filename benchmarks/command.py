"""What the command lines of the benchmarks share."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mat_dist.config.help import Options, nearest
from mat_dist.config.tree import COMMAND_LINE
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import ConfigError, HelpShown
from mat_dist.screens import arrived

EVERY = 5.0  # seconds between two lines about how far a long work is


class Command(Options):
    """The options of one command of `python -m benchmarks.speed` or `study`; its other words are left as `words`."""

    def __init__(self, name: str, text: str, words: str = "[key=value ...]") -> None:
        super().__init__("", text, words, needs_words=False)
        self.prog = f"python -m benchmarks.{name}"


def read_command(words: Sequence[str], commands: Mapping[str, Options], text: str | None) -> Namespace:
    """The options of the command that the first word names, as `command`. Without a word, `text` and HelpShown.

    Raises ConfigError.
    """
    if not words or words[0] in ("-h", "--help"):
        print(text)
        arrived()
        raise HelpShown
    (name,) = chosen(words[:1], list(commands), "command")
    found = commands[name].read(words[1:])
    found.command = name
    return found


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
