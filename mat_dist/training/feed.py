"""The batches of a rank, the next one made while a GPU is at work on this one."""

from __future__ import annotations

from typing import Any

from mat_dist.core.cohort import Cohort
from mat_dist.core.guard import Guard
from mat_dist.core.step import Batch, Compute, Computed
from mat_dist.data.batches import Batches
from mat_dist.distributed.agreement import Agreement


class Feed:
    """This rank's rows of each batch; an error on any rank reaches all.

    Args:
        replays: steps on each batch.
    """

    def __init__(self, cohort: Cohort, batches: Batches, replays: int = 1) -> None:
        self._cohort, self._batches, self._replays = cohort, batches, replays
        self._ahead: tuple[Agreement, Any] | None = None  # how the making went, and the batch

    def fetch(self, step: int) -> Batch:
        """The batch of a step."""
        if self._ahead is None or self._ahead[0].number != step:
            self._make(step)
        assert self._ahead is not None
        (agree, made), self._ahead = self._ahead, None
        if agree.failure is not None:
            agree.header("AEs")  # where the other ranks are; raises
        x_BCHW, y_B = made
        return Batch(x_BCHW, y_B, step, self._cohort.rows.start)

    def behind(self, compute: Compute) -> Compute:
        """`compute`, and behind it the next batch, which the device makes before the host waits for this step."""
        def both(cohort: Cohort, guard: Guard, batch: Batch, log: bool) -> Computed:
            found = compute(cohort, guard, batch, log)
            if batch.step + 1 != cohort.total_steps:
                self._make(batch.step + 1)
                guard.clock.lap("data")
            return found

        return both if self._cohort.mesh.device.type == "cuda" else compute

    def _make(self, step: int) -> None:
        agree = Agreement(self._cohort.mesh, f"step {step}", step)
        self._ahead = agree, agree.run("batch", self._batches.at, step // self._replays)
