"""Ranks as threads: gloo groups over one in-memory store, so that a many-rank test takes as long as its work."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mat_dist import rng
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.heartbeat import Heartbeat
from mat_dist.distributed.placement import Placement
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import MatError, PeerSilent

TIMEOUT = timedelta(seconds=30)


class Beat(Heartbeat):
    """Of a rank that is a thread: it can blame nobody, since all are this process."""

    def blame(self, what: str, symptom: str = "") -> MatError:
        return PeerSilent(f"a peer stopped answering: {symptom}", what, "look at the first failure")


def open_threads(store: dist.Store, peers: int, world: int, rank: int) -> Mesh:
    """The mesh of one rank among threads."""
    place = Placement.place(peers, world, rank)
    if world == 1:
        return Mesh(place, torch.device("cpu"))

    def group(name: str, axis: list[list[int]]) -> Any:
        ranks = next(r for r in axis if rank in r)
        if len(ranks) == 1:
            return None
        prefix = dist.PrefixStore(f"{name}-{ranks[0]}", store)
        return dist.ProcessGroupGloo(prefix, ranks.index(rank), len(ranks), TIMEOUT)

    beat = None if place.replicas == 1 else Beat(dist.PrefixStore("beats", store), rank, world, node=range(world),
                                                 peers_of=str, stop=StopFlag())
    return Mesh(place, torch.device("cpu"), world=group("world", [list(range(world))]), beat=beat,
                peer=group("peer", place.peer_axis()), replica=group("replica", place.replica_axis()))


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection while threads run. torch holds the lock of its generator while it makes the tensor of the
    state: a collection that begins there may let another thread run, which waits for that lock and keeps Python's."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    """run_ranks(fn, peers, world) -> [fn(mesh) of each rank]; the first failure is raised again.

    Threads share torch's global generator: `fn` must not draw from it, so models are built before.
    With errors="return", exceptions are returned in place of results.
    """
    def run(fn: Callable[[Mesh], Any], peers: int, world: int, errors: str = "raise") -> list[Any]:
        store = dist.HashStore()

        def one(rank: int) -> Any:
            mesh = open_threads(store, peers, world, rank)
            try:
                return fn(mesh)
            except Exception as error:
                if errors == "return":
                    return error
                raise
            finally:
                if mesh.beat is not None:
                    mesh.beat.close()

        with uncollected(), ThreadPoolExecutor(world) as pool:
            futures = [pool.submit(one, rank) for rank in range(world)]
            return [f.result(timeout=60) for f in futures]

    return run


@pytest.fixture
def one_draws_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are threads here, which share the global generators: let them take turns."""
    lock = threading.RLock()

    def in_turn(scope: Callable[[int], AbstractContextManager[None]]) -> Callable[[int], AbstractContextManager[None]]:
        @contextmanager
        def locked(stream: int) -> Iterator[None]:
            with lock, scope(stream):
                yield
        return locked

    for name in ("keyed_rng", "undrawn"):
        monkeypatch.setattr(rng, name, in_turn(getattr(rng, name)))
