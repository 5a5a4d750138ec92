"""The runs of a study: each an ordinary `python -m mat_dist.train` in a process of its own, resumed where it was."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mat_dist
from mat_dist.checkpoints import json_digest
from mat_dist.config import load_config, resume_conflicts
from mat_dist.config.schema import Config
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import ConfigError, MatError, OutputError, StopRequested, error_class
from mat_dist.runs.files import reported
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.record import finished, read_environment

PLACES = ("data.root", "data.cache", "run.root")  # of this machine: not part of a result
# Seconds after the end of the budget: a second request, which does not wait for the end of a step, then SIGKILL.
PATIENCE = ((0.0, signal.SIGTERM), (120.0, signal.SIGTERM), (180.0, signal.SIGKILL))
POLL = 0.1


class Enough(Exception):
    """The time is over, or a stop was asked for: nothing more is begun."""


OTHER_RUN = re.compile(r"\bRUN\((\w+)\)")  # in a setting: the run of another row with the same seed


@dataclass(frozen=True)
class Job:
    """One run of a row.

    Attributes:
        row, seed, folder: the row's name, its seed, the run's folder.
        words: of the command; `told`: as the plan has them, with RUN(row) for the folder of another row's run.
        config: the settings.
    """

    row: str
    seed: int
    folder: RunFolder
    words: tuple[str, ...]
    told: tuple[str, ...]
    config: Config

    @classmethod
    def make(cls, row: str, seed: int, root: Path, config: str, settings: Sequence[str]) -> Job:
        """Raises ConfigError for settings that this version does not know."""
        name = f"{row}_{seed}"
        told = ("--config", config, *settings, f"run.root={root}", f"run.name={name}", f"run.seed={seed}",
                "log.console=plain")
        words = tuple(OTHER_RUN.sub(lambda found: str(root / f"{found[1]}_{seed}"), word) for word in told)
        return cls(row, seed, RunFolder(root / name), words, told, load_config(config, words[2:]))

    @property
    def needs(self) -> frozenset[str]:
        """Rows whose run with the same seed must be trained before this one."""
        return frozenset(found for word in self.told for found in OTHER_RUN.findall(word))

    @property
    def log(self) -> Path:
        """What the commands of this run printed."""
        return self.folder.path.with_name(f"{self.folder.name}.log")

    @property
    def command(self) -> str:
        """The command for people, without the folders of this machine."""
        shown = [f"{key}={key.upper().replace('.', '_')}" if key in PLACES else word for word in self.told
                 for key in [word.partition("=")[0]] if key not in ("run.root", "run.name", "log.console")]
        return " ".join(["python -m mat_dist.train", *shown])

    @property
    def places(self) -> tuple[str, ...]:
        """Where its data lie now, which may be elsewhere than when it was trained."""
        return tuple(word for word in self.words if word.startswith(("data.root=", "data.cache=")))

    @property
    def digest(self) -> str:
        """Of all settings that can change the result, the seed left out: the same for all seeds of a row."""
        values = self.config.model_dump(mode="json", exclude={"run": True, "log": True, "comm": True,
                                                              "checkpoint": True, "peers": {"__all__": {"init_from"}},
                                                              "data": {"root", "cache", "download", "residency"}})
        return json_digest(values)[:12]

    @cached_property
    def conflicts(self) -> list[str]:
        """In what a run that is there already has other settings, as when the plan was changed; one that this study
        makes has none. Read once: 30 ms a run, and every page asks for all of them."""
        if not self.folder.config.exists():
            return []
        try:
            held = load_config(str(self.folder.config)).model_dump(mode="json")
        except ConfigError as error:  # of a version with other settings
            return [f"they cannot be read: {error}"]
        for theirs, mine in zip(held["peers"], self.config.peers, strict=False):
            source = Path(mine.init_from or "")
            if source.parent == self.folder.path.parent and source.name == Path(theirs["init_from"] or "").name:
                theirs["init_from"] = mine.init_from  # the same run of this study, whose folder was moved
        return resume_conflicts(held, self.config)

    @property
    def done(self) -> bool:
        """Whether it is trained to its end, with these settings."""
        return finished(self.folder) and not self.conflicts


class Runner:
    """Starts the commands of a study, from as many threads as the study has jobs at a time.

    Args:
        stop: set by a signal; the command that runs is asked to stop too.
        budget: seconds from now after which the command that runs is asked to save and stop; None: no end.
        tell: called with lines for people.

    Attributes:
        ended: set it to begin nothing more, and to ask what runs to stop.
    """

    def __init__(self, stop: StopFlag, budget: float | None, tell: Callable[[str], None]) -> None:
        self._stop, self.tell, self.ended = stop, tell, False
        self._ends = None if budget is None else time.monotonic() + budget

    @property
    def over(self) -> bool:
        """Whether nothing more may begin."""
        return self.ended or self._stop.requested or (self._ends is not None and time.monotonic() >= self._ends)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """A scope whose failure ends the study: what runs is asked to stop, in whichever thread."""
        try:
            yield
        except BaseException:
            self.ended = True
            raise

    def begin(self, text: str) -> None:
        """Tell what comes now. Raises Enough where nothing more may begin."""
        if self.over:
            raise Enough
        self.tell(text)

    def run(self, module: str, words: Sequence[str], log: Path) -> int:
        """Run `python -m module words` on one thread, its output added to `log` -> its exit code.

        Raises:
            Enough: the time was over before, or while it ran (it was asked to stop, and can be continued).
        """
        if self.over:
            raise Enough
        package = str(Path(mat_dist.__file__).resolve().parents[1])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        with reported(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as output:
                # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
                process = subprocess.Popen([sys.executable, "-m", module, *words], stdin=subprocess.DEVNULL,
                                           stdout=output, stderr=subprocess.STDOUT, env=environment,
                                           start_new_session=True)
        code = self._wait(process)
        if code == StopRequested.code or (code < 0 and self.over):
            raise Enough
        return code

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        requests, since = list(PATIENCE), 0.0
        try:
            while process.poll() is None:
                if self.over:
                    since = since or time.monotonic()
                    if requests and time.monotonic() - since >= requests[0][0]:
                        process.send_signal(requests.pop(0)[1])
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL)
        finally:
            if process.poll() is None:  # this process fails: leave no orphan
                process.kill()
                process.wait()
        return process.returncode


def machines(jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """What the finished runs were made with (in their last attempt): devices, versions and commit, and how many runs;
    each kind once."""
    found: dict[str, dict[str, Any]] = {}
    for job in jobs:
        record = read_environment(job.folder) if job.done else None
        if record is not None:
            one = {"devices": sorted(set(record["devices"])), "git": record["git"],
                   "versions": plain(record["versions"])}
            found.setdefault(json_digest(one), {**one, "runs": 0})["runs"] += 1
    return sorted(found.values(), key=lambda one: -one["runs"])


def plain(versions: Mapping[str, str]) -> dict[str, str]:
    """Versions without the name of the operating system's build."""
    return {name: value for name, value in versions.items() if name != "system"}


