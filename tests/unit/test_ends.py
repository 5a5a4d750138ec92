"""How ranks wait, are asked to stop, and end: without torchrun, and with what its process does for them."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import mat_dist
from mat_dist import cli
from mat_dist.distributed import leaving, processes
from mat_dist.distributed.groups import Mesh, open_mesh
from mat_dist.distributed.launch import LAUNCHER_DIED, Launch
from mat_dist.distributed.placement import Placement
from mat_dist.distributed.rendezvous import Rendezvous
from mat_dist.distributed.stopping import SIGNALS, StopFlag, signal_name, watching
from mat_dist.distributed.waiting import Wait
from mat_dist.errors import EnvironmentFault, MatError, PeerFailed, StopRequested
from mat_dist.tools.check.machine import free_port

ROOT = Path(__file__).parents[2]

# ------------------------------------------------------------------ signals


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """After a request to stop a process stays deaf until it ends; this one goes on."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def clock(monkeypatch: pytest.MonkeyPatch, module: object = time) -> Callable[[float], None]:
    """A clock that only goes on when it is told to."""
    now = [100.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])

    def go_on(seconds: float) -> None:
        now[0] += seconds

    return go_on


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "XCPU", "VTALRM", "PROF", "URG", "IO",
                                  "PWR", "RTMIN"])
def test_every_signal_that_a_scheduler_may_send_is_a_request_to_stop(name):
    with watching() as stop:
        os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        assert stop.reason == f"stopped by {signal_name(getattr(signal, f'SIG{name}'))}"


def test_signals_of_others_an_ignored_hang_up_and_former_handlers_stay():
    def other(number: int, frame: object) -> None: ...

    signal.signal(signal.SIGUSR2, other)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with watching() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGUSR2) is other and not stop.requested
        assert signal.getsignal(signal.SIGINT) == stop.take
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_signal_after_the_last_word_does_not_change_how_a_run_ends():
    with watching() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    os.kill(os.getpid(), signal.SIGTERM)
    with watching() as again:  # and a later run hears it anew
        os.kill(os.getpid(), signal.SIGTERM)
        assert again.requested


def test_twenty_signals_in_a_row_are_one_request_and_a_later_one_stops_at_once(monkeypatch):
    go_on, stop = clock(monkeypatch), StopFlag()
    for _ in range(20):
        stop.take(signal.SIGTERM, None)
        go_on(0.9)
    go_on(0.2)
    with pytest.raises(StopRequested, match="stopped at once by a second SIGTERM"):
        stop.take(signal.SIGTERM, None)
    stop.leaving = True  # the run ends anyway: nothing may disturb its last words
    go_on(10)
    stop.take(signal.SIGTERM, None)


def test_three_times_ctrl_c_within_a_second_stops_at_once(monkeypatch):
    clock(monkeypatch)
    stop = StopFlag()
    stop.take(signal.SIGINT, None)
    stop.take(signal.SIGINT, None)
    with pytest.raises(StopRequested):
        stop.take(signal.SIGINT, None)


def test_a_rank_is_told_by_the_kernel_that_its_launcher_has_died():
    body = ("import os, signal, sys, time\nfrom mat_dist.distributed.launch import Launch\n"
            "from mat_dist.distributed.stopping import watching\n"
            "if os.fork():\n    sys.stdin.read(1); os._exit(0)\n"
            "with watching() as stop:\n    Launch.from_environment().follow_launcher()\n"
            "    print('ready', flush=True)\n"
            "    while not stop.requested: time.sleep(0.01)\n    print(stop.reason, flush=True)\n")
    with subprocess.Popen([sys.executable, "-c", body], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True, env={**os.environ, "TORCHELASTIC_RUN_ID": "none"}) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        parent.kill()
        assert "launcher" in parent.stdout.readline()
    assert LAUNCHER_DIED in SIGNALS


# ------------------------------------------------------------------ waits


def test_time_in_which_the_process_was_stopped_does_not_count(monkeypatch):
    go_on = clock(monkeypatch)
    wait = Wait(10)
    go_on(3600)  # the job was suspended
    assert not wait.over()
    for _ in range(20):
        go_on(0.5)
        over = wait.over()
    assert over


