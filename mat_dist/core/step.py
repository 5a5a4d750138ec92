"""One training step of the cohort, the same code for every placement.

Letters: P peers, L of them on this rank, S slots (the AEs of each source peer, then the clean images),
T slots taught, B rows of this replica's (micro-)batch, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from mat_dist.attacks import compression
from mat_dist.core import learning
from mat_dist.core.cohort import Cohort
from mat_dist.core.opinions import AllLogits, Opinions, SummedProbabilities, softened
from mat_dist.core.peer import Peer
from mat_dist.distributed.agreement import Agreement, batch_checksum


@dataclass
class Outcome:
    """What a committed step leaves behind.

    Attributes:
        stop: some rank was asked to stop after this step.
        ready: all ranks have written their part of the checkpoint under way.
        loss_P: each peer's loss; only at log steps.
        transfer_PS: share of each slot's images that each peer labels correctly: rows students, columns the
            AEs of each source, last the clean images; train-mode logits on eval-mode AEs, so a diagnostic and
            not a robust accuracy. Only at log steps.
        seconds: host time by phase.
    """

    stop: bool = False
    ready: bool = True
    loss_P: Tensor | None = None
    transfer_PS: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class Clock:
    """Host seconds by phase; `wait` is what headers cost, most of it waiting for the slowest rank."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, phase: str) -> None:
        """Charge the time since the last lap to `phase`."""
        now = perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def train_step(cohort: Cohort, x_BCHW: Tensor, y_B: Tensor, step: int, *, log: bool = False, stop: bool = False,
               ready: bool = True, clock: Clock | None = None) -> Outcome:
    """Attack, exchange, learn, agree, update: every peer by one step, or none.

    Args:
        x_BCHW: this replica's rows of the clean batch, in [0, 1]; the same for all peers.
        y_B: labels.
        step: 0-based number of the step; keys all randomness and schedules.
        log: also compute losses and the transfer table (one more small exchange).
        stop: a signal asked this rank to stop; the vote tells all.
        ready: this rank has written its part of a checkpoint; the vote tells whether all have.
        clock: takes the times of the phases; the benchmark hands in one that waits for the device.

    Raises:
        MatError: on all ranks with one text. No peer was changed.
    """
    agree, clock = Agreement(cohort.mesh, f"step {step}", step), clock or Clock()
    parts = cohort.step.microbatches
    rows = len(x_BCHW) // parts
    with cohort.kept_if_refused():
        shares = [_share(cohort, agree, clock, x_BCHW[n * rows:(n + 1) * rows], y_B[n * rows:(n + 1) * rows], step,
                         cohort.rows.start + n * rows, log) for n in range(parts)]
        norms = _reduce_gradients(cohort, agree)
        clock.lap("backward")
        finite = agree.run("finite check", _finite_L4, shares, norms)
        checksum = agree.run("checksum", lambda: int(batch_checksum(x_BCHW, y_B)) if x_BCHW.is_cuda else 0) or 0
        verdict = agree.vote(finite, stop=stop, ready=ready, checksum=checksum)
        outcome = Outcome(stop=verdict.stop, ready=verdict.ready)
        clock.lap("wait")
    cohort.update(step)
    clock.lap("optimizer")
    if log:
        outcome.loss_P, outcome.transfer_PS = _gather_records(cohort, shares)
        clock.lap("log")
    outcome.seconds = clock.seconds
    return outcome


@dataclass
class _Share:
    """One micro-batch: finite bits of AEs and logits, losses, accuracies of the local peers."""

    finite_L2: Tensor
    loss_L: Tensor
    correct_LS: Tensor