def train(job: Job, runner: Runner) -> None:
    """Train to the end what is not yet.

    Raises:
        Enough: see `Runner`.
        MatError: the training failed, or the folder holds a run with other settings; of the class of its exit code.
    """
    if job.conflicts:
        raise OutputError(f"the folder holds a run with other settings: {'; '.join(job.conflicts[:4])}",
                          job.folder.name, "remove that folder, or choose another --root")
    if job.done:
        return
    runner.begin(f"{job.row}, seed {job.seed}: training")
    code = runner.run("mat_dist.train", job.words, job.log)
    if code:
        raise failure(code, job, "the training")


def failure(code: int, job: Job, what: str) -> MatError:
    """The error of a command that ended with `code`, with the last error line of its log."""
    lines = job.log.read_text(errors="replace").splitlines()
    told = next((line for line in reversed(lines) if line.startswith("mat_dist: error: ")), f"see {job.log.name}")
    told = told.removeprefix("mat_dist: error: ").replace(f"{job.folder.path.parent.resolve()}{os.sep}", "")
    return error_class(code)(f"{what} ended with code {code}: {told[:300]}",
                             job.folder.name, "mend that and start the same command again")


def training_seconds(folder: RunFolder) -> float | None:
    """Seconds in training steps, from the run's records: mean step time times steps. None where there are none."""
    newest: dict[int, dict[str, Any]] = {}
    with suppress(OSError):
        for line in folder.metrics.read_text().splitlines():
            with suppress(ValueError):
                record = json.loads(line)
                if "step_s" in record:
                    newest[record["step"]] = record
    if not newest:
        return None
    total, before = 0.0, 0
    for step, record in sorted(newest.items()):  # each record is the mean since the one before it
        total += record["step_s"] * (step - before)
        before = step
    return total
