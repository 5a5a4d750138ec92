"""The runs of a study: each an ordinary `python -m mat_dist.train` in a process of its own, resumed where it was."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.command import chosen
from benchmarks.study.plan import SearchSuite, Suite
from mat_dist import checkpoints
from mat_dist.checkpoints import json_digest
from mat_dist.cli import tell
from mat_dist.config import load_config, resume_conflicts
from mat_dist.config.schema import Config
from mat_dist.distributed.stopping import StopFlag, watching
from mat_dist.errors import ConfigError, MatError, OutputError, StopRequested, told_error
from mat_dist.report.files import read_records
from mat_dist.runs.console import duration
from mat_dist.runs.files import reported, write_json, write_text
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.record import finished, git_revision, read_environment
from mat_dist.tools.dryrun import training_passes

ROOT = Path(__file__).resolve().parents[2]  # of the repository
PLACES = ("data.root", "data.cache", "run.root")  # of this machine: not part of a result
# Seconds after the end of the budget: a second request, which does not wait for the end of a step, then SIGKILL.
PATIENCE = ((0.0, signal.SIGTERM), (120.0, signal.SIGTERM), (180.0, signal.SIGKILL))
POLL = 0.1
EVERY = 30.0  # seconds between two lines about how far a command is
OTHER_RUN = re.compile(r"\bRUN\((\w+)\)")  # in a setting: the run of another row with the same seed


S = TypeVar("S", Suite, SearchSuite)


class Enough(Exception):
    """The time is over, or a stop was asked for: nothing more is begun."""


# ------------------------------------------------------------------------------------------------ one run


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
        except MatError as error:  # of a version with other settings
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
    return told_error({"code": code, "what": f"{what} ended with code {code}: {told[:300]}", "where": job.folder.name,
                       "how": "mend that and start the same command again"})


def training_seconds(folder: RunFolder) -> float | None:
    """Seconds in training steps, from the run's records: mean step time times steps. None where there are none."""
    total, before = 0.0, 0
    for record in read_records(folder.metrics, []):  # each is the mean since the one before it
        if "step_s" in record:
            total += record["step_s"] * (record["step"] - before)
            before = record["step"]
    return total if before else None


# ------------------------------------------------------------------------------------------------ several seeds


def choose_suite(options: Namespace, suites: Mapping[str, S]) -> S:
    """The suite that was asked for, by default the first; `options` get its name and the folder of its runs. Raises
    ConfigError."""
    (options.suite,) = chosen([options.suite or next(iter(suites))], list(suites), "suite")
    options.root = options.root or Path("runs", f"{options.command}_{options.suite}")
    return suites[options.suite]


@dataclass
class Trained:
    """What is trained with several seeds: a row of a table, or a setting of a search.

    Attributes:
        jobs: by seed; empty where this version cannot train it, which `error` explains.
        failures: seed -> why training or evaluation failed.
    """

    name: str
    jobs: dict[int, Job] = field(default_factory=dict)
    error: str = ""
    failures: dict[int, str] = field(default_factory=dict)

    def plan(self, suite: Suite | SearchSuite, root: Path, settings: Sequence[str]) -> None:
        """Make the jobs, or say why there are none."""
        try:
            self.jobs = {seed: Job.make(self.name, seed, root, suite.config, settings) for seed in suite.seeds}
        except ConfigError as error:
            self.error = "; ".join(f"{one.what} ({one.where})" for one in error.problems)

    @property
    def first(self) -> Job | None:
        return next(iter(self.jobs.values()), None)

    @property
    def passes(self) -> tuple[int, int, int] | None:
        """Steps, forward and backward passes of its training; None where they cannot be known yet."""
        if self.first is None:
            return None
        steps = next((checkpoints.load_manifest(job.folder).step for job in self.jobs.values() if job.done), None)
        return training_passes(self.first.config, steps)


T = TypeVar("T", bound=Trained)


def head_document(options: Namespace, suite: Suite | SearchSuite, units: Sequence[Trained]) -> dict[str, Any]:
    """What the results of every study begin with, as JSON values."""
    return {"suite": options.suite, "file": options.file.name,
            "file_digest": hashlib.sha256(options.file.read_bytes()).hexdigest(),
            "settings": [word for word in options.words if word.partition("=")[0] not in PLACES],
            "config": suite.config, "base_settings": list(suite.settings), "seeds": list(suite.seeds),
            "git": git_revision(), "machines": machines(job for unit in units for job in unit.jobs.values()),
            "time": datetime.now(UTC).isoformat(timespec="seconds")}