def _share(cohort: Cohort, agree: Agreement, clock: Clock, x_BCHW: Tensor, y_B: Tensor, step: int, first_row: int,
           log: bool) -> _Share:
    """Steps 1 to 6 for one micro-batch: gradients are added to the parameters."""
    mesh, plan, peers = cohort.mesh, cohort.plan, cohort.peers

    # 1 own AEs, of guided attacks after an exchange of what teachers think of the clean images
    aes, private = _crafted(cohort, agree, x_BCHW, y_B, step, first_row, log)
    aes_LBCHW = agree.run("attack", torch.stack, aes)
    clock.lap("attack")

    # 2 exchange of AEs
    checksum = agree.run("checksum", lambda: 0 if x_BCHW.is_cuda else int(batch_checksum(x_BCHW, y_B))) or 0
    sent_L = agree.run("encoding", compression.encode_all, cohort.step.wire, aes_LBCHW,
                       [x_BCHW[plan.part(peer.index, step)] for peer in peers])
    agree.header("AEs", sent_L, checksum)
    clock.lap("wait")
    everyones = plan.shares_aes or log
    sent = mesh.gather_peers(sent_L) if everyones else sent_L
    inputs_S = agree.run("decoding", _inputs, cohort, sent, x_BCHW, everyones, step)
    inputs_LS = [agree.run("inputs", lambda p=p, own=own: p.sees([*inputs_S, *own]))
                 for p, own in zip(peers, private, strict=True)]
    clock.lap("exchange")

    # 3 logits on every source that a peer learns from or teaches on
    known = [agree.run(f"forward of {p.name}", learning.forward, cohort, p, inputs, step, first_row)
             for p, inputs in zip(peers, inputs_LS, strict=True)]
    taught_LTBK = agree.run("forward", learning.taught, cohort, known, inputs_LS, y_B)
    clock.lap("forward")

    # 4 exchange of logits
    told = agree.run("teaching", _told, cohort, taught_LTBK)
    counts_L = agree.run("counting", _paired, cohort, known, inputs_LS, y_B, step, first_row)
    agree.header("logits", told)
    clock.lap("wait")
    opinions = _exchanged(cohort, told)
    rights = _over_replicas(cohort, counts_L)
    clock.lap("exchange")

    # 5, 6 losses and gradients
    loss = [agree.run(f"backward of {p.name}", learning.backward, cohort, p, logits, inputs, opinions, y_B, step,
                      first_row, right)
            for p, logits, inputs, right in zip(peers, known, inputs_LS, rights, strict=True)]
    for peer in peers:
        agree.run(f"natural gradient of {peer.name}", peer.learn_naturally, x_BCHW, y_B, step, first_row,
                  1 / cohort.step.microbatches)
    correct_LS = torch.empty(0)
    if log:
        correct_LS = agree.run("transfer table", learning.transfer, cohort, known, inputs_S, y_B, step, first_row)
    clock.lap("backward")
    finite_L2 = agree.run("finite check", lambda: torch.stack([
        torch.stack([a.isfinite().all(), t.isfinite().all()]) for a, t in zip(aes_LBCHW, taught_LTBK, strict=True)]))
    return _Share(finite_L2, agree.run("loss", torch.stack, loss), correct_LS)


def _crafted(cohort: Cohort, agree: Agreement, x_BCHW: Tensor, y_B: Tensor, step: int, first_row: int,
             log: bool) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Each local peer's AEs, and those for the other threats of its union; then AWP moves its weights."""
    for peer in cohort.peers:
        peer.restore()  # of the micro-batch before
    guides_L = _guides(cohort, agree, x_BCHW, step, first_row)
    aes = [agree.run(f"attack of {p.name}", _attack, cohort, p, x_BCHW, y_B, step, first_row, guide, log)
           for p, guide in zip(cohort.peers, guides_L, strict=True)]
    private = [agree.run(f"attack of {p.name}", p.attack_others, x_BCHW, y_B, step, first_row) for p in cohort.peers]
    climbs = [agree.run(f"weight perturbation of {p.name}", p.uphill, adv_BCHW, x_BCHW, y_B, step, first_row)
              for p, adv_BCHW in zip(cohort.peers, aes, strict=True)]
    if cohort.perturbs and cohort.mesh.placement.replicas > 1:
        agree.header("weight perturbation")
        cohort.mesh.average_replicas([g for gradients in climbs for g in gradients])
    for peer, gradients in zip(cohort.peers, climbs, strict=True):
        agree.run(f"weight perturbation of {peer.name}", peer.perturb, gradients)
    return aes, private


def _guides(cohort: Cohort, agree: Agreement, x_BCHW: Tensor, step: int, first_row: int) -> list[Tensor | None]:
    """For each local peer the log of its guides' mean probability on the clean images, (B, K); None where unused."""
    guided = cohort.plan.guided
    if not any(guided):
        return [None] * len(cohort.peers)
    clean = len(cohort.threats)
    told = [agree.run(f"guidance of {p.name}", p.teach, x_BCHW, (step, clean, first_row)) for p in cohort.peers]
    told_LBK = agree.run("guidance", torch.stack, told)
    agree.header("guidance", told_LBK)
    log_PBK = cohort.mesh.gather_peers(told_LBK).log_softmax(-1)
    return [torch.stack([log_PBK[i] for i in guided[p.index]]).logsumexp(0) if guided[p.index] else None
            for p in cohort.peers]


def _attack(cohort: Cohort, peer: Peer, x_BCHW: Tensor, y_B: Tensor, step: int, first_row: int,
            guide_BK: Tensor | None, log: bool) -> Tensor:
    """The peer's AEs, of its part of the batch where that is split; the clean images where nobody would use them.

    A part has every P-th row; its noise is that of the rows first_row / P, first_row / P + 1, ...
    """
    part = cohort.plan.part(peer.index, step)
    if not (cohort.plan.crafts[peer.index] or log):
        return x_BCHW[part]
    return peer.attack(x_BCHW[part], y_B[part], step, first_row // cohort.plan.makers,
                       None if guide_BK is None else guide_BK[part])


