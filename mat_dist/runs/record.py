"""Two files that tell of each attempt: `environment.json`, what it was made with, and `exit.json`, how it ended.

torchrun returns 0 or 1 for everything, so scripts read `exit.json`. What ends a start before its run is open goes there
too: else the file would still tell of the attempt before: 75, start again, or 0, done. A damaged file is renamed to
`<name>.damaged` and counts as none. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import mat_dist
from mat_dist.cli import LOGGED
from mat_dist.config import Config, RunConfig, binding
from mat_dist.distributed.launch import Launch
from mat_dist.errors import DONE, OutputError, described
from mat_dist.runs.files import open_plain, overwrite, parse_json, reported, set_aside, write_json
from mat_dist.runs.folder import RunFolder, existing
from mat_dist.runs.lock import RunLock

HIDDEN = "<redacted>"
REFUSED = "refused"  # the state of a start that came to nothing, so that the run is as it was
MOST_ATTEMPTS = 10**9
_SECRET = re.compile(r"token|secret|passw|pwd|credential|key|auth", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_URL_QUERY = re.compile(r"(?<=[?&])([^=&#\s]*(?:token|secret|passw|pwd|credential|key|auth|sig)[^=&#\s]*=)[^&#\s]+",
                        re.IGNORECASE)
# What well-known services issue: Hugging Face, GitHub, GitLab, AWS, Slack, OpenAI; and JSON web tokens.
_ISSUED = re.compile(r"\b(?:hf_|gh[opsur]_|github_pat_|glpat-|AKIA|ASIA|xox[abprs]-|sk-)[A-Za-z0-9_-]{12,}"
                     r"|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+")
_PACKAGES = ("torch", "torchvision", "numpy")


def write_environment(folder: RunFolder, *, attempt: int, argv: Sequence[str], devices: Sequence[str], seed: int,
                      placement: Mapping[str, Any], job_id: str | None) -> None:
    """Record the environment of `attempt`; those of earlier attempts stay in the list `attempts`. Raises OutputError.

    Args:
        attempt: number from `next_attempt`; call this early, so that a killed attempt counts too.
        argv: the command line; values of secrets are replaced.
        devices: the name of each rank's device.
        placement: peers, ranks, replicas and whatever else tells where peers lie; plain JSON values.
        job_id: SLURM job or torchrun run id.
    """
    record = {
        "attempt": attempt, "started": datetime.now(UTC).isoformat(timespec="seconds"), "host": socket.gethostname(),
        "job_id": job_id, "command": redact(argv), "seed": seed, "placement": dict(placement),
        "devices": list(devices), "versions": versions(), "git": git_revision(),
    }
    write_json(folder.environment, _with_attempt(record, read_environment(folder), record))


def read_environment(folder: RunFolder) -> dict[str, Any] | None:
    """`environment.json`, or None; as `read_exit`."""
    return _read_attempts(folder.environment, ("attempt",))


def versions() -> dict[str, str]:
    """Versions of Python, mat_dist, torch, torchvision and numpy, without importing them."""
    found = {"python": platform.python_version(), "mat_dist": mat_dist.__version__, "system": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def redact(argv: Sequence[str]) -> list[str]:
    """The command line without secrets.

    Hidden are the values of `name=value`, `--name=value` and `--name value` where the name speaks of a token,
    secret, password, credential, key or authorisation; inside URLs the user, the password and such parameters of
    the query; and, wherever they stand, tokens that have the form of those of well-known services.
    """
    shown: list[str] = []
    hide_next = False
    for argument in argv:
        name, equals, _ = argument.partition("=")
        if hide_next and not argument.startswith("-"):
            shown.append(HIDDEN)
        elif equals and _SECRET.search(name):
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(_ISSUED.sub(HIDDEN, _URL_QUERY.sub(rf"\1{HIDDEN}", _URL_PASSWORD.sub(HIDDEN, argument))))
        hide_next = not equals and argument.startswith("-") and _SECRET.search(name) is not None
    return shown


def git_revision() -> str | None:
    """Commit of the checkout that mat_dist runs from, with "-dirty" if tracked files differ; None outside git."""
    here = Path(mat_dist.__file__).parent
    if _git(here, "ls-files", "--error-unmatch", "__init__.py") is None:  # installed inside somebody else's checkout
        return None
    return _git(here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10,
                              check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine, or a file system that hangs
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# ------------------------------------------------------------------------------------------------ how it ended


def write_exit(folder: RunFolder, attempt: int, error: BaseException | None, state: str) -> None:
    """Record how `attempt` ended; the records of other attempts stay, an earlier one of this is replaced. Raises
    OutputError.

    Args:
        error: why it ended; None: it is done (code 0). Errors that are no `MatError` are bugs (code 70).
        state: one word for people and scripts: done, stopped, failed, refused, ...

    On a full disk the file is written in its place: else it would still tell how the attempt before ended.
    """
    told = described(error) if error is not None else {"code": DONE, "what": "", "where": "", "how": ""}
    newest = {"code": told["code"], "state": state}
    record = {"attempt": attempt, **newest, **told, "time": datetime.now(UTC).isoformat(timespec="seconds"),
              "host": socket.gethostname()}
    document = _with_attempt(newest, read_exit(folder), record)
    try:
        write_json(folder.exit, document)
    except OutputError:
        with suppress(OSError):
            return overwrite(folder.exit, json.dumps(document, separators=(",", ":")).encode())
        raise


def read_exit(folder: RunFolder) -> dict[str, Any] | None:
    """`exit.json` as {"code", "state", "attempts": [{"attempt", "code", "state", "what", ...}]}, newest last; None if
    there is none. Raises OutputError: it cannot be read, or a damaged one cannot be renamed."""
    return _read_attempts(folder.exit, ("attempt", "code", "state"))


def next_attempt(folder: RunFolder) -> int:
    """1 for a new run, else one more than any attempt that has started or ended; what cannot be read does not count."""
    documents = []
    for read in (read_exit, read_environment):
        with suppress(OutputError):  # the attempt will tell, when it writes there
            documents.append(read(folder))
    return 1 + max((one["attempt"] for document in documents if document for one in document["attempts"]), default=0)


def finished(folder: RunFolder) -> bool:
    """Whether the newest attempt ended with code 0 and state done; such a run is not trained any further. Starts that
    were refused do not count, and one that was killed counts though it could not tell how it ended."""
    ended, started = read_exit(folder), read_environment(folder)
    tried = [one for one in ended["attempts"] if one["state"] != REFUSED] if ended else []
    newest = started["attempts"][-1]["attempt"] if started else 0
    return bool(tried) and (tried[-1]["code"], tried[-1]["state"]) == (DONE, "done") and tried[-1]["attempt"] >= newest


# ------------------------------------------------------------------------------------------------ before a run is open


@dataclass
class Start:
    """Which run a start is to begin or continue, as far as it is known."""

    root: str
    name: str | None
    config_name: str = ""
    job: str | None = None
    launch: Launch = field(default_factory=Launch)

    def learn(self, config: Config, config_name: str) -> None:
        """The settings could be read."""
        self.root, self.name, self.config_name = config.run.root, config.run.name, config_name
        self.job = job_of(config, self.launch)

    def refused(self, error: Exception) -> None:
        """Record why it came to nothing; not where another process has the run, and will tell its end itself."""
        known = LOGGED not in getattr(error, "__notes__", []) and self.launch.speaks_for(getattr(error, "guilty", ()))
        folder = existing(self.root, self.name, self.config_name, self.job) if known else None
        with suppress(OutputError):  # the first error counts
            if folder is not None and RunLock(folder, self.launch).held_by() is None:
                write_exit(folder, next_attempt(folder), error, REFUSED)


def job_of(config: Config, launch: Launch) -> str | None:
    """What names a run without `run.name` in a job: a requeued job finds its run, and runs with other settings, such as
    another seed, do not collide. None without a job."""
    settings = hashlib.sha256(json.dumps(binding(config), sort_keys=True).encode()).hexdigest()
    return launch.job_id and f"{launch.job_id}-{settings[:8]}"


@contextmanager
def recording(words: Sequence[str]) -> Iterator[Start]:
    """The start that a command line asks for; `learn` more of it as soon as its settings are read."""
    told = dict(word.split("=", 1) for word in words if word.startswith(("run.root=", "run.name=")))
    start = Start(told.get("run.root", RunConfig().root), told.get("run.name"))
    try:
        start.launch = Launch.from_environment()  # of the ranks one tells
        yield start
    except Exception as error:
        if "--dry-run" not in words:
            start.refused(error)
        raise


# ------------------------------------------------------------------------------------------------ both files


def _with_attempt(newest: Mapping[str, Any], before: Mapping[str, Any] | None,
                  record: Mapping[str, Any]) -> dict[str, Any]:
    """`newest` and the list of attempts, with `record` in place of an earlier one of its number."""
    others = [one for one in before["attempts"] if one["attempt"] != record["attempt"]] if before else []
    return {**newest, "attempts": [*others, record]}


def _read_attempts(file: Path, keys: tuple[str, ...]) -> dict[str, Any] | None:
    with reported(file):
        try:
            with open_plain(file) as stream:
                document = parse_json(stream.read())
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
                and 0 <= one["attempt"] < MOST_ATTEMPTS for one in attempts)
    return whole and all(key in document for key in keys if key != "attempt")
