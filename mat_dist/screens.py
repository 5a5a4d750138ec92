"""The standard streams of a command: a screen that is lost ends nothing, and nobody is asked anything."""

from __future__ import annotations

import errno
import getpass
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

from mat_dist.errors import EnvironmentFault, OutputError


class Output:
    """A text stream whose loss does no harm: closed, full, cut by `| head`, hung up, of another encoding, or None.

    Attributes:
        lost: why something that was written did not arrive; None while all did.
    """

    def __init__(self, stream: TextIO | None) -> None:
        absent = getattr(stream, "closed", stream is None)
        self._stream: Any = open(os.devnull, "w") if absent else stream  # noqa: SIM115
        self.lost: Exception | None = OSError(errno.EBADF, "it is closed") if absent else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._kept(self._write, text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._kept(self._stream.flush)

    def isatty(self) -> bool:
        return bool(self._kept(self._stream.isatty))

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))

    def _kept(self, work: Callable[..., Any], *args: Any) -> Any:
        try:
            return work(*args)
        except (OSError, ValueError) as error:  # ValueError: somebody closed it
            self.lost = self.lost or error

    def drain(self) -> None:
        """What a lost stream still holds goes nowhere: the interpreter would try again at its end, and exit with
        120."""
        self.flush()
        if self.lost is None:
            return
        with suppress(OSError, ValueError):
            number, nowhere = self._stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            kept = os.dup(number)
            os.dup2(nowhere, number)
            try:
                self._stream.flush()
            finally:
                os.dup2(kept, number)
                os.close(kept)
                os.close(nowhere)


class NoInput(io.TextIOBase):
    """Standard input of a command. Some libraries ask (a login, a download): an unattended run would wait for ever.
    `kept`: the number under which the real one stays open, since programs that a library starts find an empty one."""

    def __init__(self, stream: TextIO | None, kept: int) -> None:
        self._stream, self._kept = stream, kept

    def readline(self, size: Any = -1) -> Any:
        """Raises EnvironmentFault, but for a debugger."""
        if sys.gettrace() is not None and self._stream is not None:
            os.dup2(self._kept, 0)
            return self._stream.readline()
        refuse()

    read = readline
    buffer = property(lambda self: refuse())


def refuse(*_: Any, **__: Any) -> NoReturn:
    """Raises EnvironmentFault."""
    raise EnvironmentFault("a library or plug-in asks a question, which nobody answers here", "standard input",
                           "answer it beforehand: log in, download, or set what it asks for")


@contextmanager
def steady() -> Iterator[None]:
    """Put these streams in the place of the interpreter's, and those back at the end."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # else a file of the run gets the number of a closed stream
        os.set_inheritable(number, True)
    kept = os.dup(0)
    os.dup2(number, 0)
    os.close(number)
    before = sys.stdin, sys.stdout, sys.stderr, getpass.getpass
    screens: list[Any] = [Output(sys.stdout), Output(sys.stderr)]
    sys.stdin, (sys.stdout, sys.stderr), getpass.getpass = NoInput(sys.stdin, kept), screens, refuse
    try:
        yield
    finally:
        for screen in screens:
            screen.drain()
        sys.stdin, sys.stdout, sys.stderr, getpass.getpass = before
        os.dup2(kept, 0)
        os.close(kept)


def loss() -> Exception | None:
    """Why standard output did not take all that was written; None where it did."""
    sys.stdout.flush()
    return getattr(sys.stdout, "lost", None)


def arrived() -> None:
    """At the end of a command whose result is what it prints. Raises OutputError where that did not arrive; a reader
    that had enough of it (`| head`) is no failure."""
    lost = loss()
    if lost is not None and not isinstance(lost, BrokenPipeError):
        raise OutputError(f"the result cannot be shown: {getattr(lost, 'strerror', None) or lost}", "standard output",
                          "give it a place that takes it")