def _inputs(cohort: Cohort, sent: Tensor, x_BCHW: Tensor, everyones: bool, step: int) -> list[Tensor]:
    """The images of each slot: the AEs by source, then the clean ones.

    Where no peer needs another one's AEs only the own ones were sent; the other slots are empty. Of a split batch all
    slots hold the whole, put together from everybody's part.
    """
    plan = cohort.plan
    sources = range(len(cohort.threats)) if everyones else [peer.index for peer in cohort.peers]
    slots = [x_BCHW.new_empty(0)] * len(cohort.threats)
    for source, one in zip(sources, sent, strict=True):
        slots[source] = compression.decode(cohort.step.wire, one, x_BCHW[plan.part(source, step)],
                                           cohort.threats[source])
    if plan.split:
        whole = torch.empty_like(x_BCHW)
        for source in sources:
            whole[plan.part(source, step)] = slots[source]
        slots = [whole] * len(slots)
    return [*slots, x_BCHW]


def _told(cohort: Cohort, taught_LTBK: Tensor) -> Tensor:
    """What this rank tells the others of its peers' logits: these, or (opinions: summed) what they add up to."""
    if cohort.step.opinions == "all" or cohort.plan.most_taught == 0:
        return taught_LTBK
    return softened(taught_LTBK, cohort.plan.peers[0].loss.temperature).sum(0)


def _exchanged(cohort: Cohort, told: Tensor) -> Opinions:
    """The opinions of all peers."""
    if cohort.plan.most_taught == 0:
        return AllLogits(told, {})
    if cohort.step.opinions == "all":
        return AllLogits(cohort.mesh.gather_peers(told), cohort.plan.position)
    return SummedProbabilities(cohort.mesh.sum_peers(told), cohort.plan.position)


def _paired(cohort: Cohort, known: list[dict[int, Tensor]], inputs_LS: list[list[Tensor]], y_B: Tensor, step: int,
            first_row: int) -> Tensor | None:
    """What replicas must count together: the images that RAMP averages over; None where each batch is a whole one."""
    if cohort.mesh.placement.replicas == 1 or not any(row.ramp for row in cohort.plan.peers):
        return None
    return learning.right_L(cohort, known, inputs_LS, y_B, step, first_row)


def _over_replicas(cohort: Cohort, counts_L: Tensor | None) -> Sequence[Tensor | None]:
    """The counts of each local peer, mean over replicas: gradients are averaged over them."""
    if counts_L is None:
        return [None] * len(cohort.peers)
    cohort.mesh.average_replicas([counts_L])
    return counts_L.clamp(min=1 / cohort.mesh.placement.replicas).unbind()


def _gather_records(cohort: Cohort, shares: list[_Share]) -> tuple[Tensor, Tensor]:
    """Loss (P,) and transfer table (P, S) of all peers, averaged over micro-batches and replicas."""
    loss_L = torch.stack([s.loss_L for s in shares]).mean(0)
    correct_LS = torch.stack([s.correct_LS for s in shares]).mean(0)
    told = torch.cat([loss_L[:, None].float(), correct_LS.float()], dim=1)
    cohort.mesh.average_replicas([told])
    told_P = cohort.mesh.gather_peers(told)
    return told_P[:, 0], told_P[:, 1:]


def _reduce_gradients(cohort: Cohort, agree: Agreement) -> list[Tensor]:
    """Mean gradient over replicas, projected, clipped -> its norm for each local peer."""
    if cohort.mesh.placement.replicas > 1:
        agree.header("gradients")  # a replica that failed must not be missing in the all-reduce
        cohort.mesh.average_replicas([g for p in cohort.peers for g in (*p.gradients(), *p.natural.parts)])
    for peer in cohort.peers:
        agree.run(f"projection of {peer.name}", lambda p=peer: p.natural.project(p.gradients()))
    return [agree.run(f"gradient of {p.name}", p.clip) for p in cohort.peers]


def _finite_L4(shares: list[_Share], norms: list[Tensor]) -> Tensor:
    """AEs, logits, loss and gradient of each local peer: all finite? -> bool (L, 4)."""
    early = torch.stack([s.finite_L2 for s in shares]).all(0)
    loss = torch.stack([s.loss_L for s in shares]).isfinite().all(0)
    return torch.stack([early[:, 0], early[:, 1], loss, torch.stack(norms).isfinite()], dim=1)
