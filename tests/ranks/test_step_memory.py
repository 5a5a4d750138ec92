"""What a step does when the memory of the device runs out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mat_dist.core.cohort import Cohort
from mat_dist.core.step import train_step
from mat_dist.distributed.groups import Mesh
from tests.cohorts import BATCH, batch, build, cohort_config, largest_difference, nets, train

Run = Callable[..., list[Any]]


@pytest.mark.parametrize("where", ["attack", "forward", "backward"])
@pytest.mark.parametrize("preset,world", [("mat", 2), ("at", 2), ("at", 1)])
def test_lack_of_memory_is_met_once_with_equal_weights_and_then_stops_all(
        where: str, preset: str, world: int, run_ranks: Run) -> None:
    models = nets(2, dtype=torch.float64)
    config = cohort_config(preset, 2, step={"precision": "fp64"})
    plain = run_ranks(lambda mesh: train(config, mesh, models, 3, dtype=torch.float64), 2, world)

    def short_of_memory(peer: Any, always: bool) -> None:
        def failing(f: Callable[..., Any], fails: Callable[[Any], bool]) -> Callable[..., Any]:
            calls = []
            def once(*args: Any) -> Any:
                if fails(args) and (always or not calls):
                    calls.append(1)
                    raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
                return f(*args)
            return once
        if where == "attack":
            peer.crafter.craft = failing(peer.crafter.craft, lambda args: always or len(args[1]) == BATCH)
        if where == "forward":
            peer.learn = failing(peer.learn, lambda args: True)
        if where == "backward":  # the graph ends in a node that fails
            def learn(x: torch.Tensor, draw: Any, f: Any = peer.learn, state: list[int] = []) -> torch.Tensor:  # noqa: B006
                z = f(x, draw)
                def hook(g: torch.Tensor) -> None:
                    if always or not state:
                        state.append(1)
                        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
                z.register_hook(hook)
                return z
            peer.learn = learn

    def one(mesh: Mesh, always: bool) -> Cohort:
        cohort = build(config, mesh, models)
        for peer in cohort.peers:
            if peer.index == 1:
                short_of_memory(peer, always)
        for step in range(3):
            x, y = batch(step, dtype=torch.float64)
            train_step(cohort, x, y, step)
        return cohort

    assert largest_difference(plain, run_ranks(lambda mesh: one(mesh, False), 2, world)) < 1e-11
    errors = run_ranks(lambda mesh: one(mesh, True), 2, world, errors="return")
    assert len({str(e) for e in errors}) == 1 and "step.microbatches" in str(errors[0]) and "peer1" in str(errors[0])


def test_a_replica_does_not_call_synchronised_norms_more_often_than_the_others(run_ranks: Run) -> None:
    """What `recompute` calls again would meet other calls of the other replicas: wrong statistics, or none ever."""
    def one(mesh: Mesh) -> None:
        cohort = build(config, mesh, models)
        (peer,) = cohort.peers
        peer.model = nn.SyncBatchNorm.convert_sync_batchnorm(peer.model)
        learn, calls = peer.learn, []

        def short(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == 1:
                raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
            return learn(*args)

        peer.learn = short  # type: ignore[method-assign]
        try:
            train_step(cohort, *batch(0), 0)
        finally:
            assert len(calls) == 1 and not peer.recomputes

    config, models = cohort_config("at", 1), nets(1)
    (error,) = run_ranks(one, 1, 1, errors="return")
    assert "tried to allocate" in str(error) and "step.memory=recompute" in str(error)
