"""The first meeting of the ranks: one store, and everybody there, before torch forms its groups.

torch waits for absent ranks in C++, where no signal is heard, for minutes and without a word. So this process looks for
the others itself: it says who is missing, and whoever leaves tells the others why.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from mat_dist.distributed.launch import Launch
from mat_dist.distributed.stopping import StopFlag, leave_if
from mat_dist.distributed.waiting import LAP, Wait, begun
from mat_dist.errors import EnvironmentFault, MatError, described, told_error

LEFT = "left"  # why a rank left before the groups stood
T = TypeVar("T")


class Rendezvous:
    """The store of a launch, on all of whose ranks this is made at about the same time.

    Args:
        timeout: seconds to wait for the store, and then for the other ranks.
        stop: the stop request of this rank; it ends the wait.
    """

    def __init__(self, launch: Launch, timeout: float, stop: StopFlag) -> None:
        if launch.master is None:
            raise EnvironmentFault("nobody said where ranks meet", "MASTER_ADDR, MASTER_PORT", "start with torchrun")
        self._launch, self._timeout, self._stop = launch, timeout, stop
        self._address, self._where = launch.master, launch.meeting_place
        # Where torchrun has no store for the ranks, rank 0 opens one, and keeps it as long as this object.
        self._server = self._open(serve=True) if launch.rank == 0 and not launch.agent_store else None
        self._turn = 0
        if launch.agent_store:  # it outlives a training, and a program may have several: its processes count alike
            self._turn = self.client("turns").add(f"{launch.rank} {socket.gethostname()} {os.getpid()}", 1)
        self._store: Any = self.client("rendezvous")

    def client(self, purpose: str) -> dist.Store:
        """A new client of the store, with keys of this restart and training: torchrun's store outlives them, and gloo
        would connect to the addresses of the attempt before (torch 2.14)."""
        self._patiently(self._knock, "the store of rank 0", "silent")
        prefix = f"mat_dist/{self._launch.run_id}/{self._launch.restart}/{self._turn}/{purpose}"
        return dist.PrefixStore(prefix, self._open(serve=False))

    def wait_for_all(self, told: str = "") -> list[str]:
        """Return when all ranks are there, what each of them told. Raises, with one text on all ranks that are there,
        EnvironmentFault where they cannot be one launch, or some do not come, and StopRequested after a signal."""
        try:
            return self._wait_for_all(told)
        except MatError as error:
            mine = json.dumps(described(error))
            first = json.loads(self._store.compare_set(LEFT, "", mine) or mine)
            raise told_error(first) from None
        finally:
            self._leave_last()

    # ---------------------------------------------------------------- inside

    def _wait_for_all(self, told: str) -> list[str]:
        rank, world = self._launch.rank, self._launch.world
        self._store.append("here", json.dumps([rank, world, told]) + "\n")
        wait, pause = Wait(self._timeout, self._word), 0.01
        while absent := self._absent():
            if self._store.check([LEFT]):
                raise told_error(json.loads(self._store.get(LEFT)))
            leave_if(self._stop, f"waiting for {_ranks(absent)}", self._where)
            if wait.over():
                raise EnvironmentFault(f"{_ranks(absent)} of {world} did not come within {self._timeout:g} s",
                                       self._where, "start all of them, with one WORLD_SIZE; see what they printed")
            time.sleep(pause)
            pause = min(LAP / 2, pause * 1.5)
        return [one for *_, one in self._here]

    def _leave_last(self) -> None:
        """Rank 0's store answers for some laps until all that are there have heard, so that all end with one text."""
        heard, wait = self._store.add("heard", 1), Wait(6 * LAP)
        while self._server is not None and heard < self._store.get("here").count(b"\n") and not wait.over():
            time.sleep(0.01)
            heard = self._store.add("heard", 0)

    def _absent(self) -> list[int]:
        """Who is not there: one request. Raises EnvironmentFault where those who are cannot be one launch."""
        self._here = sorted(json.loads(line) for line in self._store.get("here").splitlines())
        ranks, sizes = Counter(rank for rank, *_ in self._here), [size for _, size, _ in self._here]
        ((rank, count),) = ranks.most_common(1)
        if count > 1:
            raise EnvironmentFault(f"two processes say that they are rank {rank}", "RANK", "start with torchrun")
        if len(set(sizes)) > 1:
            raise EnvironmentFault(f"the ranks differ in their number: WORLD_SIZE={', '.join(map(str, sizes))}",
                                   self._where, "start all ranks with one WORLD_SIZE")
        return [rank for rank in range(self._launch.world) if rank not in ranks]

    def _word(self) -> str:
        """Said by the lowest rank that is there."""
        absent = self._absent()
        first = next(rank for rank in range(self._launch.world) if rank not in absent)
        return f"waiting for {_ranks(absent)} of {self._launch.world} ({self._where})" * (first == self._launch.rank)

    def _knock(self) -> None:
        """Raises OSError where nobody listens. torch's own attempts print a warning each, and hear no signal."""
        try:
            socket.create_connection(self._address, timeout=LAP).close()
        except OSError:
            time.sleep(LAP / 2)
            raise

    def _open(self, serve: bool) -> dist.Store:
        """The store, or a client of it; made in a thread, since that may wait in C++ for a foreign program's answer.
        Raises RuntimeError."""
        host, port = self._address
        answer = begun(lambda: dist.TCPStore("localhost" if serve else host, port, is_master=serve,
                                             wait_for_workers=False, timeout=timedelta(seconds=self._timeout)), "store")
        return self._patiently(lambda: answer.result(timeout=LAP), "an answer of the store",
                               "what listens there does not answer as a store")

    def _patiently(self, attempt: Callable[[], T], awaited: str, silence: str) -> T:
        """The result of attempts, of which each that fails raises OSError; `silence`: what is the matter if it does not
        say why."""
        problem = ""
        wait = Wait(self._timeout, lambda: f"waiting for {awaited} ({self._where}: {problem})"
                    * (self._launch.local_rank == 0))
        while True:
            try:
                return attempt()
            except OSError as error:
                nameless = isinstance(error, socket.gaierror)
                problem = "the name has no address" if nameless else error.strerror or silence
            leave_if(self._stop, f"waiting for {awaited}", self._where)
            if wait.over():
                raise EnvironmentFault(f"the ranks cannot meet: {problem}", self._where, "start with torchrun, and "
                                       "check the name, the port and the network; python -m mat_dist.check helps")


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
