"""What a rank computes alone in a step: forwards on all sources, what its peers teach, losses and gradients.

Letters as in step.py. Nothing here talks to another rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mat_dist.attacks.crafter import free_memory
from mat_dist.core.cohort import Cohort
from mat_dist.core.losses import accuracy
from mat_dist.core.opinions import Opinions
from mat_dist.core.peer import Peer
from mat_dist.models.classifier import DTYPES
from mat_dist.models.modes import synchronised


def forward(cohort: Cohort, peer: Peer, inputs_S: list[Tensor], step: int, first_row: int) -> dict[int, Tensor]:
    """The peer's logits by slot: with graph where it learns (memory: keep), without where it only teaches."""
    plan = cohort.plan.peers[peer.index]
    known: dict[int, Tensor] = {}
    if not peer.recomputes:
        try:
            known = _learn(cohort, peer, plan.learned, inputs_S, step, first_row)
        except torch.OutOfMemoryError:
            _fall_back(cohort, peer)
    for slot in cohort.plan.taught[peer.index]:
        if slot not in known and cohort.step.teachers == "raw":
            known[slot] = peer.teach(inputs_S[slot], (step, slot, first_row))
    return known


def _fall_back(cohort: Cohort, peer: Peer) -> None:
    """After the first lack of memory a peer goes on with memory: recompute, which gives the same weights.

    Not in the middle of micro-batches, whose gradients would be lost, nor with bn: joint, nor with batch norm that
    replicas synchronise: forwards that one of them repeats would meet other forwards of the others. Call it in the
    handler of the error, which it raises again where it cannot help.
    """
    if cohort.step.microbatches > 1 or cohort.step.bn == "joint" or peer.recomputes or synchronised(peer.model):
        raise
    peer.recomputes = True
    peer.notes.append(f"warning: memory ran out in the forwards of {peer.name}: it goes on with memory: recompute, "
                      "which gives the same weights; step.memory=recompute avoids this")
    cohort.give_back(peer)
    free_memory()


def _learn(cohort: Cohort, peer: Peer, slots: tuple[int, ...], inputs_S: list[Tensor], step: int,
           first_row: int) -> dict[int, Tensor]:
    """Train-mode logits with graph: a forward per slot, or one for all (bn: joint)."""
    if cohort.step.bn == "joint" and len(slots) > 1:
        together = peer.learn(torch.cat([inputs_S[s] for s in slots]), (step, -1, first_row))
        return dict(zip(slots, together.chunk(len(slots)), strict=True))
    return {slot: peer.learn(inputs_S[slot], (step, slot, first_row)) for slot in slots}


def taught(cohort: Cohort, known: list[dict[int, Tensor]], inputs_LS: list[list[Tensor]], y_B: Tensor) -> Tensor:
    """What the local peers teach, detached -> (L, T, B, K), zeros where a peer teaches less than T slots.

    (L,) if nobody teaches.
    """
    most = cohort.plan.most_taught
    if most == 0:
        # Nothing travels. One number per peer, of the same shape whether it recomputes or not, still tells the
        # finite check of NaN and infinity.
        nothing = torch.zeros((), dtype=DTYPES[cohort.step.precision], device=y_B.device)
        return torch.stack([_any([logits]).detach().abs().amax() if logits else nothing for logits in known])
    rows = []
    for peer, logits, inputs in zip(cohort.peers, known, inputs_LS, strict=True):
        slots, averaged = cohort.plan.taught[peer.index], cohort.step.teachers == "ema"
        own = [peer.teach_averaged(inputs[slot]) if averaged else logits[slot].detach() for slot in slots]
        like = own[0] if own else _any(known) if any(known) else peer.teach_averaged(inputs[len(cohort.threats)])
        rows.append(torch.stack(own + [torch.zeros_like(like) for _ in range(most - len(own))]))
    return torch.stack(rows)


def _any(known: list[dict[int, Tensor]]) -> Tensor:
    return next(t for logits in known for t in logits.values())


def right_L(cohort: Cohort, known: list[dict[int, Tensor]], inputs_LS: list[list[Tensor]], y_B: Tensor, step: int,
            first_row: int) -> Tensor:
    """How many images RAMP pairs in each local peer -> (L,), in float64; 0 where it pairs none.

    What `memory: recompute` has not forwarded yet is, without a trace.
    """
    counts = []
    for peer, logits, inputs in zip(cohort.peers, known, inputs_LS, strict=True):
        pair, right_B = cohort.plan.peers[peer.index].ramp, torch.zeros(1, device=y_B.device)
        if pair is not None:
            told = logits.get(pair[0])
            told = peer.teach(inputs[pair[0]], (step, pair[0], first_row)) if told is None else told
            right_B = told.argmax(-1) == y_B
        counts.append(right_B.sum().double())
    return torch.stack(counts)


def backward(cohort: Cohort, peer: Peer, known: dict[int, Tensor], inputs_S: list[Tensor], opinions: Opinions,
              y_B: Tensor, step: int, first_row: int, right: Tensor | None = None) -> Tensor:
    """Add the gradient of the peer's loss -> the loss, detached.

    Args:
        right: see `objective.partial_loss`.
    """
    plan = cohort.plan.peers[peer.index]

    def add_gradient() -> Tensor:
        recomputes = peer.recomputes
        total = torch.zeros((), dtype=inputs_S[-1].dtype, device=y_B.device)
        for slots in plan.groups() if recomputes else [plan.learned]:
            if not slots:
                continue
            logits = _learn(cohort, peer, slots, inputs_S, step, first_row) if recomputes else known
            loss = peer.loss(slots, logits, opinions, y_B, right)
            if plan.drawn in slots and plan.me.strategy == "eat":
                peer.right.append((logits[plan.drawn].detach().argmax(-1) == y_B).sum())
            (loss / cohort.step.microbatches).backward()
            total += loss.detach()
        return total

    try:
        total = add_gradient()
    except torch.OutOfMemoryError:
        known.clear()
        _fall_back(cohort, peer)
        peer.right, inputs_S[peer.index].grad = [], None
        total = add_gradient()
    peer.climb(inputs_S, step, first_row)
    return total


def transfer(cohort: Cohort, known: list[dict[int, Tensor]], inputs_S: list[Tensor], y_B: Tensor, step: int,
              first_row: int) -> Tensor:
    """Accuracy of the local peers on every slot -> (L, S); slots that were not forwarded are, without a trace.

    Of a split batch, whose slots are all the same, on the rows that each source has made.
    """
    plan, clean = cohort.plan, len(inputs_S) - 1

    def logits_of(peer: Peer, known: dict[int, Tensor], s: int) -> Tensor:
        return known[s].detach() if s in known else peer.teach(inputs_S[s], (step, s, first_row))

    table = []
    for peer, logits in zip(cohort.peers, known, strict=True):
        if plan.split:
            own_BK, parts = logits_of(peer, logits, peer.index), [plan.part(s, step) for s in range(clean)]
            row = [*(accuracy(own_BK[part], y_B[part]) for part in parts),
                   accuracy(logits_of(peer, logits, clean), y_B)]
        else:
            row = [accuracy(logits_of(peer, logits, s), y_B) for s in range(len(inputs_S))]
        table.append(torch.stack(row))
    return torch.stack(table)
