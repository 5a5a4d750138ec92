"""The mutual loss of one peer: its plan's weights times the terms of `losses`. Formula: docs/method.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mat_dist.core import losses
from mat_dist.core.graph import PeerPlan
from mat_dist.core.opinions import Opinions, Terms


def partial_loss(plan: PeerPlan, slots: Sequence[int], logits: Mapping[int, Tensor], opinions: Opinions,
                 y_B: Tensor, right: Tensor | None = None) -> Tensor:
    """The terms of the loss that belong to `slots`, a union of the plan's groups -> scalar.

    Args:
        logits: this peer's logits_BK on each of `slots`, with graph.
        opinions: of all peers.
        y_B: labels.
        right: how many images RAMP's pairing averages over, mean over replicas; default: counted in this batch.
    """
    total = torch.zeros((), dtype=next(iter(logits.values())).dtype, device=y_B.device)
    for slot in slots:
        if plan.hard.get(slot) and slot not in plan.rivals:
            total = total + plan.loss.base_scale * plan.hard[slot] * _hard(plan, slot, logits[slot], y_B)
        total = total + _distilled(plan, slot, logits[slot], opinions, y_B)
    if plan.paired and plan.source in slots:
        total = total + plan.loss.base_scale * _paired(plan, logits[plan.clean], logits[plan.source], y_B)
    if plan.rivals and plan.rivals[0] in slots:
        total = total + plan.loss.base_scale * _union(plan, logits, y_B, right)
    return total


def own_loss(plan: PeerPlan, logits: Mapping[int, Tensor], y_B: Tensor) -> Tensor:
    """What the peer would lose if it were alone: hard labels on its own AEs and the clean images, and their pairing.

    Args:
        logits: on the slots `own_slots`.
    """
    total = torch.zeros((), dtype=next(iter(logits.values())).dtype, device=y_B.device)
    for slot, logits_BK in logits.items():
        if plan.hard.get(slot):
            total = total + plan.hard[slot] * _hard(plan, slot, logits_BK, y_B)
    if plan.paired:
        total = total + _paired(plan, logits[plan.clean], logits[plan.index], y_B)
    return total


def own_slots(plan: PeerPlan) -> tuple[int, ...]:
    """The slots of `own_loss`; none where the peer has nothing to lose alone."""
    own = (plan.index, plan.clean)
    return tuple(slot for slot in plan.learned if slot in own and (plan.paired or plan.hard.get(slot)))


def _hard(plan: PeerPlan, slot: int, logits_BK: Tensor, y_B: Tensor) -> Tensor:
    if plan.loss.hard_loss == "bce" and slot != plan.clean:
        return losses.boosted_cross_entropy(logits_BK, y_B)
    return losses.cross_entropy(logits_BK, y_B, plan.loss.label_smoothing)


def _distilled(plan: PeerPlan, slot: int, logits_BK: Tensor, opinions: Opinions, y_B: Tensor) -> Tensor | float:
    teachers, c = plan.teachers(slot), plan.loss
    if not teachers:
        return 0.0
    lessons = [(i, plan.teacher_slot(i, slot)) for i in teachers]
    terms = Terms(c.temperature, c.t2_scale, c.teacher_agg, c.kd_loss, c.gate, c.kd_where)
    return plan.distilled[slot] * opinions.distillation(logits_BK, lessons, terms, y_B)


def _paired(plan: PeerPlan, clean_BK: Tensor, own_BK: Tensor, y_B: Tensor) -> Tensor:
    c = plan.loss
    total = torch.zeros((), dtype=own_BK.dtype, device=own_BK.device)
    if c.trades_beta:
        total = total + c.trades_beta * losses.trades_term(clean_BK, own_BK, c.trades_temperature)
    if c.mart_beta:
        total = total + c.mart_beta * losses.mart_term(clean_BK, own_BK, y_B)
    if c.pair_weight:
        total = total + c.pair_weight * losses.logit_pairing(clean_BK, own_BK)
    return total


def _union(plan: PeerPlan, logits: Mapping[int, Tensor], y_B: Tensor, right: Tensor | None) -> Tensor:
    """The worst threat of each image, and RAMP's pairing."""
    weight = sum(plan.hard[slot] for slot in plan.rivals)
    total = weight * losses.worst_cross_entropy([logits[slot] for slot in plan.rivals], y_B, plan.loss.label_smoothing)
    if plan.ramp is not None:
        first, second = plan.ramp
        # Times the weight of the worst cross-entropy: the paper's ratio between the two.
        total = total + weight * plan.me.ramp_weight * losses.ramp_term(logits[first], logits[second], y_B, right)
    return total
