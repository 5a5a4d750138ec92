"""Processes of a fault case: ranks that the runner forks, or a real torchrun. Nothing outlives its case.

The runner imports torch once and forks: a rank starts in milliseconds instead of five seconds. Forked ranks get
the environment that torchrun would give them, and a store in a process of its own, as torchrun's agent keeps one.
With `torchrun`, the launcher is torch.distributed.run itself in a forked process; its workers are started by it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

POLL = 0.02  # seconds between looks at the processes of a case
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: who loses its parent becomes our child, so that none is overlooked
_STORE = "store"


def adopt_orphans() -> None:
    """Make this process the parent of whoever below it loses its own."""
    if ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def children(pid: int) -> list[int]:
    """Direct children of a process, of all its threads; zombies too."""
    found: list[int] = []
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def descendants(pid: int) -> set[int]:
    """All processes below one."""
    found: set[int] = set()
    fresh = [pid]
    while fresh:
        fresh = [child for parent in fresh for child in children(parent) if child not in found]
        found.update(fresh)
    return found


def is_zombie(pid: int) -> bool:
    """Whether a process has ended and only waits for its parent to notice; also True where there is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


def fork(body: Callable[[], int], out: Path, env: dict[str, str] | None = None) -> int:
    """Run `body` in a new process and session, its output appended to `out` -> its pid."""
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        for number in (1, 2):
            os.dup2(handle, number)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.environ.update(env or {})
        code = body()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class Group:
    """The processes of one launch, by label: "rank 0", "launcher", ..."""

    def __init__(self, kind: str, out: Path) -> None:
        self.kind, self.out = kind, out
        self.pids: dict[str, int] = {}
        self.codes: dict[str, int] = {}
        self.ended: dict[str, float] = {}
        self._seen: set[int] = set()

    def start(self, label: str, body: Callable[[], int], env: dict[str, str] | None = None) -> None:
        """Fork a process of this group."""
        self.pids[label] = fork(body, self.out, env)

    def send(self, number: signal.Signals, *labels: str) -> float:
        """Send a signal to some processes (default: all but the store) -> the time just before."""
        now = time.monotonic()
        for label in labels or [label for label in self.pids if label != _STORE]:
            if label not in self.codes:
                with suppress(ProcessLookupError):
                    os.kill(self.pids[label], number)
        return now

    def alive(self) -> set[int]:
        """Processes of this group that still run: its own, what they started, and what was left behind."""
        self._reap()
        own = {pid for label, pid in self.pids.items() if label not in self.codes and label != _STORE}
        below = set().union(*(descendants(pid) for pid in own))
        self._seen |= own | below
        left = {pid for pid in self._seen - own - below if not is_zombie(pid)}
        return own | {pid for pid in below if not is_zombie(pid)} | left

    def wait(self, limit: float) -> float | None:
        """Wait until all have ended -> when that was (monotonic), None if they had not after `limit` seconds."""
        latest = time.monotonic() + limit
        while self.alive():
            if time.monotonic() > latest:
                return None
            time.sleep(POLL)
        now = time.monotonic()
        return now

    def close(self) -> list[int]:
        """End what still runs -> their pids (orphans, when the launch was thought to be over)."""
        left = sorted(self.alive())
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if _STORE in self.pids and _STORE not in self.codes:
            os.kill(self.pids[_STORE], signal.SIGKILL)
            os.waitpid(self.pids[_STORE], 0)
            self.codes[_STORE] = 0
        while self.alive():
            time.sleep(POLL)
        return left

    def _reap(self) -> None:
        now = time.monotonic()
        for label, pid in self.pids.items():
            if label not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[label], self.ended[label] = os.waitstatus_to_exitcode(status), now
        for pid in set(children(os.getpid())) & self._seen - set(self.pids.values()):
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def fork_ranks(world: int, body: Callable[[int], int], out: Path, *, run_id: str, local: int | None = None) -> Group:
    """`world` ranks as torchrun would start them, without torchrun."""
    group = Group("process", out)
    port = _start_store(group, world)
    for rank in range(world):
        env = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": local or world,
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True,
               "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0, "TORCHELASTIC_RUN_ID": run_id}
        group.start(f"rank {rank}", lambda rank=rank: body(rank), {key: str(value) for key, value in env.items()})
    return group


def fork_one(body: Callable[[], int], out: Path, env: dict[str, str] | None = None) -> Group:
    """One process, started without a launcher."""
    group = Group("process", out)
    group.start("rank 0", body, env)
    return group


def start_torchrun(world: int, words: Sequence[str], out: Path, *, restarts: int = 0,
                   env: dict[str, str] | None = None) -> Group:
    """torchrun --standalone with `world` workers; `words` is the module and its arguments."""
    def launcher() -> int:
        from torch.distributed.run import main

        main(["--standalone", f"--nproc_per_node={world}", f"--max-restarts={restarts}", "-m", *words])
        return 0

    group = Group("torchrun", out)
    group.start("launcher", launcher, env)
    return group


def start_program(command: Sequence[str], out: Path, env: dict[str, str] | None = None) -> Group:
    """Another program in place of Python."""
    def replace() -> int:
        os.execvp(command[0], list(command))

    group = Group("process", out)
    group.start("rank 0", replace, env)
    return group


def _start_store(group: Group, world: int) -> int:
    """The rendezvous store, in a process of its own -> its port."""
    told, tell = os.pipe()

    def serve() -> int:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
        os.write(tell, b"%d\n" % store.port)
        signal.pause()
        return 0

    group.start(_STORE, serve)
    os.close(tell)
    with os.fdopen(told) as answer:
        return int(answer.readline())
