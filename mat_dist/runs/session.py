"""A run from opening to its end: the folder, the lock, the log of each rank, and `exit.json`."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from mat_dist.cli import LOGGED
from mat_dist.config import (
    config_differences,
    dump_config,
    load_config,
    other_plugins,
    resume_conflicts,
    trains_longer,
    with_absolute_paths,
)
from mat_dist.config.schema import Config
from mat_dist.distributed.agreement import Agreement, told_by_rank
from mat_dist.distributed.groups import Mesh, device_name
from mat_dist.distributed.launch import Launch
from mat_dist.errors import (
    FINAL_CODES,
    CheckpointError,
    ConfigError,
    MatError,
    OutputError,
    PeerSilent,
    StopRequested,
    some,
    told_error,
)
from mat_dist.runs.files import reported, write_text
from mat_dist.runs.folder import RunFolder, create_or_open
from mat_dist.runs.lock import RunLock
from mat_dist.runs.record import finished, job_of, next_attempt, read_exit, write_environment, write_exit
from mat_dist.screens import loss

T = TypeVar("T")
BEAT_SECONDS = 30  # a lock is stale after 120 s
MAX_FAILURES = 3  # writes in a row that a disk may refuse before the run stops


@dataclass
class Run:
    """An open run on one rank."""

    folder: RunFolder
    attempt: int
    log: logging.Logger
    notes: list[str]
    mesh: Mesh
    plugins: dict[str, str] = field(default_factory=dict)  # SHA-256 by path
    lock: RunLock | None = None  # of the rank that holds it
    continues: bool = True  # whether the folder had the settings of an earlier attempt
    refusals: int = 0  # writes in a row that the disk has refused

    def together(self, what: str, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """The result of local work; if it fails on any rank, all ranks raise that error."""
        agree = Agreement(self.mesh, what)
        result = agree.run(what, work, *args, **kwargs)
        agree.sync(what)
        return result

    def check_owner(self) -> None:
        """Raises OutputError where the folder is no longer ours; ask before each write into it. Only the rank that
        holds the lock can tell: a network file system may show others what was there before."""
        if self.lock is not None:
            self.lock.check()

    def outlives(self, agree: Agreement, point: str, lost: str, note: Callable[[str], None],
                 undo: Callable[[], None] = lambda: None) -> bool:
        """Meet all ranks -> False where the disk refused what was to be written, which is survived with a note (of what
        is `lost`) up to MAX_FAILURES times in a row. Raises what else a rank met, and where the lock is lost; `undo`
        removes what was written in part."""
        try:
            agree.sync(point)
        except OutputError as error:
            self.together("run folder", self.check_owner)
            undo()
            self.refusals += 1
            if self.refusals >= MAX_FAILURES:
                raise
            note(f"warning: {lost}: {error}; the run goes on, try {self.refusals} of {MAX_FAILURES}")
            return False
        return True


@contextmanager
def open_run(config: Config, mesh: Mesh, launch: Launch, *, config_name: str, argv: Sequence[str],
             plugins: dict[str, str]) -> Iterator[Run]:
    """Open or continue the run's folder; record how it ended.

    Rank 0 creates, locks and writes; the others learn the path. Raises, on all ranks with one text: ConfigError,
    OutputError, or CheckpointError when the folder holds a run with other settings.
    """
    agree = Agreement(mesh, "opening the run")
    _same_everywhere(mesh, config, plugins)
    lead = mesh.placement.is_lead
    lock, told = (agree.run("run folder", _open_folder, config, launch, config_name) if lead else None) or (None, None)
    agree.sync("run folder")
    with contextlib.ExitStack() as stack:
        if lock is not None:
            stack.enter_context(_held(lock))
        told = mesh.from_lead(told)
        folder, attempt = RunFolder(Path(told["path"])), told["attempt"]
        log = agree.run("log", rank_logger, folder.path, mesh.placement.rank)
        agree.sync("log")
        stack.callback(close_logger, log)
        stack.callback(_note_lost_screen, log)
        names = mesh.gather_json(device_name(mesh.device))
        if lead:
            agree.run("environment", write_environment, folder, attempt=attempt, argv=argv, devices=names,
                      seed=config.run.seed, placement={"peers": mesh.placement.peers, "ranks": mesh.placement.world,
                                                       "plugins": plugins}, job_id=launch.job_id)
            agree.run("config", _record_config, folder, config, attempt)
        agree.sync("environment")
        log.info("attempt %d, %s, device %s", attempt, mesh.placement.describe(), device_name(mesh.device))
        run = Run(folder, attempt, log, told["notes"], mesh, plugins, lock, told["continues"])
        try:
            yield run
            mesh.leave()
            if lead:
                run.check_owner()
                write_exit(folder, attempt, None, "done")
        except BaseException as error:
            mesh.leave()
            known = _tell_others(error, mesh)
            _record_failure(known, run, launch)
            raise known from known.__cause__


def _note_lost_screen(log: logging.Logger) -> None:
    if (lost := loss()) is not None:
        log.warning("the screen did not show all lines: %s", lost)


def _record_failure(error: BaseException, run: Run, launch: Launch) -> None:
    """Traceback into this rank's log; how the run ended into `exit.json`, by the lowest rank that is still sound."""
    run.log.error("%s", "".join(traceback.format_exception(error)))
    error.add_note(LOGGED)
    if launch.speaks_for(getattr(error, "guilty", ())):
        state = "stopped" if isinstance(error, (StopRequested, KeyboardInterrupt)) else "failed"
        with contextlib.suppress(OutputError):  # the disk may be what failed, or the run another's; the first counts
            run.check_owner()
            write_exit(run.folder, run.attempt, error, state)


