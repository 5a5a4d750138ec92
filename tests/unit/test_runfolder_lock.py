"""The lock of a run folder: one holder, dead holders replaced by exactly one successor."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mat_dist.distributed.launch import Launch
from mat_dist.distributed.processes import process_start
from mat_dist.errors import OutputError
from mat_dist.runs import lock
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.lock import GUARD, STALE_SECONDS, RunLock

RACE = """
import os, sys
from pathlib import Path
import filelock  # here, not in each child
from mat_dist.errors import OutputError
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.lock import RunLock

def child(folder):
    try:
        answer = f"won {RunLock(RunFolder(folder), None).acquire()}"
    except OutputError as error:
        answer = f"lost {error}"
    return f"{answer}\\n".encode()

count = int(sys.argv[1])
for folder in sys.argv[2:]:
    go_out, go_in = os.pipe()
    end_out, end_in = os.pipe()
    answers_out, answers_in = os.pipe()
    for _ in range(count):
        if os.fork() == 0:
            os.close(go_in), os.close(end_in)
            os.read(go_out, 1)   # returns in all children at once when the parent closes its end
            os.write(answers_in, child(Path(folder)))
            os.read(end_out, 1)  # live until all have answered
            os._exit(0)
    os.close(go_in)
    lines = os.fdopen(answers_out)
    for _ in range(count):
        print(lines.readline(), end="", flush=True)  # else the next children have it in their buffers
    os.close(end_in)
    for _ in range(count):
        os.wait()
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def visible(folder: RunFolder) -> list[str]:
    """Names in the folder but that of the guard, which stays."""
    return sorted(set(os.listdir(folder.path)) - {GUARD})


def race(folders: Sequence[RunFolder], count: int) -> Iterator[tuple[RunFolder, list[str]]]:
    """In one folder after another: answers of `count` processes that all ask for the lock at once and live until all
    have answered."""
    done = subprocess.run([sys.executable, "-c", RACE, str(count), *(str(folder.path) for folder in folders)],
                          stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], check=True, timeout=60)
    answers = done.stdout.splitlines()
    assert len(answers) == count * len(folders)
    return ((folder, answers[count * n:count * (n + 1)]) for n, folder in enumerate(folders))


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    return child.pid


def plant(folder: RunFolder, age: float = 0.0, launch: Launch | None = None, **changes) -> lock.Holder:
    """Write a lock file as if this process, with `changes`, held it since `age` seconds."""
    holder = replace(RunLock(folder, launch).holder, **changes)
    file = folder.lock
    file.write_text(json.dumps(asdict(holder)))
    os.utime(file, (time.time() - age,) * 2)
    return holder


@pytest.fixture
def folders(tmp_path: Path) -> list[RunFolder]:
    """Three, since a race may go well by chance."""
    found = [RunFolder(tmp_path / name) for name in "abc"]
    for one in found:
        one.path.mkdir()
    return found


def test_twenty_launches_at_once_have_exactly_one_winner(folders):
    for folder, answers in race(folders, 20):
        assert answers.count("won None") == 1
        losers = [answer for answer in answers if answer.startswith("lost")]
        pid = json.loads(folder.lock.read_text())["pid"]
        assert len(losers) == 19
        assert all(f"in use by pid {pid} on " in answer and " since 20" in answer for answer in losers)
        assert visible(folder) == ["lock"]


def test_twenty_takeovers_of_a_dead_lock_have_exactly_one_winner(folders):
    for folder in folders:
        plant(folder, pid=dead_pid())
    for folder, answers in race(folders, 20):
        assert sum(answer.startswith("won took the lock over from pid") for answer in answers) == 1
        assert sum(answer.startswith("lost") for answer in answers) == 19
        assert visible(folder) == ["lock"]
        assert RunLock(folder, None).acquire().endswith("that process is gone")  # the winner has ended meanwhile


def test_a_live_holder_is_left_alone_however_old_its_heartbeat(folder):
    plant(folder, age=10 * STALE_SECONDS)
    before = folder.lock.read_bytes()
    with pytest.raises(OutputError, match=rf"pid {os.getpid()} on .* since .*choose another run.name"):
        RunLock(folder, None).acquire()
    assert folder.lock.read_bytes() == before


@pytest.mark.parametrize("changes", [{"started": 1}, {"pid": 2**22 + 1}])
def test_reused_or_missing_pid_means_dead(folder, changes):
    plant(folder, **changes)
    assert "that process is gone" in RunLock(folder, None).acquire()