def test_an_exchange_survives_a_suspended_job_but_not_a_silent_rank(monkeypatch):
    class Work:
        """An exchange that never ends; each look at it takes `lap` s."""

        lap, looks = 3600.0, 3

        def wait(self, limit: object = None) -> bool:
            go_on(self.lap)
            self.looks -= 1
            if self.looks == 0:
                return True
            raise RuntimeError("Operation timed out!")

        def is_completed(self) -> bool:
            return False

    go_on = clock(monkeypatch)
    mesh, work = Mesh(Placement.place(1, 1, 0), torch.device("cpu"), timeout=5), Work()
    mesh._await(work, torch.zeros(1))
    work.lap, work.looks = 0.5, 1000
    with pytest.raises(RuntimeError, match="no answer within 5 s"):
        mesh._await(work, torch.zeros(1))


def test_a_wait_speaks_after_15_seconds_and_then_less_and_less_often(monkeypatch, capsys):
    go_on = clock(monkeypatch)
    wait = Wait(100, lambda: "waiting for rank 1")
    told = []
    for second in range(1, 70):
        go_on(1)
        wait.over()
        if text := capsys.readouterr().err:
            told.append((second, text))
    assert [second for second, _ in told] == [15, 30, 60]
    assert told[0][1] == "mat_dist: waiting for rank 1 for 15 s, at most 100 s\n"


def test_a_wait_without_a_limit_names_none(monkeypatch, capsys):
    go_on = clock(monkeypatch)
    wait = Wait(float("inf"), lambda: "waiting for rank 1")
    for _ in range(16):
        go_on(1)
        wait.over()
    assert capsys.readouterr().err == "mat_dist: waiting for rank 1 for 15 s\n"


# ------------------------------------------------------------------ the first meeting


@pytest.fixture
def port() -> int:
    return free_port()


def meet(port: int, ranks: list[tuple[int, int]], timeout: float = 1.0, host: str = "127.0.0.1",
         stops: dict[int, StopFlag] | None = None) -> list[MatError | None]:
    """Threads that say they are these (rank, world) -> what each raised."""
    ended: list[MatError | None] = [None] * len(ranks)
    kept: list[Rendezvous] = []

    def one(place: int, rank: int, world: int) -> None:
        try:
            kept.append(Rendezvous(Launch(rank, world, rank, world, master=(host, port)), timeout,
                                   (stops or {}).get(rank, StopFlag())))
            kept[-1].wait_for_all()
        except MatError as error:
            ended[place] = error

    threads = [threading.Thread(target=one, args=(place, *who)) for place, who in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return ended


def test_ranks_that_are_all_there_meet(port):
    assert meet(port, [(0, 3), (1, 3), (2, 3)], 30) == [None] * 3


@pytest.mark.parametrize(("ranks", "what"), [
    ([(0, 3), (1, 3)], "rank 2 of 3 did not come within 1 s"),
    ([(0, 2), (1, 3)], "the ranks differ in their number: WORLD_SIZE=2, 3"),
    ([(0, 3), (1, 3), (1, 3)], "two processes say that they are rank 1")])
def test_ranks_that_cannot_meet_all_say_why(port, ranks, what):
    assert {error.what for error in meet(port, ranks) if error} == {what}


@pytest.mark.parametrize("world", [2, 512])
def test_looking_for_absent_ranks_is_as_many_requests_however_many_they_are(world, monkeypatch):
    class Store:
        """The others come at the 11th look."""

        here, requests = b"", 0

        def append(self, key: str, value: str) -> None:
            self.here += value.encode()

        def get(self, key: str) -> bytes:
            self.requests += 1
            if self.requests == 21:
                self.here += b"".join(b'[%d, %d, ""]\n' % (rank, world) for rank in range(1, world))
            return self.here

        def check(self, keys: list[str]) -> bool:
            self.requests += 1
            return False

        def add(self, key: str, amount: int) -> int:
            return amount

    store = Store()
    monkeypatch.setattr(Rendezvous, "client", lambda self, purpose: store)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    Rendezvous(Launch(0, world, 0, 1, master=("localhost", 1), agent_store=True), 5, StopFlag()).wait_for_all()
    assert store.requests == 21  # with those that ask why somebody left


def test_a_signal_to_one_rank_ends_the_wait_of_all(port):
    stop = StopFlag()
    threading.Timer(0.5, stop.pass_on, ["stopped by SIGUSR2"]).start()
    ended = meet(port, [(0, 3), (1, 3)], 60, stops={1: stop})
    assert [type(error) for error in ended] == [StopRequested] * 2
    assert all("stopped by SIGUSR2 while waiting for rank" in str(error) for error in ended)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_master_without_an_address_is_named(port, rank):
    (error,) = meet(port, [(rank, 2)], 0.3, "no.such.host.invalid")
    assert isinstance(error, EnvironmentFault) and "the name has no address" in error.what
    assert "MASTER_ADDR=no.such.host.invalid" in error.where


# ------------------------------------------------------------------ surroundings


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "PMI", "MASTER_", "TORCHELASTIC", "LOCAL_")) or name in (
                "RANK", "WORLD_SIZE", "ENVIRONMENT"):
            monkeypatch.delenv(name)
    return monkeypatch


MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("variables", "what"), [
    ({"RANK": "1"}, "RANK=1 without WORLD_SIZE"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"),
    ({"RANK": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 without MASTER_ADDR and MASTER_PORT"),
    ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "WORLD_SIZE=2 without MASTER_ADDR and MASTER_PORT"),
    ({**MASTER, "RANK": "5", "WORLD_SIZE": "2"}, "RANK=5 does not fit WORLD_SIZE=2"),
    ({**MASTER, "RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 does not fit WORLD_SIZE=2"),
    ({**MASTER, "RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 does not fit WORLD_SIZE=0"),
    ({**MASTER, "RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is not a number"),
    ({**MASTER, "RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number"),
    ({**MASTER, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "3"}, "LOCAL_RANK=3 does not fit LOCAL_WORLD_SIZE=2"),
    ({**MASTER, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4 does not fit WORLD_SIZE"),
    ({**MASTER, "RANK": "1", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 without LOCAL_RANK"),
    ({**MASTER, "RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999"}, "'99999' is no port")])
def test_surroundings_that_contradict_themselves_are_one_error(bare, variables, what):
    for name, value in variables.items():
        bare.setenv(name, value)
    with pytest.raises(EnvironmentFault, match=f"^{what}"):
        Launch.from_environment()


@pytest.mark.parametrize(("variables", "name"), [
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "2 SLURM tasks"),
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "ENVIRONMENT": "BATCH"}, "2 SLURM tasks"),
    ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "0"}, "3 SLURM tasks"),
    ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}, "4 Open MPI tasks"),
    ({"PMI_SIZE": "4", "PMI_RANK": "2"}, "4 MPI tasks"),
    ({"FLUX_JOB_SIZE": "3", "FLUX_TASK_RANK": "0"}, "3 Flux tasks"),
    ({"PALS_RANKID": "1"}, "task 1 of PALS"), ({"PMIX_RANK": "2"}, "task 2 of PMIx"), ({"PMIX_RANK": "0"}, None),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"}, None),  # the batch script itself
    ({"SLURM_NTASKS": "4"}, None),  # a shell of salloc
    ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "RANK": "0", "WORLD_SIZE": "1"}, None)])  # torchrun in each task
def test_tasks_that_nobody_made_ranks_of_do_not_train_side_by_side(bare, variables, name):
    from mat_dist.config.schema import CommConfig

    for key, value in variables.items():
        bare.setenv(key, value)
    opened = open_mesh(2, CommConfig(), torch.device("cpu"), Launch.from_environment(), stop=StopFlag())
    if name is None:
        with opened as mesh:
            assert mesh.placement.world == 1
    else:
        with pytest.raises(EnvironmentFault, match=f"{name}, but no torchrun"), opened:
            pass


@pytest.mark.parametrize(("error", "limits", "says"), [
    (OSError(errno.EMFILE, "Too many open files"), {}, "ulimit -n"),
    (RuntimeError("can't start new thread"), {}, "ulimit -u"),
    (MemoryError(), {resource.RLIMIT_AS: 2**30}, "1024 MiB of address space"),
    (ImportError("libc10.so: failed to map segment from shared object"), {resource.RLIMIT_AS: 2**30}, "ulimit -v"),
    (MemoryError(), {}, None), (RuntimeError("the cat sat on the cable"), {resource.RLIMIT_AS: 2**30}, None)])
def test_a_limit_of_the_shell_is_named(error, limits, says, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits.get(kind, resource.RLIM_INFINITY),) * 2)
    found = processes.known_error(error)
    assert (found is None) if says is None else (found is not None and says in str(found))


