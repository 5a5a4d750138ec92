"""A recorded step: graphs of what lies between two exchanges, and the exchanges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from mat_dist import rng
from mat_dist.core import step as steps
from mat_dist.core.cohort import Cohort
from mat_dist.core.guard import Guard
from mat_dist.core.optim import pace
from mat_dist.core.peer import Peer
from mat_dist.core.step import Batch, Computed
from mat_dist.models.modes import copy_all
from mat_dist.training.recorder import Graph, Recorder


class Meeting(NamedTuple):
    """An exchange between two graphs: what this rank sends, and where what all have sent goes."""

    point: str
    local: Tensor
    gathered: Tensor
    checksum: Callable[[], int]


@dataclass
class Tape:
    """A recorded step.

    Attributes:
        batch: the tensors and keys that its graphs read.
        events: graphs and exchanges, in order.
        found: what the step gives.
        gradients: of each trainable parameter.
        restorers: for `Cohort.rollback`.
    """

    batch: Batch
    events: list[Graph | Meeting] = field(default_factory=list)
    found: Computed | None = None
    gradients: list[tuple[torch.nn.Parameter, Tensor]] = field(default_factory=list)
    restorers: list[Callable[[], None]] = field(default_factory=list)

    @classmethod
    def record(cls, cohort: Cohort, batch: Batch, log: bool, recorder: Recorder) -> Tape:
        """The step of a batch, recorded; the cohort stays as it was. Raises anything where that is impossible."""
        keys = rng.KeyTable(batch.x_BCHW.device)
        tape = cls(replace(batch, x_BCHW=batch.x_BCHW.clone(), y_B=batch.y_B.clone(), keys=keys))
        guard = Guard(cohort.mesh, f"recording of step {batch.step}", batch.step)

        def meet(guard: Guard, point: str, local: Tensor, checksum: Callable[[], int]) -> Tensor:
            raise_kept(guard)
            place = cohort.mesh.placement
            if cohort.mesh.alone:
                return local
            tape.events.append(recorder.end())
            gathered = local.new_zeros(place.peer_ranks * len(local), *local.shape[1:])
            tape.events.append(Meeting(point, local, gathered, checksum))
            recorder.begin()
            return gathered

        guard.meet, guard.lanes = meet, recorder.lanes
        with _recording(cohort), recorder.scope():
            recorder.begin()
            found = steps.compute(cohort, guard, tape.batch, log)
            raise_kept(guard)
            tape.gradients = [(p, p.grad) for p in trainable(cohort) if p.grad is not None]
            tape.events.append(recorder.end())
            tape.found = found._replace(descend=[_recorded_update(peer, recorder) for peer in cohort.peers])
        tape.restorers = cohort.restorers
        return tape

    def play(self, cohort: Cohort, guard: Guard, batch: Batch,
             meet: Callable[[Meeting], Tensor] | None = None) -> Computed:
        """The step of another batch. `meet`: in place of the exchanges."""
        guard.run("inputs", self._fill, batch)
        for event in self.events:
            if isinstance(event, Meeting):
                gathered = meet(event) if meet else guard.exchange(event.point, event.local, event.checksum)
                guard.run(event.point, event.gathered.copy_, gathered)
            else:
                guard.run("graph", event.replay)
                if guard.failure is None:  # the first graph has kept the buffers
                    cohort.restorers = self.restorers
                guard.clock.lap("graph")
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        found = self.found
        assert found is not None
        # The next step writes to the same tensors, and a hook may keep what it gets.
        return found._replace(proposed=guard.run("proposals", tree_map_only, Tensor, torch.clone, found.proposed))

    def _fill(self, batch: Batch) -> None:
        assert self.batch.keys is not None
        self.batch.x_BCHW.copy_(batch.x_BCHW, non_blocking=True)
        self.batch.y_B.copy_(batch.y_B, non_blocking=True)
        self.batch.keys.fill(batch.step)


def _recorded_update(peer: Peer, recorder: Recorder) -> Callable[[float], None]:
    """A peer's optimizer step as a graph of its own, where it takes its rate from the device."""
    if peer.spec.frozen or not all(isinstance(group["lr"], Tensor) for group in peer.optimizer.param_groups):
        return peer.descend
    recorder.begin()
    peer.optimizer.step()
    graph = recorder.end()

    def descend(lr: float) -> None:
        pace(peer.optimizer, lr)
        graph.replay()

    return descend


def trainable(cohort: Cohort) -> list[torch.nn.Parameter]:
    return [p for peer in cohort.peers for p in peer.model.parameters() if p.requires_grad]


def raise_kept(guard: Guard) -> None:
    if guard.failure is not None:
        raise guard.failure


@contextmanager
def _recording(cohort: Cohort) -> Iterator[None]:
    """Peers do nothing that a recording forbids; afterwards they are as before, without gradients."""
    weights = trainable(cohort)
    before = [weight.detach().clone() for weight in weights]
    try:
        for peer in cohort.peers:
            peer.drawn, peer.attack_of_training.captured = rng.undrawn, True
        yield
    finally:
        for peer in cohort.peers:
            peer.drawn, peer.attack_of_training.captured = rng.keyed_rng, False
            peer.forget()
        # What a hook puts back has no values where a recording broke off.
        copy_all([weight.detach() for weight in weights], before)
