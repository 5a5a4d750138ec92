"""Errors that a user can meet, each with the exit code of a rank and of `exit.json`.

Every message is one line, `mat_dist: error: <what> (<where>): <how to fix>`. Errors that are not a
`MatError` are our bugs (exit code 70).
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

DONE = 0
BUG = 70


def printable(text: object) -> str:
    """As text that can be printed and stored: bytes of a file name that are no UTF-8, and what a terminal would obey,
    become escapes."""
    seen = re.sub(r"[\x00-\x08\x0e-\x1b\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], str(text))
    return seen.encode("utf-8", "backslashreplace").decode()


class MatError(Exception):
    """A failure with a known cause. `guilty` are the ranks that can no longer tell of it; `told`: it is another rank's,
    which tells all of it; `shared`: all ranks raise it, with this text.

    Args:
        what: what went wrong, with the value that was found.
        where: the file, setting, peer, rank or step concerned.
        how: what the user can do about it.
    """

    code = BUG
    guilty: tuple[int, ...] = ()
    told = False
    shared = False

    def __init__(self, what: str, where: str, how: str) -> None:
        self.what, self.where, self.how = (" ".join(printable(part).split()) for part in (what, where, how))
        super().__init__(f"{self.what} ({self.where}): {self.how}")

    def __reduce__(self) -> tuple:
        return type(self), (self.what, self.where, self.how)


class ConfigError(MatError):
    """A setting or a command line that cannot be used. `problems` holds all of them."""

    code = 2

    def __init__(self, what: str, where: str, how: str, problems: list[MatError] | None = None) -> None:
        super().__init__(what, where, how)
        self.problems: list[MatError] = problems if problems is not None else [self]


class DataError(MatError):
    """Images or labels that cannot be used."""

    code = 3


class CheckpointError(MatError):
    """A checkpoint that is missing, damaged or of another run."""

    code = 4


class OutputError(MatError):
    """The run folder or its disk cannot be written, or belongs to another run."""

    code = 5


class EnvironmentFault(MatError):
    """Ranks, devices or libraries do not fit what was asked for."""

    code = 6


class PeerFailed(MatError):
    """A peer raised an error; all ranks stop with the same text."""

    code = 13


class PeerSilent(MatError):
    """A peer's process died or stopped answering."""

    code = 14


class NonFinite(MatError):
    """A peer produced NaN or infinite values; no peer was updated. `peers` are the ones where it began, `stage` tells
    in what: adversarial example, logit, loss or gradient."""

    code = 15
    peers: tuple[int, ...] = ()
    stage: str = ""


class NotReportable(MatError):
    """An evaluation failed its soundness checks."""

    code = 16


class StopRequested(MatError):
    """Stopped by a signal at an agreed step, saved; start again to continue."""

    code = 75


class HelpShown(SystemExit):
    """`--help` ends a command with code 0. Any other SystemExit is a failure: somebody's code left in the middle."""

    def __init__(self) -> None:
        super().__init__(DONE)


# Restarting cannot help these: a torchrun restart that finds one of them in `exit.json` leaves at once.
FINAL_CODES = frozenset({2, 3, 4, 5, 6, 15, 75})


def optional(package: str, where: str, how: str) -> Any:
    """A module of a package that is not always installed. Raises EnvironmentFault where it cannot be imported."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise EnvironmentFault(f"the package {package} cannot be imported: {error}", where, how) from error


def some(lines: Sequence[str], most: int = 8) -> str:
    """The first lines of many on one, and how many more there are."""
    return "; ".join([*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])])


def nearest(word: str, known: Iterable[str], alike: float = 0.6) -> str | None:
    """The known word that `word` may be a misspelling of; `alike`: by difflib's measure."""
    return next(iter(difflib.get_close_matches(word[:80], list(known), 1, alike)), None)


def error_line(error: BaseException) -> str:
    """The one line that a user sees for `error`."""
    prefix = "mat_dist" if isinstance(error, StopRequested) else "mat_dist: error"  # a stop is what the user wanted
    return "{}: {what} ({where}): {how}".format(prefix, **described(error))


def described(error: BaseException) -> dict[str, Any]:
    """What is told of an error, here and elsewhere: code, what, where, how."""
    if isinstance(error, MatError):
        return {"code": error.code, "what": error.what, "where": error.where, "how": error.how}
    return {"code": BUG, "what": " ".join(f"{type(error).__name__}: {error}".split()), "where": "internal error",
            "how": "please report it with the traceback in rank_<r>.log"}


def told_error(told: Mapping[str, Any]) -> MatError:
    """The error that another rank has `described`."""
    kind = {cls.code: cls for cls in MatError.__subclasses__()}.get(told["code"], MatError)
    return kind(told["what"], told["where"], told["how"])
