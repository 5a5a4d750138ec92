"""Heartbeats over stores that answer, fall silent or are gone. Two nodes of two ranks; the store is a dictionary."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from mat_dist.distributed import heartbeat
from mat_dist.distributed.heartbeat import Heartbeat, StoreThread
from mat_dist.distributed.processes import ProcessIdentity
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import PeerFailed, PeerSilent


class Store:
    """Like a TCPStore client that counts its requests: `silent` blocks every call, `gone` makes it fail."""

    def __init__(self, values: dict[str, bytes] | None = None) -> None:
        self.values = {} if values is None else values
        self.speaks, self.gone, self.requests = threading.Event(), False, 0
        self.speaks.set()

    def _answer(self) -> None:
        self.requests += 1
        self.speaks.wait()
        if self.gone:
            raise RuntimeError("Connection reset by peer")

    def set(self, key: str, value: str) -> None:
        self._answer()
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        self._answer()
        return self.values[key]

    def append(self, key: str, value: str) -> None:
        self._answer()
        self.values[key] = self.values.get(key, b"") + value.encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self._answer()
        return [self.values[key] for key in keys]

    def check(self, keys: list[str]) -> bool:
        self._answer()
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        self._answer()
        return self.values.setdefault(key, value.encode())


@pytest.fixture
def silent() -> Iterator[Store]:
    store = Store()
    store.speaks.clear()
    yield store
    store.gone = True
    store.speaks.set()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "STALE", 0.2)
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.02)


def beating(store: Store, rank: int, stop: StopFlag | None = None) -> Heartbeat:
    node = range(rank // 2 * 2, rank // 2 * 2 + 2)
    return Heartbeat(store, rank, 4, node=node, peers_of=str, stop=stop or StopFlag())


# ------------------------------------------------------------------ the store's thread


def test_who_asks_a_silent_store_gives_up(silent):
    client = StoreThread(silent, lambda store: None, 100)
    with pytest.raises(RuntimeError, match=r"no answer within 0\.05 s"):
        client.ask(lambda store: store.get("a"), 0.05)
    with pytest.raises(RuntimeError, match="no answer"):  # nor does the next one wait for the thread
        client.ask(lambda store: 1, 0.05)
    client.close()


def test_a_store_that_owes_an_answer_is_waited_for_once(silent, monkeypatch):
    monkeypatch.setattr(heartbeat, "LAP", 0.05)
    client = StoreThread(silent, lambda store: None, 100)
    with pytest.raises(heartbeat.SilentStore, match=r"no answer within 0\.2 s"):
        client.ask(lambda store: store.check(["a"]), 0.2)
    with pytest.raises(heartbeat.SilentStore, match=r"no answer within 0\.05 s"):
        client.ask(lambda store: 1, 1000)
    silent.speaks.set()
    assert client.ask(lambda store: 2, 10) == 2  # it has come back
    client.close()


def test_an_error_of_the_store_reaches_who_asked():
    client = StoreThread(Store(), lambda store: None, 100)
    with pytest.raises(KeyError):
        client.ask(lambda store: store.get("absent"), 10)
    assert client.ask(lambda store: store.check(["absent"]), 10) is False
    client.close()


def test_regular_calls_go_on_while_others_ask_and_end_when_the_store_is_gone():
    store, calls, enough = Store({"a": b"1"}), [], threading.Event()

    def regularly(store: Store) -> None:
        store.get("a")
        calls.append(threading.current_thread().name)
        if len(calls) == 3:
            store.gone = True
            enough.set()

    client = StoreThread(store, regularly, 0.001)
    while not enough.is_set():
        client.ask(lambda store: None, 10)
    with pytest.raises(RuntimeError, match="reset"):
        client.ask(lambda store: store.get("a"), 10)
    client.close()
    assert calls == ["store"] * 3


# ------------------------------------------------------------------ who is told what


@pytest.mark.parametrize("ending", ["silent", "gone"])
@pytest.mark.parametrize(("rank", "others"), [(0, (2, 3)), (3, (0, 1))])
def test_without_the_store_each_node_speaks_for_itself(rank, others, ending):
    store = Store()
    mine = beating(store, rank)
    if ending == "silent":
        store.speaks.clear()
    store.gone = True
    error = mine.blame("gather of step 3, AEs", "Timed out")
    store.speaks.set()
    mine.close()
    assert error.guilty == others
    assert "store is gone" in error.what and "Timed out" in error.what and error.where == "gather of step 3, AEs"


def test_ranks_that_lose_their_launcher_stop_and_meet_at_the_next_exchange():
    store, stop = Store(), StopFlag()
    mine = beating(store, 2, stop)
    store.gone = True
    mine.meet("saving", 10)
    assert stop.requested and "launcher" in stop.reason
    mine.close()


def test_a_wait_of_unknown_length_ends_where_the_store_is_silent():
    store = Store()
    mine = beating(store, 2)
    store.speaks.clear()
    store.gone = True
    with pytest.raises(PeerSilent, match=r"store is gone.*waiting at evaluation"):
        mine.meet("evaluation", 0.1)
    store.speaks.set()
    mine.close()


def test_a_failure_is_known_to_all_in_that_work_alone_and_releases_a_device_once():
    values: dict[str, bytes] = {}
    released, told = [], threading.Event()
    ranks = [beating(Store(values), rank) for rank in range(2)]
    ranks[0].release = lambda: released.append(1) or told.set()
    for one in ranks:
        one.work = "step 3"
    assert ranks[0].failure() is None
    ranks[1].fail({"code": 13, "what": "it broke", "where": "step 3, forward", "how": "mend it"})
    found = ranks[0].failure()
    assert isinstance(found, PeerFailed) and found.told and str(found) == "it broke (step 3, forward): mend it"
    assert told.wait(10)
    for one in ranks:
        one.work = "step 4"
    assert ranks[0].failure() is None and released == [1]
    for one in ranks:
        one.close()


def test_all_ranks_meet_and_a_stop_request_reaches_them():
    values: dict[str, bytes] = {}
    stops = [StopFlag() for _ in range(4)]
    ranks = [beating(Store(values), rank, stops[rank]) for rank in range(4)]
    stops[1].pass_on()
    threads = [threading.Thread(target=one.meet, args=("evaluation", 10)) for one in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    told = threading.Event()
    for _ in range(500):
        if all(stop.requested for stop in stops):
            break
        told.wait(0.01)
    assert all(stop.requested for stop in stops)
    for one in ranks:
        one.close()


def test_a_rank_that_stops_beating_is_named_and_stopped(monkeypatch):
    killed: list[int] = []  # all ranks of this test are this process
    monkeypatch.setattr(ProcessIdentity, "kill", lambda self: killed.append(self.pid))
    values: dict[str, bytes] = {}
    stores = [Store(values) for _ in range(4)]
    ranks = [beating(store, rank) for rank, store in enumerate(stores)]
    stores[3].gone = True  # its beats do not arrive any more
    error = ranks[0].blame("gather of step 5, AEs")
    assert error.guilty == (3,) and "rank 3 (peer 3) stopped answering" in error.what
    assert str(ranks[1].blame("another exchange")) == str(error)  # one verdict for all
    assert killed == [os.getpid()]
    for one in ranks:
        one.close()


@pytest.mark.parametrize(("kills", "says"), [(1, "memory killer"), (0, "rank 1 (peer 1) ended")])
def test_a_rank_that_the_memory_killer_took_is_not_told_as_slow(kills, says, monkeypatch):
    values: dict[str, bytes] = {}
    mine, other = beating(Store(values), 0), beating(Store(values), 1)
    monkeypatch.setattr(mine, "_is_gone", lambda beat: beat is not None and beat.arrived == (0, 0))
    monkeypatch.setattr(mine, "_others", lambda: [1])
    monkeypatch.setattr(ProcessIdentity, "kill", lambda self: None)
    monkeypatch.setattr(heartbeat, "memory_kills", lambda: mine._memory_kills + kills)
    error = mine.blame("gather of step 2, AEs")
    assert says in error.what and error.guilty == (1,)
    assert "only slow" not in error.how and ("more memory" in error.how) == bool(kills)
    for one in (mine, other):
        one.close()


def test_a_rank_is_last_seen_at_the_newest_exchange_that_it_completed(monkeypatch):
    monkeypatch.setattr(ProcessIdentity, "kill", lambda self: None)
    monkeypatch.setattr(heartbeat, "INTERVAL", 100)  # the beats are those of the start
    values: dict[str, bytes] = {}
    mine, _other = ranks = [beating(Store(values), rank) for rank in range(2)]
    monkeypatch.setattr(mine, "_world", 2)
    for exchange in ("step 1, AEs", "step 1, vote", "step 2, AEs"):
        mine.arrive(exchange)
    assert "rank 1 was last seen at step 1, vote" in mine.blame("gather of step 2, AEs").where
    for one in ranks:
        one.close()


def replicas(values: dict[str, bytes]) -> list[Heartbeat]:
    """Two peers on four ranks, two replicas each: ranks 0 and 2, 1 and 3."""
    return [Heartbeat(Store(values), rank, 4, node=range(4), peers_of=lambda r: str(r % 2), stop=StopFlag())
            for rank in range(4)]


def test_ranks_whose_peers_have_other_exchanges_among_replicas_meet():
    ranks = replicas({})
    for rank, exchanges in enumerate((2, 5, 2, 5)):  # such as of batch statistics: a peer learns more views
        for _ in range(exchanges):
            ranks[rank].arrive("forward of step 1", replicas=True)
    threads = [threading.Thread(target=one.meet, args=("run folder", 10), daemon=True) for one in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()
    for one in ranks:
        one.close()


def test_a_late_replica_is_told_from_ranks_of_other_peers(monkeypatch):
    monkeypatch.setattr(ProcessIdentity, "kill", lambda self: None)
    ranks = replicas({})
    for one in ranks:
        one.arrive("step 1, headers")
    for _ in range(3):
        ranks[0].arrive("step 1, forward", replicas=True)  # peer 1 has none, and rank 2 comes to none
    threading.Event().wait(0.1)  # until all have beaten
    assert ranks[0].word("step 1, forward") == "waiting for rank 2 (peer 0) at step 1, forward"
    error = ranks[0].blame("gather of step 1, forward")
    assert error.guilty == (2,) and "rank 2 (peer 0) is late" in error.what
    for one in ranks:
        one.close()


# ------------------------------------------------------------------ many ranks


class Crowd(Store):
    """The store of rank 0 of so many ranks, which all beat. The others come to a meeting after `polls` looks at it."""

    def __init__(self, world: int, polls: int = 20) -> None:
        super().__init__()
        self.world, self.polls, self.looks = world, polls, 0

    def begin(self) -> Heartbeat:
        mine = Heartbeat(self, 0, self.world, node=range(1), peers_of=str, stop=StopFlag())
        for rank in range(1, self.world):
            self.values[f"beat/{rank}"] = self.values["beat/0"]
            self.values["beating"] += f"{rank} ".encode()
        self.requests = 0
        return mine

    def get(self, key: str) -> bytes:
        if key.startswith("meet/"):
            self.looks += 1
            if self.looks == self.polls:
                self.append(key, "".join(f"{rank} " for rank in range(1, self.world)))
        return super().get(key)


@pytest.mark.parametrize("world", [2, 512])
def test_a_look_at_all_ranks_is_as_many_requests_however_many_there_are(world, monkeypatch):
    monkeypatch.setattr(heartbeat, "INTERVAL", 100)
    monkeypatch.setattr(ProcessIdentity, "kill", lambda self: None)
    store = Crowd(world)
    mine = store.begin()
    assert len(mine._beats()) == world and store.requests == 2  # who beats is asked until all do
    assert len(mine._beats()) == world and store.requests == 3
    assert "all ranks are there" in mine.word("step 3") and store.requests == 4
    mine.meet("evaluation", 100)
    assert store.looks == 20 and store.requests - 4 <= 2 + 3 * store.looks
    store.requests, naps = 0, []
    monkeypatch.setattr(heartbeat.time, "sleep", lambda seconds: naps.append(seconds) or clock.wait(0.02))
    clock = threading.Event()
    assert "stopped answering" in mine.blame("gather of step 3, AEs").what
    assert naps and store.requests <= 3 * len(naps) + 6
    mine.close()


def test_a_rank_that_has_not_begun_to_beat_is_no_reason_to_ask_for_each_one_alone(monkeypatch):
    monkeypatch.setattr(heartbeat, "INTERVAL", 100)
    store = Crowd(512)
    mine = store.begin()
    store.values["beating"] = b"0 7 "
    assert mine._beats().keys() == {0, 7} and store.requests == 2
    assert mine._beats(ranks=[3, 5]) == {} and store.requests == 3
    mine.close()