def test_the_kernels_counter_of_the_memory_killer_is_that_of_the_group_else_of_the_machine(monkeypatch):
    files = {"/proc/self/cgroup": "0::/job/step", "/proc/vmstat": "pgfault 7\noom_kill 12\n"}
    monkeypatch.setattr(processes, "read_system", lambda file: files.get(file, ""))
    assert processes.memory_kills() == 12
    files["/sys/fs/cgroup/job/step/memory.events"] = "oom 3\noom_kill 2\n"
    assert processes.memory_kills() == 2


# ------------------------------------------------------------------ torchrun's own process

AGENT = """
import os, signal, subprocess, sys, time
from mat_dist.distributed.agent import attend
attend(["--standalone", "-m", "mat_dist.train"])
{ranks}
print("ready", flush=True)
{body}
"""
RANKS = """
ranks = [subprocess.Popen([sys.executable, "-c", '''{rank}'''], start_new_session=True, stdout=subprocess.PIPE)
         for rank in range(2)]
for rank in ranks: rank.stdout.readline()
"""
RANK = """
import os, sys, time
from mat_dist.distributed.agent import tell_agent
from mat_dist.distributed.stopping import watching
agent = os.getppid()
with watching() as stop:
    print(1, flush=True)
    while not stop.requested and os.getppid() == agent: time.sleep(0.01)
    time.sleep(0.5)
    tell_agent(75, [f"mat_dist: {stop.reason}, saved"])
sys.exit(75)
"""
FAILED = "class ChildFailedError(Exception): ...\nraise ChildFailedError('40 lines of torchrun')"


