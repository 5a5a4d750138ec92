"""`exit.json`: how each attempt ended. torchrun returns 0 or 1 for everything, so scripts read this file."""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mat_dist.runs.files import parse_json, reported, set_aside, write_json
from mat_dist.errors import BUG, DONE, MatError
from mat_dist.runs.folder import RunFolder


def write_exit(folder: RunFolder, attempt: int, error: BaseException | None, state: str) -> None:
    """Record how `attempt` ended; the records of other attempts stay, an earlier one of this attempt is replaced.

    Args:
        folder: the run folder.
        attempt: number from `next_attempt`.
        error: why it ended; None: it is done (code 0). Errors that are no `MatError` are bugs (code 70).
        state: one word for people and scripts: done, stopped, failed, ...

    Raises:
        OutputError: the file cannot be written.
    """
    what, where, how = "", "", ""
    if isinstance(error, MatError):
        what, where, how = error.what, error.where, error.how
    elif error is not None:
        what, where = " ".join(f"{type(error).__name__}: {error}".split()), "internal error"
        how = "please report it with the traceback in rank_<r>.log"
    code = DONE if error is None else error.code if isinstance(error, MatError) else BUG
    record = {"attempt": attempt, "code": code, "state": state, "what": what, "where": where, "how": how,
              "time": datetime.now(UTC).isoformat(timespec="seconds"), "host": socket.gethostname()}
    before = read_exit(folder)
    attempts = [one for one in before["attempts"] if one["attempt"] != attempt] if before else []
    write_json(folder.exit, {"code": code, "state": state, "attempts": [*attempts, record]})


def read_exit(folder: RunFolder) -> dict[str, Any] | None:
    """`exit.json` as {"code", "state", "attempts": [{"attempt", "code", "state", "what", ...}]}, newest last.

    None if there is none. A damaged file is renamed to `exit.json.damaged` and counts as none.

    Raises:
        OutputError: the file cannot be read, or a damaged one cannot be renamed.
    """
    return _read_attempts(folder.exit, ("attempt", "code", "state"))


def next_attempt(folder: RunFolder) -> int:
    """1 for a new run, else one more than any attempt that has started or ended."""
    documents = (read_exit(folder), read_environment(folder))
    return 1 + max((one["attempt"] for document in documents if document for one in document["attempts"]), default=0)


def finished(folder: RunFolder) -> bool:
    """Whether the last attempt ended with code 0 and state done; such a run is not trained any further."""
    document = read_exit(folder)
    return document is not None and (document["code"], document["state"]) == (DONE, "done")


def read_environment(folder: RunFolder) -> dict[str, Any] | None:
    """`environment.json`; None if there is none, a damaged one is set aside; as `read_exit`."""
    return _read_attempts(folder.environment, ("attempt",))


def _read_attempts(file: Path, keys: tuple[str, ...]) -> dict[str, Any] | None:
    with reported(file):
        try:
            document = parse_json(file.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            document = None
        if not _sound(document, keys):
            set_aside(file)
            return None
    return document


def _sound(document: Any, keys: tuple[str, ...]) -> bool:
    if not isinstance(document, dict) or not isinstance(attempts := document.get("attempts"), list) or not attempts:
        return False
    whole = all(isinstance(one, dict) and all(key in one for key in keys) and type(one["attempt"]) is int
                for one in attempts)
    return whole and all(key in document for key in keys if key != "attempt")
