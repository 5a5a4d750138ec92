"""Heartbeats: which rank is gone, silent or late, decided once and read by all.

A thread of each rank writes a beat into the rendezvous store twice a second, over a store client of its own (a
client blocks while another thread waits in it). A failed or timed-out collective tells nobody whose fault it is
(gloo blames the waiting rank); the beats do. The first survivor to find out writes the verdict into the store and
the others print the same one. Under torchrun the store lives in the agent, so it survives the death of rank 0.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mat_dist.errors import PeerSilent
from mat_dist.processes import ProcessIdentity
from mat_dist.stopping import StopFlag

INTERVAL = 0.5  # seconds between beats
STALE = 4.0  # seconds without a beat after which a rank counts as stopped (8 beats)
VERDICT, STOP = "verdict", "stop"


@dataclass(frozen=True)
class Beat:
    """One rank's state: number of the beat, exchanges entered, the one it is at, its process."""

    count: int
    arrived: int
    where: str
    process: ProcessIdentity

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: bytes) -> Beat:
        values = json.loads(text)
        return cls(values["count"], values["arrived"], values["where"], ProcessIdentity(**values["process"]))


class Heartbeat:
    """The heartbeat of one rank.

    Args:
        store: a store client that nobody else uses, with keys of this launch only.
        rank, world: of this process.
        peers_of: rank -> peers that live there, for messages.
        stop: the stop request of this rank, passed on to all ranks and set by theirs.
    """

    def __init__(self, store: Any, rank: int, world: int, *, peers_of: Callable[[int], str], stop: StopFlag) -> None:
        self._store, self._rank, self._world, self._peers_of, self._stop = store, rank, world, peers_of, stop
        self._arrived, self._where, self._count = 0, "start", 0
        self._process = ProcessIdentity.own()
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- while all is well

    def arrive(self, where: str) -> None:
        """Note that this rank enters an exchange; travels with the next beat."""
        self._arrived += 1
        self._where = where

    def meet(self, point: str, timeout: float) -> None:
        """Wait for all ranks for as long as they beat; a rank without a beat for `timeout` s is silent.

        For phases whose length nobody can foresee (loading, evaluation, saving): a collective would time out.
        """
        self.arrive(point)
        name = f"meet/{self._arrived}"
        keys = {rank: f"{name}/{rank}" for rank in range(self._world)}
        self._set(keys[self._rank], "1")
        waited: dict[int, float] = {}  # rank -> when its latest beat was first seen
        seen: dict[int, int] = {}
        pause = 0.002
        while missing := [rank for rank, key in keys.items() if not self._has(key)]:
            verdict = self._read(VERDICT)
            if verdict is not None:
                raise self._as_error(verdict)
            now, beats = time.monotonic(), self._beats()
            for rank in missing:
                beat = beats.get(rank)
                if seen.get(rank) != (beat.count if beat else 0):
                    seen[rank], waited[rank] = (beat.count if beat else 0), now
            gone = [r for r in missing if self._is_gone(beats.get(r))]
            stale = [r for r in missing if now - waited.get(r, now) > timeout]
            if gone or stale:
                raise self.blame(f"waiting at {point}")
            time.sleep(pause)
            pause = min(0.2, pause * 1.5)

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join(timeout=5)

    # ---------------------------------------------------------------- when something is wrong

    def blame(self, what: str) -> PeerSilent:
        """Find the guilty rank after a failed exchange, stop it if it hangs on this machine -> the error to raise.

        Takes up to STALE seconds, since a stopped process can only be told from a slow one by its missing beats.
        """
        first, began = {r: b.count for r, b in self._beats().items()}, time.monotonic()
        while True:
            verdict = self._read(VERDICT)
            if verdict is not None:
                return self._as_error(verdict)
            beats, elapsed = self._beats(), time.monotonic() - began
            gone = [r for r in self._others() if self._is_gone(beats.get(r))]
            if gone or elapsed > STALE:
                break
            time.sleep(0.1)
        there = [r for r in self._others() if r not in gone]
        stopped = [r for r in there if r not in beats or beats[r].count == first.get(r)]
        late = [r for r in there if r in beats and beats[r].arrived < self._arrived]
        causes = (gone, "ended"), (stopped, "stopped answering"), (late, "is late")
        guilty, how = next((cause for cause in causes if cause[0]), ([], ""))
        verdict = self._publish({"ranks": guilty, "how": how, "what": what, "at": self._where,
                                 "steps": {str(r): beats[r].where if r in beats else "start" for r in guilty}})
        for rank in verdict["ranks"]:
            beat = beats.get(rank)
            if rank != self._rank and beat is not None and beat.process.shares_pids_with(self._process):
                beat.process.kill()
        return self._as_error(verdict)

    def report(self, error: dict[str, Any]) -> None:
        """Publish why this rank leaves (code, what, where, how), so that the others need not guess."""
        self._publish({"error": error, "ranks": [self._rank]})

    # ---------------------------------------------------------------- inside

    def _others(self) -> list[int]:
        return [r for r in range(self._world) if r != self._rank]

    def _as_error(self, verdict: dict[str, Any]) -> PeerSilent:
        guilty = list(verdict["ranks"])
        listed = ", ".join(f"rank {r} (peer {self._peers_of(r)})" for r in guilty)
        if "error" in verdict:
            told = verdict["error"]
            found = PeerSilent(f"{listed} left: {told['what']}", told["where"], told["how"])
        elif guilty:
            last = "; ".join(f"rank {r} was last seen at {where}" for r, where in verdict["steps"].items())
            found = PeerSilent(f"{listed} {verdict['how']}", f"{verdict['what']}; {last}",
                               "start again to continue from the newest checkpoint; see its rank_<r>.log; raise "
                               "comm.timeout if it was only slow")
        else:
            found = PeerSilent("an exchange failed though all ranks answer", verdict["what"],
                               "check the network between the nodes, then start again to continue from the newest "
                               "checkpoint")
        found.guilty = tuple(guilty)
        return found

    def _is_gone(self, beat: Beat | None) -> bool:
        return beat is not None and beat.process.shares_pids_with(self._process) and not beat.process.runs()

    def _beats(self) -> dict[int, Beat]:
        return {r: Beat.parse(text) for r in range(self._world) if (text := self._get(f"beat/{r}")) is not None}

    def _publish(self, verdict: dict[str, Any]) -> dict[str, Any]:
        """Make `verdict` the one of all ranks unless there is one -> the one that counts."""
        text = json.dumps(verdict)
        with self._lock:
            found = self._store.compare_set(VERDICT, "", text)
        kept: dict[str, Any] = json.loads(found or text)
        return kept

    def _read(self, key: str) -> dict[str, Any] | None:
        text = self._get(key)
        return None if text is None else json.loads(text)

    def _get(self, key: str) -> bytes | None:
        with self._lock:
            return self._store.get(key) if self._store.check([key]) else None

    def _has(self, key: str) -> bool:
        with self._lock:
            return bool(self._store.check([key]))

    def _set(self, key: str, text: str) -> None:
        with self._lock:
            self._store.set(key, text)

    def _beat(self) -> None:
        self._count += 1
        self._set(f"beat/{self._rank}", Beat(self._count, self._arrived, self._where, self._process).dump())

    def _run(self) -> None:
        passed = False
        while not self._ended.wait(INTERVAL):
            try:
                self._beat()
                if not passed and self._stop.requested:
                    passed = True
                    self._set(STOP, "1")
                if not passed and self._has(STOP):
                    passed = True
                    self._stop.pass_on()
            except RuntimeError:  # the store is gone: rank 0 or the agent ended; the next collective fails too
                return