def _tell_others(error: BaseException, mesh: Mesh) -> BaseException:
    """Publish the error, which the other ranks may not know -> the one that all ranks leave with.

    Where all have raised it together, nobody reads it.
    """
    if mesh.beat is None and not isinstance(error, SystemExit):
        return error
    if isinstance(error, Exception):
        told = told_by_rank(error, mesh, mesh.where)
    else:  # sys.exit in somebody's code
        rank = mesh.placement.rank
        told = {"code": PeerSilent.code, "where": mesh.where, "how": f"see the traceback in rank_{rank}.log",
                "what": f"rank {rank} (peer {mesh.placement.peers_of(rank)}) left: {type(error).__name__}: {error}"}
    with contextlib.suppress(RuntimeError):  # the store is gone
        if mesh.beat is not None:
            mesh.beat.report(told)
    if isinstance(error, MatError):
        return error
    known = told_error(told)
    known.__cause__ = error
    return known


def _same_everywhere(mesh: Mesh, config: Config, plugins: dict[str, str]) -> None:
    """Raise ConfigError on all ranks when their settings or plug-ins differ, with the keys or files."""
    everyone = mesh.gather_json([json.loads(config.model_dump_json()), plugins])
    for rank, (settings, files) in enumerate(everyone):
        if lines := config_differences(everyone[0][0], settings):
            raise ConfigError(f"rank {rank} has other settings than rank 0: {'; '.join(lines[:5])}", "config",
                              "start all ranks with the same command line and files")
        if told := other_plugins(everyone[0][1], files):
            raise ConfigError(f"rank {rank} has other plug-ins than rank 0: {told}", "--plugin",
                              "start all ranks with the same plug-ins, from one folder that all nodes share")


def _open_folder(config: Config, launch: Launch, config_name: str) -> tuple[RunLock, dict[str, Any]]:
    """Rank 0: find or make the folder, take the lock, count the attempt -> the lock, and what the others are told."""
    folder = create_or_open(config.run.root, config.run.name, config_name=config_name, resume=config.run.resume,
                            job_id=job_of(config, launch), now=datetime.now(UTC))
    lock = RunLock(folder, launch)
    note = lock.acquire()
    try:
        _check_restart(folder, launch)
        check_continues(folder, config)
        return lock, {"path": str(folder.path), "attempt": next_attempt(folder), "notes": [note] if note else [],
                      "continues": folder.config.exists()}
    except Exception:
        lock.release()
        raise


def _check_restart(folder: RunFolder, launch: Launch) -> None:
    """A torchrun restart leaves at once when the attempt before it ended for a reason that a restart cannot mend."""
    ended = read_exit(folder) if launch.restart > 0 else None
    last: dict[str, Any] = ended["attempts"][-1] if ended else {"attempt": 0, "code": 0}
    if last["code"] in FINAL_CODES and last["attempt"] == next_attempt(folder) - 1:  # not of an earlier launch
        raise told_error(last)


def check_continues(folder: RunFolder, config: Config) -> None:
    """Refuse a folder whose run is finished or has other settings; one in which nothing was trained binds nobody."""
    if not folder.config.exists() or not (folder.checkpoints.exists() or folder.metrics.exists()):
        return
    old = load_config(str(folder.config))
    if finished(folder) and not trains_longer(old, config):
        cut = "" if config.train.max_steps is None else " and train.max_steps"
        raise OutputError("the run is finished", str(folder.path),
                          f"choose another run.name, or raise train.epochs{cut} to go on")
    conflicts = resume_conflicts(old.model_dump(mode="json"), config)
    if conflicts:
        raise CheckpointError(f"the folder holds a run with other settings: {some(conflicts)}",
                              str(folder.path), "use the same settings, or choose another run.name")


def _record_config(folder: RunFolder, config: Config, attempt: int) -> None:
    """Write `config.yaml`; one with other values (a raised train.epochs) is kept beside it."""
    text = dump_config(with_absolute_paths(config))
    if folder.config.exists():
        old = folder.config.read_text()
        if old != text:
            write_text(folder.path / f"config_before_attempt_{attempt}.yaml", old)
    write_text(folder.config, text)


@contextmanager
def _held(lock: RunLock) -> Iterator[None]:
    """Keep the lock fresh from a thread, give it up at the end."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OutputError):  # reported by the next write into the folder
                lock.beat()

    thread = threading.Thread(target=beat, name="lock-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OutputError):
            lock.release()


class _QuietFileHandler(logging.FileHandler):
    """A full disk is reported once, by the writer of metrics or checkpoints, not by every log line of every rank."""

    def handleError(self, record: logging.LogRecord) -> None:
        return None


def rank_logger(folder: Path | str, rank: int) -> logging.Logger:
    """A logger that appends to `<folder>/rank_<rank>.log` from level INFO and to nothing else, in UTC.

    It is not registered with the `logging` module, so it has no parent, leaves the application's own logging alone,
    and two runs in one process do not share handlers. Raises OutputError.
    """
    path = RunFolder(Path(folder)).rank_log(rank)
    with reported(path):
        handler = _QuietFileHandler(path, mode="a", encoding="utf-8")
    form = logging.Formatter(f"%(asctime)s.%(msecs)03dZ [rank {rank}] %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    form.converter = time.gmtime
    handler.setFormatter(form)
    logger = logging.Logger(f"mat_dist.rank_{rank}", level=logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    return logger


def close_logger(logger: logging.Logger) -> None:
    """Close the files of `logger`."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
