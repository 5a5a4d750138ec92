"""Heartbeats: which rank is gone, silent or late, decided once and read by all.

A thread of each rank writes a beat into the rendezvous store twice a second, over a store client of its own (a
client blocks while another thread waits in it). A failed or timed-out collective tells nobody whose fault it is
(gloo blames the waiting rank); the beats do. The first survivor to find out writes the verdict into the store and
the others print the same one. Under torchrun the store lives in the agent, so it survives the death of rank 0.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from mat_dist.distributed.processes import ProcessIdentity, memory_kills
from mat_dist.distributed.stopping import LAUNCHER_GONE, StopFlag
from mat_dist.distributed.waiting import LAP, Wait
from mat_dist.errors import MatError, PeerSilent, told_error

INTERVAL = 0.5  # seconds between beats
STALE = 4.0  # seconds without a beat after which a rank counts as stopped (8 beats)
CLOSE_SECONDS = 1.0  # a healthy store answers within milliseconds
VERDICT, STOP, BEATING = "verdict", "stop", "beating"
T = TypeVar("T")


@dataclass(frozen=True)
class Beat:
    """One rank's state: number of the beat, exchanges entered (of all ranks, and since then those among the replicas of
    its peers), the one it is at, its process."""

    count: int
    arrived: tuple[int, int]
    where: str
    process: ProcessIdentity

    @classmethod
    def parse(cls, text: bytes) -> Beat:
        values = json.loads(text)
        return cls(**{**values, "arrived": tuple(values["arrived"]), "process": ProcessIdentity(**values["process"])})


class Heartbeat:
    """The heartbeat of one rank.

    Args:
        store: a store client that nobody else uses, with keys of this launch only.
        node: the ranks on this node.
        peers_of: rank -> peers that live there, for messages.
        stop: the stop request of this rank, passed on to all ranks and set by theirs.

    Attributes:
        work: the unit of common work, such as a step, that this rank is at.
        release: ends exchanges that a device waits in; called once, when a rank has failed in that work, or is out.
    """

    def __init__(self, store: Any, rank: int, world: int, *, node: range, peers_of: Callable[[int], str],
                 stop: StopFlag) -> None:
        self._rank, self._world, self._node, self._peers_of, self._stop = rank, world, node, peers_of, stop
        self._arrived, self._where, self._before, self._count = (0, 0), "start", "start", 0
        self._process, self._told_stop = ProcessIdentity.own(), False
        self._memory_kills, self._lap = memory_kills(), max(LAP / 2, world / 256)  # the store tells all of all
        self.work = ""
        self.release: Callable[[], Any] | None = None
        self._beat(store)
        store.append(BEATING, f"{rank} ")
        self._beating: set[int] = set()  # whose beats can be read
        self._store = StoreThread(store, self._beat, INTERVAL)

    # ---------------------------------------------------------------- while all is well

    def arrive(self, where: str, *, replicas: bool = False) -> None:
        """Note that this rank enters an exchange, of all ranks or of the `replicas` of its peers alone; travels with
        the next beat. The two are counted apart, because peers with other losses or networks have more or fewer of the
        latter."""
        shared, own = self._arrived
        self._arrived = (shared, own + 1) if replicas else (shared + 1, 0)
        self._before, self._where = self._where, where

    def meet(self, point: str, timeout: float) -> None:
        """Wait for all ranks for as long as they beat; a rank without a beat for `timeout` s is silent.

        For phases whose length nobody can foresee (loading, evaluation, saving): a collective would time out. Returns
        at once where the store has ended: then all ranks stop, and the exchange that follows tells who is there.
        """
        self.arrive(point)
        try:
            self._meet(point, timeout)
        except SilentStore as error:
            raise self._cut_off(f"waiting at {point}", str(error)) from error
        except RuntimeError:
            self._stop.pass_on(LAUNCHER_GONE)

    def _meet(self, point: str, timeout: float) -> None:
        key, everyone = f"meet/{self._arrived[0]}", range(self._world)
        self._store.ask(lambda store: store.append(key, f"{self._rank} "), timeout)
        seen: dict[int, tuple[int, float]] = {}  # rank -> its latest beat, and when that was first seen
        missing: list[int] = []
        wait, pause, look = Wait(float("inf"), lambda: self._missed(missing, point)), 0.002, 0.0
        while missing := sorted({*everyone} - self._store.ask(lambda store: _listed(store, key), timeout)):
            wait.over()
            if wait.seconds >= look:
                look = wait.seconds + self._lap
                if (verdict := self._verdict(timeout)) is not None:
                    raise self._as_error(verdict)
                beats = self._beats(timeout, missing)
                seen.update({rank: (beat.count, wait.seconds) for rank, beat in beats.items()
                             if rank not in seen or seen[rank][0] != beat.count})
                if any(self._is_gone(beats.get(r)) or wait.seconds - seen.get(r, (0, 0.0))[1] > timeout
                       for r in missing):
                    raise self.blame(f"waiting at {point}")
            time.sleep(pause)
            pause = min(0.2, pause * 1.5)

    def word(self, point: str) -> str:
        """Who has not begun the exchange that this rank waits in."""
        try:
            beats = self._beats(LAP)
        except RuntimeError:
            return ""
        late = [r for r in self._others() if r not in beats or self._is_late(r, beats[r])]
        return self._missed(late, point)

    def _missed(self, ranks: list[int], point: str) -> str:
        """What is said of ranks that are waited for: by the lowest other one, so that one speaks."""
        speaks = min(set(range(self._world)) - set(ranks)) == self._rank
        listed = ", ".join(self._named(rank) for rank in ranks) or "an answer, though all ranks are there,"
        return f"waiting for {listed} at {point}" if speaks else ""

    def close(self) -> None:
        self._store.close()

    # ---------------------------------------------------------------- when something is wrong

    def blame(self, what: str, symptom: str = "") -> MatError:
        """Find the guilty rank after a failed exchange, stop it if it hangs on this machine -> the error to raise.

        Takes up to STALE seconds, since a stopped process can only be told from a slow one by its missing beats.

        Args:
            what: the exchange, for the message.
            symptom: how it failed; told where the guilty rank cannot be found, since the store is gone.
        """
        try:
            return self._as_error(self._judge(what))
        except RuntimeError as error:
            return self._cut_off(what, symptom or str(error))

    def _judge(self, what: str) -> dict[str, Any]:
        first, wait = {r: b.count for r, b in self._beats().items()}, Wait(STALE)
        while True:
            if (found := self._verdict()) is not None:
                return found
            beats, over = self._beats(), wait.over()
            gone = [r for r in self._others() if self._is_gone(beats.get(r))]
            if gone or over:
                break
            time.sleep(self._lap)
        there = [r for r in self._others() if r not in gone]
        stopped = [r for r in there if r not in beats or beats[r].count == first.get(r)]
        late = [r for r in there if r in beats and self._is_late(r, beats[r])]
        causes = (gone, "ended"), (stopped, "stopped answering"), (late, "is late")
        guilty, how = next((cause for cause in causes if cause[0]), ([], ""))
        if gone and memory_kills() > self._memory_kills:
            how = "ended, and the kernel's memory killer has ended a process of this job or machine meanwhile"
        verdict = self._publish({"ranks": guilty, "how": how, "what": what, "at": self._where,
                                 "steps": {str(r): self._last_seen(beats.get(r)) for r in guilty}})
        for rank in verdict["ranks"]:
            beat = beats.get(rank)
            if rank != self._rank and beat is not None and beat.process.shares_pids_with(self._process):
                beat.process.kill()
        return verdict

    def report(self, error: dict[str, Any]) -> None:
        """Publish why this rank leaves (code, what, where, how): the others leave with the same error."""
        self._publish({"error": error, "ranks": [self._rank]})

    def fail(self, error: dict[str, Any]) -> None:
        """Publish that this rank failed in its work (code, what, where, how), and goes to the next header."""
        key = f"failed/{self.work}"
        with suppress(RuntimeError):  # the store is gone: the header finds out
            self._store.ask(lambda store: store.set(key, json.dumps(error)), STALE)

    def failure(self) -> MatError | None:
        """With what a rank has failed in the present work, if one has."""
        with suppress(RuntimeError):
            if (told := self._told(f"failed/{self.work}", STALE)) is not None:
                found = told_error(told)
                found.told = True
                return found
        return None

    def _cut_off(self, what: str, symptom: str) -> PeerSilent:
        """The store is gone, and with it the way to agree: each node speaks for itself, so all other ranks are out."""
        found = PeerSilent(f"the rendezvous store is gone: the node of rank 0 ended or cannot be reached ({symptom})",
                           what, "check that node and the network, then start again to continue from the newest "
                                 "checkpoint")
        found.guilty = tuple(rank for rank in range(self._world) if rank not in self._node)
        return found

    # ---------------------------------------------------------------- inside

    def _others(self) -> list[int]:
        return [r for r in range(self._world) if r != self._rank]

    def _named(self, rank: int) -> str:
        return f"rank {rank} (peer {self._peers_of(rank)})"

    def _is_late(self, rank: int, beat: Beat) -> bool:
        """Whether that rank has not begun the exchange that this one is at; replicas have the same ones."""
        if self._peers_of(rank) == self._peers_of(self._rank):
            return beat.arrived < self._arrived
        return beat.arrived[0] < self._arrived[0]

    def _last_seen(self, beat: Beat | None) -> str:
        """Where that rank was: its beat, or the exchange that it last completed with us, if that is newer."""
        return self._before if beat is None or beat.arrived[0] < self._arrived[0] - 1 else beat.where

    def _as_error(self, verdict: dict[str, Any]) -> MatError:
        if "error" in verdict:
            return told_error(verdict["error"])
        if not verdict["ranks"]:
            return PeerSilent("an exchange failed though all ranks answer", verdict["what"], "check the network "
                              "between the nodes, then start again to continue from the newest checkpoint")
        listed = ", ".join(self._named(r) for r in verdict["ranks"])
        last = "; ".join(f"rank {r} was last seen at {where}" for r, where in verdict["steps"].items())
        advice = "see its rank_<r>.log"
        if "memory" in verdict["how"]:
            advice = "ask for more memory, or use fewer ranks per node, a smaller batch or data.residency=mmap"
        elif verdict["how"] != "ended":
            advice += "; raise comm.timeout if it was only slow"
        found = PeerSilent(f"{listed} {verdict['how']}", f"{verdict['what']}; {last}", "start again to continue from "
                           f"the newest checkpoint; {advice}")
        found.guilty = tuple(verdict["ranks"])
        return found

    def _is_gone(self, beat: Beat | None) -> bool:
        return beat is not None and beat.process.shares_pids_with(self._process) and not beat.process.runs()

    def _beats(self, patience: float = STALE, ranks: Iterable[int] | None = None) -> dict[int, Beat]:
        """The newest beat of each of these ranks, of all by default, that has begun to beat; one request for all."""
        def read(store: Any) -> dict[int, Beat]:
            if len(self._beating) < self._world:
                self._beating = _listed(store, BEATING)
            found = [rank for rank in ranks or range(self._world) if rank in self._beating]
            texts = store.multi_get([f"beat/{rank}" for rank in found]) if found else []
            return dict(zip(found, map(Beat.parse, texts), strict=True))

        return self._store.ask(read, patience)

    def _verdict(self, patience: float = STALE) -> dict[str, Any] | None:
        return self._told(VERDICT, patience)

    def _told(self, key: str, patience: float) -> dict[str, Any] | None:
        return self._store.ask(lambda store: json.loads(store.get(key)) if store.check([key]) else None, patience)

    def _publish(self, verdict: dict[str, Any]) -> dict[str, Any]:
        """Make `verdict` the one of all ranks unless there is one -> the one that counts."""
        text = json.dumps(verdict)
        found = self._store.ask(lambda store: store.compare_set(VERDICT, "", text), STALE)
        kept: dict[str, Any] = json.loads(found or text)
        return kept

    def _beat(self, store: Any) -> None:
        """Sign of life; passes a stop request on, to the others or from them. In the store's thread."""
        self._count += 1
        beat = Beat(self._count, self._arrived, self._where, self._process)
        store.set(f"beat/{self._rank}", json.dumps(asdict(beat)))
        if not self._told_stop and self._stop.requested:
            self._told_stop = True
            store.set(STOP, self._stop.reason)
        if not self._told_stop and store.check([STOP]):
            self._told_stop = True
            self._stop.pass_on(store.get(STOP).decode())
        if self.release is not None and any(store.check([key]) for key in (VERDICT, f"failed/{self.work}")):
            self.release()
            self.release = None


