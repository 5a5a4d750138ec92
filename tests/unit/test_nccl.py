"""What differs with NCCL, by doubles on the CPU: two clocks, and a host that a device would hold."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mat_dist.distributed import groups
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.placement import Placement
from mat_dist.distributed.stopping import StopFlag
from mat_dist.distributed.waiting import Wait
from mat_dist.errors import MatError, PeerSilent
from tests.cohorts import build, cohort_config, nets, one_step, state_hashes

Patch = pytest.MonkeyPatch
TOLD = PeerSilent("rank 1 (peer 0) is late", "here", "start again")


class Meeting:
    def client(self, purpose: str) -> dist.Store:
        return dist.HashStore()


class Group:
    """A process group that notes its abort, which never ends where it is `hanging`."""

    def __init__(self) -> None:
        self.hanging, self.aborted = False, threading.Event()

    def abort(self) -> None:
        self.aborted.set()
        while self.hanging:
            threading.Event().wait()


def formed(monkeypatch: Patch, backend: str, timeout: float) -> tuple[Mesh, dict[str, list[timedelta]], list[Group]]:
    """The mesh of rank 0 of 2 peers with 2 replicas, the clocks of its groups by backend, and these groups."""
    clocks: dict[str, list[timedelta]] = {"nccl": [], "gloo": []}
    made: list[Group] = []

    def group(ranks: Any = None, *, timeout: timedelta, backend: str = backend, **_: Any) -> Group:
        clocks[backend].append(timeout)
        made.append(Group())
        return made[-1]

    monkeypatch.setattr(dist, "init_process_group", lambda backend, **words: group(**{**words, "backend": backend}))
    monkeypatch.setattr(dist, "new_group", group)
    mesh, _ = groups._form(Placement.place(2, 4, 0), torch.device("cpu"), backend, timeout, Meeting(),  # type: ignore
                        range(4), StopFlag())
    return mesh, clocks, made


@pytest.mark.parametrize("timeout", [1.0, 600.0, 7200.0])
def test_the_clock_of_nccl_is_longer_than_ours_with_time_to_find_and_tell_who_is_guilty(timeout: float,
                                                                                       monkeypatch: Patch) -> None:
    mesh, clocks, _ = formed(monkeypatch, "nccl", timeout)
    assert mesh.beat is not None
    mesh.beat.close()
    assert mesh._timeout == timeout  # the control group is waited for by our own clock, gloo's never ends first
    assert len(clocks["gloo"]) == 1 and min(clocks["gloo"]) > timedelta(days=1)
    assert len(clocks["nccl"]) == 1 + 2 + 2  # all ranks, the axis of peers, that of replicas
    assert min(clocks["nccl"]) >= timedelta(seconds=2 * timeout + 30)


def test_whom_a_device_waits_for_is_named_by_our_own_clock(monkeypatch: Patch) -> None:
    """A host that waited in the driver would be ended by NCCL's watchdog, though another rank hangs."""
    mesh, asked = on_device(monkeypatch, lambda: False)
    with pytest.raises(PeerSilent) as caught:
        mesh.await_device()
    assert caught.value is TOLD and asked == ["exchange of start on the device"]


@pytest.mark.parametrize("ends", ["done", "failed"])
def test_a_device_that_is_done_or_has_failed_is_left_to_who_reads_from_it(ends: str, monkeypatch: Patch) -> None:
    looks = iter([False, False, True])

    def query() -> bool:
        if ends == "failed":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return next(looks)

    mesh, asked = on_device(monkeypatch, query)
    mesh.await_device()
    assert not asked and list(looks) == [False, False, True] * (ends == "failed")


def test_a_step_looks_for_its_device_before_it_reads_from_it(monkeypatch: Patch) -> None:
    class Unread(Tensor):
        def tolist(self) -> Any:
            pytest.fail("read")

    mesh = Mesh(Placement.place(1, 1, 0), torch.device("cpu"))
    cohort = build(cohort_config("at", 1), mesh, nets(1))
    cohort.peers[0].reduced = lambda: torch.zeros(()).as_subclass(Unread)  # type: ignore[method-assign]
    before = state_hashes(cohort)

    def missing() -> None:
        raise TOLD

    monkeypatch.setattr(mesh, "await_device", missing)
    with pytest.raises(PeerSilent) as caught:
        one_step(cohort, 0)
    assert caught.value is TOLD and state_hashes(cohort) == before


def on_device(monkeypatch: Patch, query: Callable[[], bool]) -> tuple[Mesh, list[str]]:
    """A mesh of one rank that believes in a GPU, whose event answers so; what it asked its heartbeat to find out."""
    class Beat:
        work = ""

        def word(self, point: str) -> str:
            return ""

        def blame(self, what: str) -> MatError:
            asked.append(what)
            return TOLD

    class Stream:
        def record_event(self) -> Any:
            return type("Event", (), {"query": staticmethod(query)})

    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    return Mesh(Placement.place(1, 1, 0), torch.device("cuda"), beat=Beat(), timeout=0.05), asked  # type: ignore


@pytest.mark.parametrize("why", ["a rank is out", "a rank has failed in this work"])
def test_all_groups_of_a_rank_are_aborted_when_another_cannot_come_any_more(why: str, monkeypatch: Patch) -> None:
    """An abort can wait for another group's exchange: none waits for it, and the heart goes on."""
    monkeypatch.setattr("mat_dist.distributed.heartbeat.INTERVAL", 0.01)
    mesh, _, made = formed(monkeypatch, "nccl", 10)
    assert mesh.beat is not None
    used = [made[2], made[4]]  # rank 0's along both axes
    used[0].hanging = True
    mesh.beat.work = "step 3"
    assert not any(one.aborted.is_set() for one in made)
    told = {"code": 13, "what": "it broke", "where": "step 3", "how": "mend it"}
    (mesh.beat.report if why == "a rank is out" else mesh.beat.fail)(told)
    assert all(one.aborted.wait(10) for one in used)
    before, wait = mesh.beat._count, Wait(10)
    while mesh.beat._count < before + 2 and not wait.over():
        threading.Event().wait(0.01)
    mesh.beat.close()
    assert mesh.beat._count >= before + 2
