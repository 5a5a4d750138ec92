"""One training step of the cohort, the same code for every placement.

Letters: P peers, L of them on this rank, W views sent by a rank, S columns of the transfer table (the first view of
each peer, then the clean images), T views taught, B rows of this replica's (micro-)batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mat_dist.core.cohort import Cohort
from mat_dist.core.graph import View
from mat_dist.core.guard import Clock, Guard
from mat_dist.core.hooks import Views
from mat_dist.distributed.agreement import batch_checksum
from mat_dist.rng import Key, KeyTable


@dataclass(frozen=True)
class Batch:
    """This replica's rows of the clean batch, or a micro-batch of them; the same for all peers.

    Attributes:
        x_BCHW: images in [0, 1].
        y_B: labels, or mixed ones (B, K).
        step: 0-based number of the step; keys all randomness and schedules.
        first_row: row of the global batch at which these begin.
        parts: how many micro-batches make the step.
        keys: in a step that is captured, the keys that follow the step's number.
    """

    x_BCHW: Tensor
    y_B: Tensor
    step: int
    first_row: int = 0
    parts: int = 1
    keys: KeyTable | None = None

    def key(self, make: Callable[[int], int]) -> Key:
        """A key that is a function of the step's number."""
        return make(self.step) if self.keys is None else self.keys.slot(make)

    def draw(self, number: int) -> tuple[int, int, int]:
        """What keys the draws of a forward on the view of this number."""
        return self.step, number, self.first_row

    def split(self, parts: int) -> Iterator[Batch]:
        """Equal micro-batches, in order."""
        rows = len(self.x_BCHW) // parts
        for first in range(0, parts * rows, rows):
            yield replace(self, x_BCHW=self.x_BCHW[first:first + rows], y_B=self.y_B[first:first + rows],
                          first_row=self.first_row + first, parts=parts)

    def checksum(self) -> int:
        """A number that tells batches apart; 0 on a GPU, where it would have to be waited for."""
        return 0 if self.x_BCHW.is_cuda else int(batch_checksum(self.x_BCHW, self.y_B))


class Ask(NamedTuple):
    """What this rank asks of the others at the vote, or tells them: a stop after this step; whether it has written its
    part of a checkpoint."""

    stop: bool = False
    ready: bool = True


@dataclass
class Outcome:
    """What a committed step leaves behind.

    Attributes:
        stop: some rank was asked to stop after this step.
        ready: all ranks have written their part of the checkpoint under way.
        loss_P: each peer's loss; only at log steps.
        transfer_PS: share of each view's images that each peer labels correctly: rows students, columns the first view
            of each peer, last the clean images; train-mode logits on eval-mode AEs, so a diagnostic and not a robust
            accuracy. Only at log steps.
        seconds: host time by phase.
    """

    stop: bool = False
    ready: bool = True
    loss_P: Tensor | None = None
    transfer_PS: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class Learned(NamedTuple):
    """One micro-batch of the local peers: whether AEs and logits are finite (L, 2), losses (L,), accuracies (L, S)."""

    finite_L2: Tensor
    loss_L: Tensor
    correct_LS: Tensor


class Computed(NamedTuple):
    """What a step leaves for its vote.

    Attributes:
        told: int64 on the device: the batch's checksum where it lies there, else 0; then for each local peer whether
            AEs, logits, loss and gradient are finite.
        parts: the micro-batches.
        proposed: what each hook of each local peer would keep.
        descend: each local peer's optimizer step at a rate.
    """

    told: Tensor
    parts: list[Learned]
    proposed: list[list[Sequence[Tensor]]]
    descend: list[Callable[[float], None]]


# (cohort, guard, batch, log) -> what `compute` gives
Compute = Callable[[Cohort, Guard, Batch, bool], Computed]


def compute(cohort: Cohort, guard: Guard, batch: Batch, log: bool) -> Computed:
    """Everything of a step before its vote: gradients are in the parameters, and nothing else is changed but what
    `Cohort.rollback` restores."""
    guard.run("buffers", cohort.keep)
    parts = [learn(cohort, guard, part, log) for part in batch.split(cohort.accumulate)]
    guard.average("gradients", cohort.gradients)
    norms = guard.each("backward", lambda peer: peer.reduced(), cohort.peers)
    told = guard.run("finite check", told_at_vote, batch, parts, norms)
    return Computed(told, parts, guard.run("proposals", cohort.proposed), [peer.descend for peer in cohort.peers])