def test_a_zombie_is_dead(folder):
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    plant(folder, pid=child.pid, started=process_start(child.pid)[1])
    assert "that process is gone" in RunLock(folder, None).acquire()
    child.wait()


@pytest.mark.parametrize("elsewhere", [{"host": "other"}, {"boot_id": "other"}, {"pid_namespace": "other"}])
def test_on_another_machine_only_the_heartbeat_counts(folder, elsewhere):
    plant(folder, age=STALE_SECONDS - 30, **elsewhere)
    with pytest.raises(OutputError, match="in use"):
        RunLock(folder, None).acquire()
    plant(folder, age=STALE_SECONDS + 30, **elsewhere)
    assert "no heartbeat" in RunLock(folder, None).acquire()


ELSEWHERE = [{"host": "other"}, {"boot_id": "other"}, {"pid_namespace": "other"}]


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_a_task_of_the_same_start_of_a_job_is_another_writer(folder, elsewhere):
    for theirs, mine in ((Launch(job_id="7"), Launch(job_id="7")),
                         (Launch(job_id="7", requeue=2), Launch(job_id="7", requeue=2)),
                         (Launch(job_id="7"), Launch(job_id="8", requeue=1)),
                         (Launch(), Launch(requeue=1)),
                         # The ranks of one torchrun were started again, those of the other one live.
                         (Launch(job_id="7", run_id="a"), Launch(job_id="7", run_id="b", restart=1)),
                         (Launch(job_id="7", run_id="none"), Launch(job_id="7", run_id="none", restart=1))):
        plant(folder, launch=theirs, **elsewhere)
        before = folder.lock.read_bytes()
        with pytest.raises(OutputError, match=r"in use by pid .* wait until it ends.* 120 s after its last sign"):
            RunLock(folder, mine).acquire()
        assert folder.lock.read_bytes() == before


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_a_later_start_of_the_same_job_takes_over_at_once_and_one_task_of_it_only(folder, elsewhere):
    for theirs, mine in ((Launch(job_id="7"), Launch(job_id="7", requeue=1)),
                         (Launch(job_id="7", requeue=1, run_id="a", restart=3), Launch(job_id="7", requeue=2)),
                         (Launch(job_id="7", run_id="a"), Launch(job_id="7", run_id="a", restart=1))):
        plant(folder, launch=theirs, **elsewhere)
        assert "earlier start of the same job" in RunLock(folder, mine).acquire()
        plant(folder, launch=mine, **elsewhere)
        with pytest.raises(OutputError, match="tasks of one job share a run only as ranks of one torchrun"):
            RunLock(folder, mine).acquire()


