"""What torchrun's own process does for ranks of mat_dist: it passes every signal on and keeps its store until they have
left, and it ends with their line, as the last one, and with their exit code.

torchrun by itself ends at a signal that it does not know, leaves its ranks behind at the third signal, kills them 30 s
after the first, returns 1 for every failure, and buries the reason below 40 lines. `torchrun_plugin` calls `attend` in
each torchrun that starts a module of mat_dist, before it reads its command line. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn

from mat_dist.distributed.processes import children, known_error, memory_kills
from mat_dist.distributed.stopping import AGAIN, SAME_REQUEST, SIGNALS, signal_name
from mat_dist.errors import EnvironmentFault, MatError, PeerSilent, StopRequested, error_line

TOLD = "MAT_DIST_TOLD"  # the file in which ranks tell torchrun's process how they ended: no file of the disk
PATIENCE = 30.0  # seconds after the second request; another one then kills the ranks
STUCK = 5.0  # seconds for which torchrun may stay when its ranks have told their end and left
LOOPBACK = "127.0.0.1"


def tell_agent(code: int, lines: Sequence[str]) -> bool:
    """In a rank: leave lines for the end of torchrun's process -> whether it lives and will print them."""
    path = os.environ.get(TOLD, "")
    if not path.startswith(f"/proc/{os.getppid()}/"):
        return False
    with suppress(OSError):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(handle, json.dumps([code, list(lines)]).encode() + b"\n")
        os.close(handle)
        return True
    return False


def attend(words: Sequence[str]) -> None:
    """In torchrun's process with these words: hear signals, and replace torchrun's report at the end by ours."""
    if not any(re.fullmatch(r"mat_dist(\.\w+)*|mat-dist[-\w]*", word) for word in words) or TOLD in os.environ:
        return
    if threading.current_thread() is not threading.main_thread():
        return
    Agent(os.memfd_create("mat_dist"))
    one_node = not any(re.match(r"--?(nnodes|local[-_]addr|rdzv[-_]endpoint)\b", word) for word in words)
    if one_node:  # else torchrun asks the network for its own name, for minutes where that has no address
        os.environ.setdefault("PET_LOCAL_ADDR", LOOPBACK)
    # The signals that torchrun shall handle itself; it needs one, and takes what would end it in the middle of a save.
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGURG")


class Agent:
    """torchrun's process. `told`: an open file for what the ranks tell."""

    def __init__(self, told: int) -> None:
        self._told, self._memory_kills = told, memory_kills()
        self._requests: list[float] = []
        self._latest, self._alone, self._ending = 0.0, 0.0, False
        self._report = sys.excepthook
        sys.excepthook = self.end
        os.environ[TOLD] = f"/proc/{os.getpid()}/fd/{told}"
        if "LOGLEVEL" not in os.environ:
            logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
        # A thread hears signals also while the process waits in C++, where Python's handlers cannot run.
        heard, wake = socket.socketpair()
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.detach(), warn_on_full_buffer=False)
        for number in set(SIGNALS) - {signal.SIGURG}:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True).start()

    def _listen(self, heard: socket.socket) -> None:
        heard.settimeout(1.0)
        while True:
            try:
                number = heard.recv(1)[0]
            except TimeoutError:
                self._see_to_the_end()
            else:
                if number in SIGNALS:
                    self._pass_on(number, time.monotonic())

    def _pass_on(self, number: int, now: float) -> None:
        """A signal to all ranks; where there are none yet, it ends torchrun."""
        if now - self._latest > SAME_REQUEST:
            self._requests.append(now)
        self._latest = now
        kills = len(self._requests) > 2 and now - self._requests[1] > PATIENCE
        ranks = children()
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL if kills else number)
        if not ranks and now == self._requests[0] and self._told_by_ranks() is None:
            error = StopRequested(f"stopped by {signal_name(number)} before there were ranks", "torchrun", AGAIN)
            self._leave(error.code, [error_line(error)])

    def _see_to_the_end(self) -> None:
        """torchrun waits for minutes in C++ where a cable was cut: when its ranks have told their end, it has come."""
        told, now = self._told_by_ranks(), time.monotonic()
        if told is None or self._ending or children():
            self._alone = 0.0
        elif not self._alone:
            self._alone = now
        elif now - self._alone >= STUCK:
            self._leave(*told)

    @staticmethod
    def _leave(code: int, lines: Sequence[str]) -> NoReturn:
        with suppress(OSError):
            os.write(2, "".join(f"{line}\n" for line in lines).encode())
        os._exit(code)

    def end(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """In place of sys.excepthook: one line, and the exit code of the ranks."""
        self._ending = True
        code, lines = self._told_by_ranks() or self._known(error)
        if not lines:
            return self._report(kind, error, trace)
        for number in SIGNALS:  # what comes now is too late
            signal.signal(number, signal.SIG_IGN)
        print(*lines, sep="\n", file=sys.stderr)
        raise SystemExit(code)

    def _told_by_ranks(self) -> tuple[int, list[str]] | None:
        """What the first rank told that left by itself; the others may have been asked to."""
        told = [json.loads(line) for line in os.pread(self._told, 1 << 20, 0).decode().splitlines()]
        code, lines = min(told, key=lambda one: one[0] == StopRequested.code, default=(0, []))
        return (code, lines) if lines else None

    def _known(self, error: BaseException) -> tuple[int, list[str]]:
        """What ended torchrun, where no rank has told why; no lines for what only its own report can explain."""
        known = known_error(error)
        name, text = type(error).__name__, (str(error).splitlines() or [""])[0]
        if name == "ChildFailedError":
            known = self._ended_by_signal(error)
        elif known is None and re.fullmatch(r"Dist\w*Error|Rendezvous\w*Error|SignalException", name):
            known = EnvironmentFault(f"torchrun cannot start the ranks: {text}", "torchrun's address and port",
                                     "on one node use torchrun --standalone; on several check --rdzv-endpoint, or "
                                     "--master-addr and --master-port; python -m mat_dist.check helps")
        return (known.code, [error_line(known)]) if known is not None else (1, [])

    def _ended_by_signal(self, error: Any) -> MatError | None:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return None
        why = ", and the kernel's memory killer has ended a process of this job or machine" \
            if memory_kills() > self._memory_kills else ""
        return PeerSilent(f"rank {rank} was ended by {signal_name(-failure.exitcode)}{why}", f"pid {failure.pid}",
                          "start again to continue from the newest checkpoint; see its rank_<r>.log")
