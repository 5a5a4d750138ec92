"""Ranks as threads: gloo groups over one in-memory store, so that a many-rank test takes as long as its work."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.placement import Placement

TIMEOUT = timedelta(seconds=30)


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

    return Mesh(place, torch.device("cpu"), world=group("world", [list(range(world))]),
                peer=group("peer", place.peer_axis()), replica=group("replica", place.replica_axis()))


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    """run_ranks(fn, peers, world) -> [fn(mesh) of each rank]; the first failure is raised again.

    Threads share torch's global generator: `fn` must not draw from it, so models are built before.
    With errors="return", exceptions are returned in place of results.
    """
    def run(fn: Callable[[Mesh], Any], peers: int, world: int, errors: str = "raise") -> list[Any]:
        store = dist.HashStore()

        def one(rank: int) -> Any:
            try:
                return fn(open_threads(store, peers, world, rank))
            except Exception as error:
                if errors == "return":
                    return error
                raise

        with ThreadPoolExecutor(world) as pool:
            futures = [pool.submit(one, rank) for rank in range(world)]
            return [f.result(timeout=60) for f in futures]

    return run