def train_step(cohort: Cohort, batch: Batch, *, log: bool = False, ask: Ask = Ask(),  # noqa: B008  a constant
               clock: Clock | None = None, compute: Compute = compute) -> Outcome:
    """Attack, exchange, learn, vote, update: every peer by one step, or none.

    Args:
        log: also compute losses and the transfer table (one more small exchange).
        clock: takes the times of the phases.
        compute: what does the work, this module's or one that has captured it.

    Raises:
        MatError: on all ranks with one text. No peer was changed.
    """
    guard = Guard(cohort.mesh, f"step {batch.step}", batch.step, clock, cohort.failure)
    with cohort.rollback():
        cohort.begin(guard, batch.step)
        found = compute(cohort, guard, batch, log)
        if guard.failure is None:
            guard.mesh.await_device()
        # A step's only wait for a GPU, whose errors show up here.
        checksum, *bits = guard.run("device", lambda: found.told.tolist()) or [0]
        guard.clock.lap("device")
        verdict = guard.vote(bits, stop=ask.stop, ready=ask.ready, checksum=checksum)
        guard.clock.lap("wait")
    cohort.update(guard, batch.step, found.proposed, found.descend)
    guard.clock.lap("optimizer")
    outcome = Outcome(verdict.stop, verdict.ready, seconds=guard.clock.seconds)
    if log:
        outcome.loss_P, outcome.transfer_PS = gather_records(cohort, found.parts)
        guard.clock.lap("log")
    return outcome


def learn(cohort: Cohort, guard: Guard, part: Batch, log: bool) -> Learned:
    """One micro-batch: AEs are made and travel, then logits; gradients are added to the parameters."""
    graph, peers = cohort.graph, cohort.peers

    guides = cohort.guides(guard, part)
    made = guard.each("attack", lambda peer, guide: peer.attack(part, cohort.makes(peer, log), guide), peers, guides)
    sent = guard.all_gather("AEs", lambda: cohort.packed(made, part, log), part.checksum)
    views: Views = guard.run("decoding", cohort.unpacked, sent, made, part, log)

    climbs = guard.each("attack", lambda peer: [hook.climb(part, views) for hook in peer.hooks], peers)
    guard.average("climb", lambda: [one for climb in climbs for tensors in climb for one in tensors], cohort.climbs)
    inputs = guard.each("forward", lambda peer, climb: peer.begin_learning(climb, views), peers, climbs)
    known = guard.each("forward", lambda peer, inputs: peer.forward(part, inputs, graph.taught[peer.index]),
                       peers, inputs)
    opinions = guard.each("forward", lambda peer, inputs, known: peer.opinions(
        part, inputs, known, graph.taught[peer.index]), peers, inputs, known)
    told = guard.all_gather("logits", lambda: cohort.told(opinions, known, part))
    counts = guard.each("forward", lambda peer, inputs, known: [
        hook.count(peer.row, partial(peer.constant, part, inputs, known), part.y_B) if cohort.counts else None
        for hook in peer.hooks], peers, inputs, known)
    guard.average("counts", lambda: [one for count in counts for one in count if one is not None], cohort.counts)

    def teaching(teacher: int, view: View) -> Tensor:
        return told[teacher, graph.position[teacher, view]]

    loss = guard.each("backward", lambda peer, inputs, known, count: peer.backward(
        part, inputs, known, teaching, count), peers, inputs, known, counts)
    return guard.run("records", lambda: Learned(
        torch.stack([torch.stack([all_finite(adv.values(), loss), all_finite(told or [*logits.values()][:1], loss)])
                     for adv, logits, told, loss in zip(made, known, opinions, loss, strict=True)]), torch.stack(loss),
        cohort.transfer(part, views, known) if log else torch.empty(0)))


def all_finite(tensors: Iterable[Tensor], like: Tensor) -> Tensor:
    """Whether all values of all tensors are finite -> bool scalar on the device of `like`."""
    found = torch.ones((), dtype=torch.bool, device=like.device)
    for tensor in tensors:
        found = found & tensor.detach().isfinite().all()
    return found


def told_at_vote(batch: Batch, parts: Sequence[Learned], norms: Sequence[Tensor]) -> Tensor:
    """`Computed.told`."""
    early = torch.stack([part.finite_L2 for part in parts]).all(0)
    loss = torch.stack([part.loss_L for part in parts]).isfinite().all(0)
    finite_L4 = torch.stack([early[:, 0], early[:, 1], loss, torch.stack(list(norms)).isfinite()], dim=1)
    checksum = batch_checksum(batch.x_BCHW, batch.y_B) if batch.x_BCHW.is_cuda else early.new_zeros(())
    return torch.cat([checksum.long()[None], finite_L4.long().reshape(-1)])


def gather_records(cohort: Cohort, parts: Sequence[Learned]) -> tuple[Tensor, Tensor]:
    """Loss (P,) and transfer table (P, S) of all peers, averaged over micro-batches and replicas."""
    loss_L = torch.stack([part.loss_L for part in parts]).mean(0)
    correct_LS = torch.stack([part.correct_LS for part in parts]).mean(0)
    told = torch.cat([loss_L[:, None].float(), correct_LS.float()], dim=1)
    cohort.mesh.average_replicas([told])
    told_P = cohort.mesh.gather_peers(told)
    return told_P[:, 0], told_P[:, 1:]
