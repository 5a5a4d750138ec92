"""Batches that are made a step ahead, as on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mat_dist.core.cohort import Cohort
from mat_dist.core.step import compute, train_step
from mat_dist.distributed.groups import Mesh
from mat_dist.errors import MatError, NonFinite
from mat_dist.training.feed import Feed
from tests.cohorts import BATCH, batch, broken, build, cohort_config, exploding, hashes, nets, one_step

Run = Callable[..., list[Any]]


class Batches:
    """Makes the batch of a number, and notes it."""

    def __init__(self, broken_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.broken_at = broken_at

    def at(self, number: int) -> tuple[Tensor, Tensor]:
        self.asked.append(number)
        return broken() if number == self.broken_at else batch(number, BATCH)  # type: ignore[no-any-return]


def feed_of(cohort: Cohort, batches: Batches, replays: int = 1) -> tuple[Feed, Any]:
    """A feed that makes batches ahead though there is no GPU, and its `compute`."""
    feed = Feed(cohort, batches, replays)  # type: ignore[arg-type]
    cohort.mesh.device = torch.device("cuda")
    work, cohort.mesh.device = feed.behind(compute), torch.device("cpu")
    return feed, work


@pytest.mark.parametrize("replays", [1, 2])
def test_each_batch_is_made_once_a_step_whatever_becomes_of_the_step(replays: int, run_ranks: Run) -> None:
    """None is made behind the last step; the one behind a refused step is used, one for another step is not."""
    models = nets(2)

    def both(mesh: Mesh) -> tuple[list[Cohort], list[int]]:
        plain, ahead = (build(cohort_config("mat", 2), mesh, models) for _ in range(2))
        batches = Batches()
        feed, work = feed_of(ahead, batches, replays)
        plain.total_steps = ahead.total_steps = 6
        for step in (0, 1, 2, 4, 5):
            learn = ahead.peers[0].learn
            if step == 1:
                exploding(ahead.peers[0])
                with pytest.raises(NonFinite):
                    train_step(ahead, feed.fetch(step), compute=work)
                ahead.peers[0].learn = learn  # type: ignore[method-assign]
                continue
            train_step(ahead, feed.fetch(step), compute=work)
            one_step(plain, step, data=lambda step, *given: batch(step // replays, *given))
        return [plain, ahead], batches.asked

    (((plain, ahead), asked),) = run_ranks(both, 2, 1)
    assert asked == [step // replays for step in (0, 1, 2, 3, 4, 5)]
    assert hashes([plain]) == hashes([ahead])


def test_an_error_ahead_ends_the_step_that_needs_the_batch_on_all_ranks(run_ranks: Run) -> None:
    models = nets(2)

    def failing(mesh: Mesh) -> tuple[int, str]:
        cohort = build(cohort_config("mat", 2), mesh, models)
        feed, work = feed_of(cohort, Batches(2 if mesh.placement.rank == 1 else None))
        done = 0
        with pytest.raises(MatError) as caught:
            for step in range(4):
                train_step(cohort, feed.fetch(step), compute=work)
                done += 1
        return done, str(caught.value)

    one, other = run_ranks(failing, 2, 2)
    assert one == other and one[0] == 2 and "step 2, batch, rank 1" in one[1]
