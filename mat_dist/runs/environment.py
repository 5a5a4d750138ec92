"""`environment.json`: what a run was made with, so that it can be judged and repeated later."""

from __future__ import annotations

import platform
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import mat_dist
from mat_dist.runs.files import write_json
from mat_dist.runs.exits import read_environment
from mat_dist.runs.folder import RunFolder

HIDDEN = "<redacted>"
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
    """Record the environment of `attempt`; those of earlier attempts stay in the list `attempts`.

    Args:
        folder: the run folder.
        attempt: number from `next_attempt`; call this early, so that a killed attempt counts too.
        argv: the command line; values of secrets are replaced.
        devices: the name of each rank's device.
        seed: `run.seed`.
        placement: peers, ranks, replicas and whatever else tells where peers lie; plain JSON values.
        job_id: SLURM job or torchrun run id.

    Raises:
        OutputError: the file cannot be written.
    """
    record = {
        "attempt": attempt, "started": datetime.now(UTC).isoformat(timespec="seconds"), "host": socket.gethostname(),
        "job_id": job_id, "command": redact(argv), "seed": seed, "placement": dict(placement),
        "devices": list(devices), "versions": versions(), "git": git_revision(),
    }
    before = read_environment(folder)
    attempts = [one for one in before["attempts"] if one["attempt"] != attempt] if before else []
    write_json(folder.environment, {**record, "attempts": [*attempts, record]})


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