@pytest.fixture
def agent() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A process that stands for torchrun: it attends to ranks, and then runs `body`."""
    started = []

    def start(body: str, rank: str = "") -> subprocess.Popen[str]:
        ranks = RANKS.format(rank=rank) if rank else ""
        started.append(subprocess.Popen([sys.executable, "-c", AGENT.format(ranks=ranks, body=body)], cwd=ROOT,
                                        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        assert started[-1].stdout.readline() == "ready\n", started[-1].communicate()[1]
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()


@pytest.mark.parametrize(("name", "times"), [("TERM", 20), ("USR1", 1), ("QUIT", 2)])
def test_torchrun_passes_signals_on_waits_for_its_ranks_and_ends_with_their_line_and_code(agent, name, times):
    one = agent("for rank in ranks: rank.wait()\n" + FAILED, RANK)
    for _ in range(times):
        one.send_signal(getattr(signal, f"SIG{name}"))
        time.sleep(0.02)
    _, told = one.communicate(timeout=60)
    assert one.returncode == 75
    assert told.splitlines()[-1] == f"mat_dist: stopped by SIG{name}, saved" and "40 lines" not in told


def test_torchrun_that_is_stuck_when_its_ranks_have_left_ends_with_their_line_and_code(agent):
    one = agent("import mat_dist.distributed.agent as a\na.STUCK = 0.5\nfor rank in ranks: rank.terminate()\n"
                "time.sleep(600)", RANK)
    _, told = one.communicate(timeout=60)
    assert one.returncode == 75 and told.splitlines()[-1] == "mat_dist: stopped by SIGTERM, saved"


def test_a_signal_before_there_are_ranks_ends_torchrun_with_a_line(agent):
    one = agent("time.sleep(60)")
    one.send_signal(signal.SIGUSR2)
    _, told = one.communicate(timeout=60)
    assert one.returncode == 75 and told.startswith("mat_dist: stopped by SIGUSR2 before there were ranks")


@pytest.mark.parametrize(("raised", "code", "last"), [
    ("raise type('ChildFailedError', (Exception,), {'get_first_failure': lambda s: (3, type('F', (), dict(exitcode=-9, "
     "pid=77)))})()", 14, "mat_dist: error: rank 3 was ended by SIGKILL"),
    ("raise type('DistNetworkError', (RuntimeError,), {})('port 29500 is in use\\nframe #1: C++')", 6,
     "mat_dist: error: torchrun cannot start the ranks: port 29500 is in use (torchrun's address"),
    ("raise OSError(24, 'Too many open files')", 6, "mat_dist: error: too many open files"),
    ("raise KeyError('a bug of somebody')", 1, "KeyError: 'a bug of somebody'")])
def test_what_ends_torchrun_itself_is_one_line_with_its_code(agent, raised, code, last):
    one = agent(raised)
    _, told = one.communicate(timeout=60)
    assert one.returncode == code and told.splitlines()[-1].startswith(last)
    assert ("Traceback" in told) == (code == 1)


def test_the_reason_of_the_rank_that_failed_is_told_not_that_of_ranks_that_were_stopped_for_it(agent):
    one = agent("import mat_dist.distributed.agent as a\nos.getppid = os.getpid\n"
                "a.tell_agent(75, ['mat_dist: stopped by SIGTERM'])\n"
                "a.tell_agent(6, ['mat_dist: error: no GPU'])\n" + FAILED)
    _, told = one.communicate(timeout=60)
    assert (one.returncode, told) == (6, "mat_dist: error: no GPU\n")


@pytest.mark.parametrize(("error", "code", "left"), [
    (KeyError("a bug"), 70, True), (PeerFailed("it broke", "step 3", "mend it"), 13, True),
    (KeyError("a bug"), 70, False)])
def test_what_torchrun_tries_again_is_not_told_to_its_process_as_the_end(bare, capsys, error, code, left):
    told: list[int] = []
    bare.setattr(cli, "tell_agent", lambda code, lines: told.append(code) or True)
    bare.setenv("TORCHELASTIC_RESTART_COUNT", "0" if left else "1")
    bare.setenv("TORCHELASTIC_MAX_RESTARTS", "1")

    def body() -> None:
        raise error

    assert cli.run_entry(body) == code
    assert told == ([] if left else [code])
    assert capsys.readouterr().err.startswith("mat_dist: error: ") == left


@pytest.mark.parametrize("body", [lambda: None, lambda: sys.exit(3)])
@pytest.mark.parametrize("aborting", ["blocks", "fails", "ends"])
def test_a_rank_tells_its_end_before_it_ends_its_groups_and_waits_for_nothing(bare, capsys, body, aborting):
    """Groups stand after an error, or where they could not be closed; an abort that blocks must not keep the rank."""
    blocked, seen = threading.Event(), []

    def abort() -> None:
        seen.append(capsys.readouterr().err)
        if aborting == "blocks":
            blocked.wait()
        if aborting == "fails":
            raise RuntimeError("NCCL error")

    def left(code: int) -> None:
        seen.append(code)
        raise StopIteration

    for key, value in {**MASTER, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        bare.setenv(key, value)
    bare.setattr(torch.distributed, "is_initialized", lambda: True)
    bare.setattr(torch.distributed.distributed_c10d, "_abort_process_group", abort)
    bare.setattr(leaving, "ABORT_SECONDS", 0.05)
    bare.setattr(os, "_exit", left)
    with pytest.raises(StopIteration):
        cli.run_entry(body)
    blocked.set()
    told, code = seen
    failed = code != 0
    assert code == (70 if failed else 0) and told.startswith("mat_dist: error: SystemExit: 3") == failed
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("world", ["1", "2"])
def test_a_program_that_trains_keeps_running_after_an_error_and_finds_no_groups_of_ours(bare, world):
    ended: list[int] = []
    for key, value in {**MASTER, "RANK": "0", "WORLD_SIZE": world, "LOCAL_RANK": "0"}.items():
        bare.setenv(key, value)
    bare.setattr(torch.distributed, "is_initialized", lambda: True)
    bare.setattr(torch.distributed.distributed_c10d, "_abort_process_group", lambda: ended.append(1))
    with pytest.raises(MatError):
        mat_dist.train(peers=0)
    assert len(ended) == int(world) - 1


def test_one_process_leaves_the_groups_of_somebody_else_alone(bare):
    bare.setattr(torch.distributed, "is_initialized", lambda: True)
    bare.setattr(os, "_exit", lambda code: pytest.fail("left"))
    assert cli.run_entry(lambda: sys.exit(3)) == 70


def test_other_programs_of_torchrun_are_left_alone():
    body = ("import os, sys\nfrom mat_dist.distributed.agent import attend\nattend(['--standalone', 'train.py'])\n"
            "assert 'MAT_DIST_TOLD' not in os.environ and sys.excepthook is sys.__excepthook__\n")
    subprocess.run([sys.executable, "-c", body], cwd=ROOT, check=True, timeout=60)
