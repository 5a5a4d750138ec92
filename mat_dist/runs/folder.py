"""Where a run writes: the paths of its folder, and how the folder gets its name."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Literal

from mat_dist.errors import CheckpointError, ConfigError, OutputError
from mat_dist.runs.files import reported

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LONGEST_STEM = 32  # leaves room for "-job" with a long id, or for a time and a suffix, within 64 characters
_PROOFS = frozenset({"environment.json", "exit.json", "lock"})
_FOLDERS = ("checkpoints", "eval", "tensorboard", "wandb")
_FILES = re.compile(r"(config\.yaml|environment\.json|exit\.json|metrics\.jsonl|summary\.csv|lock|\.lock\.guard|"
                    r"rank_\d+\.log)")
_POINTERS = ("checkpoints/latest", "checkpoints/best")
_KNOWN = re.compile(_FILES.pattern + r"|checkpoints|eval|report|\..*\.tmp|\.lock\.guard\.soft|exit\.json\.damaged.*")


class _Inside:
    """A path of that name in the folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: RunFolder, owner: type) -> Path:
        return folder.path / self._name


@dataclass(frozen=True)
class RunFolder:
    """The paths inside `<run.root>/<run.name>/`. Reads and writes nothing itself."""

    path: Path

    config = _Inside("config.yaml")  # resolved configuration
    environment = _Inside("environment.json")  # versions, devices, git revision, command line, attempts
    metrics = _Inside("metrics.jsonl")  # one JSON object per log step and per epoch
    summary = _Inside("summary.csv")  # a row per epoch and peer
    checkpoints = _Inside("checkpoints")  # folder of `step_<n>/`, `latest` and `best`
    eval = _Inside("eval")  # folder of evaluation results
    report = _Inside("report")  # folder of the HTML report
    exit = _Inside("exit.json")  # how each attempt ended
    lock = _Inside("lock")  # who writes into this folder now

    @property
    def name(self) -> str:
        return self.path.name

    def rank_log(self, rank: int) -> Path:
        """Log of one rank, with tracebacks."""
        return self.path / f"rank_{rank}.log"


def create_or_open(root: str | os.PathLike[str], name: str | None, *, config_name: str,
                   resume: Literal["auto", "must", "never"], job_id: str | None, now: datetime) -> RunFolder:
    """Make or find the folder of a run; call it in one process only.

    Without `name` the folder is `<config_name>-job<job_id>`, or without a job `<config_name>-<YYYYmmddTHHMMSSZ>`
    (with -2, -3, ... if that exists: two launches in one second get two folders). The folder lies directly below
    `root` and is never a symbolic link.

    Raises:
        ConfigError: `name` cannot be a folder name, or resume="must" cannot know which run is meant.
        CheckpointError: resume="must" and there is no such run.
        OutputError: the folder cannot be written, is not a run folder, or exists with resume="never".
    """
    if name is not None and not _NAME.fullmatch(name):
        raise ConfigError(f"{name[:80]!r} cannot be the name of a run", "run.name",
                          "use 1 to 64 letters, digits, '.', '_' and '-', the first one a letter or a digit")
    base = resolved(root)
    with reported(base):
        base.mkdir(parents=True, exist_ok=True)
    if name is None and job_id is None:
        if resume == "must":
            raise ConfigError("the run to continue has no name", "run.resume=must", "set run.name")
        return _make_timed(base, f"{_plain(config_name, _LONGEST_STEM)}-{now.astimezone(UTC):%Y%m%dT%H%M%SZ}")
    path = base / (name or _of_job(config_name, str(job_id)))
    if path.is_symlink():
        raise OutputError("the run folder is a symbolic link", str(path), "set run.root to where it points, or "
                                                                          "choose another run.name")
    if resume == "must" and not path.exists():
        raise CheckpointError("there is no run to continue", str(path), "check run.root and run.name, or set "
                                                                        "run.resume=auto")
    with reported(path):
        path.mkdir(exist_ok=True)
        _check_existing(path, resume)
    check_writable(path)
    return RunFolder(path)


def existing(root: str | os.PathLike[str], name: str | None, config_name: str, job_id: str | None) -> RunFolder | None:
    """The folder that `create_or_open` would continue; None where no run has begun there. Changes nothing."""
    if name is None:
        name = "" if job_id is None else _of_job(config_name, job_id)
    if not _NAME.fullmatch(name):  # the settings may be refused for it
        return None
    with suppress(OSError, ConfigError):
        path = resolved(root) / name
        return RunFolder(path) if not path.is_symlink() and _is_run(set(os.listdir(path))) else None
    return None


def _of_job(config_name: str, job_id: str) -> str:
    return f"{_plain(config_name, _LONGEST_STEM)}-job{_plain(job_id, 28)}"


def _is_run(names: set[str]) -> bool:
    """Whether a folder that holds these is that of a run, which may have been killed at its start."""
    return bool(names) and (bool(names & _PROOFS) or all(_KNOWN.fullmatch(name) for name in names))


def _plain(text: str, longest: int) -> str:
    """`text` as part of a folder name; a changed or cut text gets 8 hex digits so that it stays distinct."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("._-") or "run"
    if plain == text and len(text) <= longest:
        return text
    return f"{plain[: longest - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def resolved(root: str | os.PathLike[str]) -> Path:
    """run.root as an absolute path. Raises ConfigError where it is none."""
    text = os.fspath(root)
    if not text or "\0" in text:
        raise ConfigError(f"{text[:80]!r} cannot be a folder", "run.root", "give the path of a folder")
    try:
        return Path(text).expanduser().resolve()
    except (RuntimeError, OSError) as error:  # no such user, a loop of links
        raise ConfigError(f"{text[:80]!r} leads nowhere: {error}", "run.root", "give the path of a folder") from None


def _make_timed(base: Path, stem: str) -> RunFolder:
    for number in count(1):
        path = base / (f"{stem}-{number}" if number > 1 else stem)
        with reported(path), suppress(FileExistsError):
            path.mkdir()
            break
    return RunFolder(path)


def _check_existing(path: Path, resume: str) -> None:
    names = set(os.listdir(path))
    if not names:
        return
    if not _is_run(names):
        raise OutputError("the folder is not empty and is not a run folder", str(path), "choose another run.name")
    if resume == "never":
        raise OutputError("the run exists already", str(path), "choose another run.name, or set run.resume=auto to "
                                                               "continue it")
    for name in sorted({*names, *_POINTERS}):
        kind = "folder" if name in _FOLDERS else "file" if name in _POINTERS or _FILES.fullmatch(name) else None
        found = path / name
        if kind and os.path.lexists(found) and not (found.is_dir() if kind == "folder" else found.is_file()):
            raise OutputError(f"a {kind} of that name is needed, and something else stands there", str(found),
                              "move it elsewhere, or choose another run.name")


def check_writable(path: Path) -> None:
    """Raises OutputError where no file can be made in a folder."""
    probe = path / f".probe.{secrets.token_hex(4)}.tmp"
    with reported(path):
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        os.unlink(probe)