def machines(jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """What the finished runs were made with (in their last attempt): devices, versions and commit, and how many runs;
    each kind once."""
    found: dict[str, dict[str, Any]] = {}
    for job in jobs:
        record = read_environment(job.folder) if job.done else None
        if record is not None:
            versions = {name: value for name, value in record["versions"].items() if name != "system"}
            one = {"devices": sorted(set(record["devices"])), "git": record["git"], "versions": versions}
            found.setdefault(json_digest(one), {**one, "runs": 0})["runs"] += 1
    return sorted(found.values(), key=lambda one: -one["runs"])


def write_results(options: Namespace, name: str, document: Mapping[str, Any], page: str) -> None:
    """`<name>.json` and `<name>.md`, each whole or as before. Raises OutputError."""
    with reported(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / f"{name}.json", document)
    write_text(options.out / f"{name}.md", page)


# ------------------------------------------------------------------------------------------------ processes


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
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        with reported(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as output:
                # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
                process = subprocess.Popen([sys.executable, "-m", module, *words], stdin=subprocess.DEVNULL,
                                           stdout=output, stderr=subprocess.STDOUT, env=environment,
                                           start_new_session=True)
        code = self._wait(process, log)
        if code == StopRequested.code or (code < 0 and self.over):
            raise Enough
        return code

    def _wait(self, process: subprocess.Popen[bytes], log: Path) -> int:
        requests, since, told = list(PATIENCE), 0.0, time.monotonic()
        try:
            while process.poll() is None:
                now = time.monotonic()
                if self.over:
                    since = since or now
                    if requests and now - since >= requests[0][0]:
                        process.send_signal(requests.pop(0)[1])
                if now - told >= EVERY:
                    told = now
                    self.tell(f"{log.stem}: {last_line(log)}")
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL)
        finally:
            if process.poll() is None:  # this process fails: leave no orphan
                process.kill()
                process.wait()
        return process.returncode


def last_line(log: Path) -> str:
    """What a command printed last, at most a line of the screen."""
    lines = log.read_text(errors="replace").rstrip().splitlines() or ["started"]
    return " ".join(lines[-1].split())[:100]


def carry_out(options: Namespace, work: Sequence[tuple[T, int, Callable[[Runner], Any]]],
              write: Callable[[], None]) -> None:
    """Run the work of a study within its budget; one part that fails stops no other.

    Args:
        options: `jobs` runs at a time, `budget` in seconds or None, name of the `suite`.
        work: unit, seed, and what is to be done with its run.
        write: writes the results; called after each part, and at the end.

    Raises StopRequested where the time was over or a signal came.
    """
    left = {number: f"{unit.name}_{seed}" for number, (unit, seed, _) in enumerate(work)}
    over, count, began = False, 0, time.monotonic()
    with watching() as stop:
        runner = Runner(stop, options.budget, tell)
        tasks = [(unit.jobs[seed], partial(do, runner)) for unit, seed, do in work]
        try:
            with closing(side_by_side(tasks, options.jobs)) as finished, runner.ending():
                for number, future in finished:
                    unit, seed, _ = work[number]
                    try:
                        future.result()
                        del left[number]
                    except Enough:
                        over = True
                    except MatError as error:
                        unit.failures[seed] = str(error)
                        tell(f"warning: {unit.name}, seed {seed}: {error}")
                    if not over:
                        write()
                        count += 1
                        rest = duration((time.monotonic() - began) / count * (len(work) - count))
                        tell(f"{unit.name}, seed {seed}: {count} of {len(work)} runs, about {rest} left")
        finally:
            write()
    if over:
        names = list(left.values())
        raise StopRequested(f"the time is over or a signal came; {len(names)} runs are left: {', '.join(names[:12])}"
                            f"{', ...' if len(names) > 12 else ''}", f"suite {options.suite}",
                            "start the same command again to continue")


Task = tuple[Job, Callable[[], Any]]


def side_by_side(tasks: Sequence[Task], jobs: int) -> Generator[tuple[int, Future[Any]]]:
    """Run tasks, `jobs` at a time, begun in their order; one whose job needs the run of another waits for that.

    Returns:
        (number of the task, its ended future), as they end. Close it (`contextlib.closing`) to begin no more.
    """
    futures: list[Future[Any]] = []

    def after(needed: Sequence[Future[Any]], task: Callable[[], Any]) -> Any:
        wait(needed)  # begun before this one, so it ends without it
        return task()

    if jobs == 1:  # in the caller's thread
        for number, (_, task) in enumerate(tasks):
            ended: Future[Any] = Future()
            try:
                ended.set_result(task())
            except (Enough, MatError) as error:
                ended.set_exception(error)
            yield number, ended
        return
    with ThreadPoolExecutor(jobs) as pool:
        for job, task in tasks:
            needed = [future for (other, _), future in zip(tasks, futures, strict=False)
                      if other.seed == job.seed and other.row in job.needs]
            futures.append(pool.submit(after, needed, task))
        numbers = {future: number for number, future in enumerate(futures)}
        try:
            for future in as_completed(futures):
                yield numbers[future], future
        finally:  # where the caller fails, what has not begun never does
            pool.shutdown(wait=False, cancel_futures=True)