def test_the_environment_tells_which_start_of_a_job_this_is(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    first = Launch.from_environment()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert (first.requeue, Launch.from_environment().requeue) == (0, 1)


def test_a_live_process_here_keeps_its_lock_from_every_start_of_its_job(folder):
    plant(folder, launch=Launch(job_id="7"))
    with pytest.raises(OutputError, match="of job 7"):
        RunLock(folder, Launch(job_id="7", requeue=1)).acquire()


def test_a_lock_of_an_earlier_version_is_read(folder):
    document = asdict(RunLock(folder, Launch(job_id="7")).holder)
    for key in ("requeue", "run_id", "restart"):
        del document[key]
    folder.lock.write_text(json.dumps({**document, "host": "other"}))
    with pytest.raises(OutputError, match="in use by pid"):
        RunLock(folder, Launch(job_id="7")).acquire()
    assert "same job" in RunLock(folder, Launch(job_id="7", requeue=1)).acquire()


def test_a_pipe_in_place_of_the_lock_does_not_stop_the_reader(folder):
    os.mkfifo(folder.lock)
    with pytest.raises(OutputError, match="no file, but a pipe"):
        RunLock(folder, None).held_by()


@pytest.mark.parametrize("text", [b"", b"{}", b"null", b"\xff", b'{"pid": 1}'])
def test_unreadable_lock_is_held_while_fresh(folder, text):
    folder.lock.write_bytes(text)
    with pytest.raises(OutputError, match="unreadable lock"):
        RunLock(folder, None).acquire()
    os.utime(folder.lock, (1, 1))
    assert "no heartbeat" in RunLock(folder, None).acquire()


def test_heartbeat_refreshes_and_notices_a_takeover(folder):
    mine = RunLock(folder, None)
    mine.acquire()
    os.utime(folder.lock, (1, 1))
    mine.beat()
    assert time.time() - folder.lock.stat().st_mtime < 60
    plant(folder, host="other")
    with pytest.raises(OutputError, match=r"on other .* has taken the lock over"):
        mine.beat()
    mine.release()
    assert folder.lock.exists()  # not ours any more
    folder.lock.unlink()
    with pytest.raises(OutputError, match="removed"):
        mine.beat()


def test_release_frees_the_lock(folder):
    with RunLock(folder, None):
        assert folder.lock.exists()
    assert visible(folder) == []
    RunLock(folder, None).acquire()


def test_one_that_saw_a_dead_holder_waits_for_another_that_takes_its_place(folder):
    plant(folder, pid=dead_pid())
    winner, late = RunLock(folder, None), RunLock(folder, None)
    answers = []

    def ask() -> None:
        try:
            late.acquire()
        except OutputError as error:
            answers.append(str(error))
    with winner._guarded():
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        plant(folder)
    thread.join()
    assert len(answers) == 1 and f"in use by pid {os.getpid()}" in answers[0]


def test_one_that_waits_too_long_says_so(folder, monkeypatch):
    monkeypatch.setattr(lock, "GUARD_SECONDS", 0.1)
    with RunLock(folder, None)._guarded(), pytest.raises(OutputError, match=r"taking the lock for .*once only"):
        RunLock(folder, None).acquire()


def test_the_holder_can_ask_before_each_write(folder):
    mine = RunLock(folder, None)
    mine.acquire()
    mine.check()
    before = folder.lock.stat().st_mtime_ns
    mine.check()
    assert folder.lock.stat().st_mtime_ns == before
    plant(folder, host="other")
    with pytest.raises(OutputError, match="has taken the lock over"):
        mine.check()


OPERATIONS = ("open", "write", "fsync", "unlink", "replace", "utime", "stat")
VICTIM = """
import os, signal, sys
from pathlib import Path
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.lock import RunLock
import filelock

def at(number, folder):
    count = 0
    def counted(real):
        def operation(*args, **kwargs):
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return real(*args, **kwargs)
        return operation
    lock = RunLock(RunFolder(folder), None)
    for name in sys.argv[2:]:
        setattr(os, name, counted(getattr(os, name)))
    lock.acquire()
    os._exit(0)

number, status = 0, 9
while status:
    folder = Path(sys.argv[1]) / str(number)
    pid = os.fork()
    if pid == 0:
        at(number, folder)
    status = os.waitpid(pid, 0)[1]
    number += 1
print(number)
"""


@pytest.mark.parametrize("stale", [False, True])
def test_a_lock_can_be_taken_after_a_kill_at_any_file_operation(tmp_path, stale):
    folders, gone = [RunFolder(tmp_path / str(number)) for number in range(100)], dead_pid()
    for folder in folders:
        folder.path.mkdir()
        if stale:
            plant(folder, pid=gone)
    done = subprocess.run([sys.executable, "-c", VICTIM, str(tmp_path), *OPERATIONS], stdout=subprocess.PIPE, text=True,
                          cwd=Path(__file__).parents[2], check=True, timeout=60)
    count = int(done.stdout)
    assert 8 <= count < 100
    for folder in folders[:count]:
        mine = RunLock(folder, None)
        mine.acquire()
        mine.beat()
        assert (folder.path / "lock").exists()


def test_file_systems_without_kernel_locks_work(folder, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", refuse)
    mine = RunLock(folder, None)
    assert mine.acquire() is None
    with pytest.raises(OutputError, match="in use"):
        RunLock(folder, None).acquire()
    mine.beat()
    mine.release()
    plant(folder, pid=dead_pid())
    assert "gone" in mine.acquire()
    assert visible(folder) == ["lock"]


def test_unwritable_folder_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="gone"):
        RunLock(RunFolder(tmp_path / "missing"), None).acquire()


def test_leftovers_of_killed_processes_are_swept(folder):
    for name in (".lock.abc.tmp", ".exit.json.12.tmp"):
        (folder.path / name).write_text("")
        os.utime(folder.path / name, (1, 1))
    (folder.path / ".exit.json.13.tmp").write_text("")
    RunLock(folder, None).acquire()
    assert visible(folder) == [".exit.json.13.tmp", "lock"]
