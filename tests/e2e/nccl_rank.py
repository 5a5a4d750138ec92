"""The one rank of an NCCL group: `python -m tests.e2e.nccl_rank` prints how each claim about it ended, in JSON.

A process of its own, since what goes wrong in NCCL ends the process, or never ends."""

from __future__ import annotations

import faulthandler
import json
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from mat_dist.core.cohort import Cohort
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.placement import Placement
from mat_dist.training.capture import captured_steps
from tests.cohorts import batch, build, cohort_config, largest_difference, nets, one_step

TWO_PEERS = Placement.place(2, 1, 0)
WATCHDOG = 0.1  # seconds between two looks of NCCL's watchdog thread at the exchanges that it does not know to be over
PATIENCE = 60  # seconds after which this process says where it hangs, and ends


def captured(mesh: Mesh, work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """`work` as a graph, captured right after exchanges of which the watchdog does not know yet that they are over."""
    work()  # CUDA loads kernels, and NCCL connects, when they are first used
    for _ in range(20):
        mesh.gather_peers(torch.ones(2, 3, device=mesh.device))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()
    return graph, result


def a_graph_is_captured_while_the_watchdog_looks_at_exchanges(mesh: Mesh) -> None:
    x = torch.ones(2, 3, device=mesh.device)

    def work() -> Tensor:
        twice = x * 2
        time.sleep(4 * WATCHDOG)
        return twice + 1

    graph, result = captured(mesh, work)
    x.fill_(5)
    graph.replay()
    assert result.tolist() == [[11] * 3] * 2


def an_exchange_inside_a_graph_sends_what_is_there_at_each_replay(mesh: Mesh) -> None:
    x = torch.ones(2, 3, device=mesh.device)
    graph, result = captured(mesh, lambda: mesh.gather_peers(x * 2) + 1)
    for value in (5, 6):
        x.fill_(value)
        graph.replay()
        assert result.tolist() == [[2 * value + 1] * 3] * 2
    torch.cuda.synchronize()
    graph.reset()  # NCCL does not end a group whose exchanges are in a graph that is still alive


def an_exchange_between_two_graphs_waits_for_one_and_is_waited_for_by_the_other(mesh: Mesh) -> None:
    x = torch.ones(2, 1 << 20, device=mesh.device)
    fixed = torch.empty_like(x)
    before, sent = captured(mesh, lambda: x * 2)
    after, result = captured(mesh, lambda: fixed + 1)
    for value in range(10):
        x.fill_(value)
        before.replay()
        fixed.copy_(mesh.gather_peers(sent))
        after.replay()
        assert bool((result == 2 * value + 1).all())


def an_average_over_one_replica_is_what_it_was(mesh: Mesh) -> None:
    tensors = [torch.full((3,), 2.0, device=mesh.device), torch.full((2, 2), 3.0, device=mesh.device)]
    Mesh(TWO_PEERS, mesh.device, replica=dist.group.WORLD).average_replicas(tensors)
    assert [one.unique().tolist() for one in tensors] == [[2], [3]]


def captured_steps_are_those_without_nccl(mesh: Mesh) -> None:
    models = [model.to(mesh.device) for model in nets(2, dtype=torch.float64)]
    notes: list[str] = []

    def data(step: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, y = batch(step, rows, dtype)
        return x.to(mesh.device), y.to(mesh.device)

    def trained(mesh: Mesh, engine: str) -> Cohort:
        config = cohort_config("mat", 2, norm="l2", eps=0.5, step={"engine": engine, "precision": "fp64"})
        cohort = build(config, mesh, models)
        compute = captured_steps(cohort, notes.append)
        for step in range(7):
            one_step(cohort, step, data=data, compute=compute)
        return cohort

    with_nccl, alone = trained(mesh, "graph"), trained(Mesh(TWO_PEERS, mesh.device), "eager")
    assert notes == [] and [peer.notes for peer in with_nccl.peers] == [[], []]
    assert largest_difference([with_nccl], [alone]) < 1e-9


CLAIMS = {claim.__name__: claim for claim in (
    a_graph_is_captured_while_the_watchdog_looks_at_exchanges,
    an_exchange_inside_a_graph_sends_what_is_there_at_each_replay,
    an_exchange_between_two_graphs_waits_for_one_and_is_waited_for_by_the_other,
    an_average_over_one_replica_is_what_it_was,
    captured_steps_are_those_without_nccl)}
DESTROY = "a_group_that_was_used_in_and_beside_graphs_is_left"


def tell(claim: str, ended: str) -> None:
    print(json.dumps([claim, ended]), flush=True)


def main() -> None:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, timeout=timedelta(seconds=30))
    mesh = Mesh(TWO_PEERS, device, peer=dist.group.WORLD)
    for name, claim in CLAIMS.items():
        try:
            claim(mesh)
            torch.cuda.synchronize()
        except Exception as error:
            tell(name, f"{type(error).__name__}: {error}")
        else:
            tell(name, "")
    dist.destroy_process_group()
    tell(DESTROY, "")


if __name__ == "__main__":
    main()