def _listed(store: Any, key: str) -> set[int]:
    """The ranks that have added themselves to a key."""
    return {int(rank) for rank in store.get(key).split()}


class SilentStore(RuntimeError):
    """The store does not answer: a cut network, or its machine is gone."""


class StoreThread:
    """The only user of a store client, whose calls end also when the network is cut. `regularly` is called with the
    store every `interval` s, until it raises RuntimeError (the store is gone).

    c10d's TCPStore waits in recv() for an answer without a limit, and a cut cable closes no connection: the ranks of
    the cut-off node would wait for ever. So one thread alone talks to the store, and who asks gives up after a while.
    The thread may then stay in recv(); it is a daemon and does not keep the process from ending.
    """

    def __init__(self, store: Any, regularly: Callable[[Any], None], interval: float) -> None:
        self._store, self._regularly, self._interval = store, regularly, interval
        self._owed: Future[Any] | None = None
        self._asked: queue.SimpleQueue[tuple[Callable[[Any], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def ask(self, work: Callable[[Any], T], patience: float) -> T:
        """`work(store)` -> its result. Raises RuntimeError if the store is gone or silent for `patience` s, SilentStore
        in the second case; at once where it still owes the answer to such a question."""
        answer: Future[T] = Future()
        if self._owed is not None and not self._owed.done():
            patience = min(patience, LAP)
        self._asked.put((work, answer))
        wait = Wait(patience)
        while True:
            try:
                return answer.result(timeout=min(LAP, patience))
            except TimeoutError:
                if wait.over():
                    self._owed = answer
                    raise SilentStore(f"no answer within {patience:g} s") from None

    def close(self) -> None:
        """End the thread, if the store lets it."""
        self._asked.put(None)
        self._thread.join(timeout=CLOSE_SECONDS)

    def _run(self) -> None:
        due = time.monotonic() + self._interval
        while True:
            with suppress(queue.Empty):
                task = self._asked.get(timeout=min(max(0.0, due - time.monotonic()), threading.TIMEOUT_MAX))
                if task is None:
                    return
                work, answer = task
                try:
                    answer.set_result(work(self._store))
                except Exception as error:
                    answer.set_exception(error)
            if time.monotonic() >= due:
                try:
                    self._regularly(self._store)
                    due = time.monotonic() + self._interval
                except RuntimeError:  # the store is gone
                    due = float("inf")
