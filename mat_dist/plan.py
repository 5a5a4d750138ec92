"""Who learns from what: the mutual loss of every peer as tables of weights, and what follows from them.

A *slot* is an input of the step: slot j < P holds the AEs that peer j crafted, slot P the clean images.
Everything here is a function of the configuration, so all ranks know all of it without asking.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from mat_dist import losses
from mat_dist.config.schema import LossConfig
from mat_dist.opinions import Opinions, Terms


@dataclass(frozen=True)
class Coefficients:
    """The loss of one peer with no coefficient left open; the fields are those of `LossConfig`."""

    preset: str
    hard_weight: float
    hard_own: float
    clean_weight: float
    kd_weight: float
    kd_own: float
    temperature: float
    t2_scale: bool
    teacher_input: str
    teacher_agg: str
    teacher_set: str
    trades_beta: float
    pair_weight: float
    base_scale: float
    label_smoothing: float

    @classmethod
    def of(cls, loss: LossConfig) -> Coefficients:
        """From a complete section (`config.presets.fill_loss`). Raises ValueError naming the fields that are empty."""
        values = {field.name: getattr(loss, field.name) for field in fields(cls)}
        empty = [f"loss.{name}" for name, value in values.items() if value is None]
        if empty:
            raise ValueError(f"empty: {', '.join(empty)}; fill_loss takes them from the preset")
        return cls(**values)


@dataclass(frozen=True)
class PeerPlan:
    """The loss of peer `index` of `peers`. Nobody learns from a peer in `muted`: its shares go to the other peers."""

    index: int
    peers: int
    loss: Coefficients
    muted: frozenset[int] = frozenset()

    @property
    def clean(self) -> int:
        """The slot of the clean images."""
        return self.peers

    def _shares(self, weight: float, own: float) -> tuple[float, ...]:
        """`weight` split into a share for the own slot and even shares for the others."""
        heard = self._heard()
        others = weight * (1 - own) / len(heard) if heard else 0.0
        return tuple(weight * own if j == self.index else others if j in heard else 0.0 for j in range(self.peers))

    def _heard(self) -> tuple[int, ...]:
        """The other peers that this one learns from, in peer order."""
        return tuple(i for i in range(self.peers) if i != self.index and i not in self.muted)

    @cached_property
    def hard(self) -> tuple[float, ...]:
        """a_kj: weight of cross-entropy on the AEs of each source."""
        return self._shares(self.loss.hard_weight, self.loss.hard_own)

    @cached_property
    def distilled(self) -> tuple[float, ...]:
        """m_kj: weight of distillation on the AEs of each source."""
        return self._shares(self.loss.kd_weight, self.loss.kd_own)

    @cached_property
    def paired(self) -> bool:
        """Whether a term couples the clean and the own-AE logits."""
        return bool(self.loss.trades_beta or self.loss.pair_weight)

    @cached_property
    def learned(self) -> tuple[int, ...]:
        """Slots that this peer forwards with a graph: other sources, then clean, then own.

        Clean and own come last and together, so that `memory: recompute` can hold the two coupled graphs
        and no others, in the same order as `memory: keep`.
        """
        own, clean = self.index, self.clean
        used = {j for j in range(self.peers) if self.hard[j] or self.teachers(j)}
        used |= {own, clean} if self.paired else set()
        used |= {clean} if self.loss.clean_weight else set()
        return tuple(sorted(used - {own, clean})) + tuple(s for s in (clean, own) if s in used)

    def groups(self) -> list[tuple[int, ...]]:
        """`learned` cut into sets whose losses do not depend on each other."""
        pair = (self.clean, self.index) if self.paired else ()
        return [(s,) for s in self.learned if s not in pair] + ([pair] if pair else [])

    def teachers(self, source: int) -> tuple[int, ...]:
        """Peers whose opinion this peer learns on the AEs of `source`, in peer order."""
        if not self.distilled[source]:
            return ()
        heard = self._heard()
        return heard if self.loss.teacher_set == "all" else tuple(i for i in heard if i == source)

    def teacher_slot(self, teacher: int, source: int) -> int:
        """What `teacher` looks at when it teaches this peer about the AEs of `source`."""
        return {"same_ae": source, "own_ae": teacher, "clean": self.clean}[self.loss.teacher_input]

    def partial_loss(self, slots: Sequence[int], logits: dict[int, Tensor], opinions: Opinions,
                     y_B: Tensor) -> Tensor:
        """The terms of the loss that belong to `slots` -> scalar.

        Args:
            logits: this peer's logits_BK on each of `slots`, with graph.
            opinions: of all peers.
            y_B: labels.
        """
        c, own, clean = self.loss, self.index, self.clean
        total = torch.zeros((), dtype=next(iter(logits.values())).dtype, device=y_B.device)
        for slot in slots:
            hard = c.clean_weight if slot == clean else self.hard[slot]
            if hard:
                total = total + (c.base_scale * hard) * losses.cross_entropy(logits[slot], y_B, c.label_smoothing)
            teachers = self.teachers(slot) if slot != clean else ()
            if teachers:
                lessons = [(i, self.teacher_slot(i, slot)) for i in teachers]
                terms = Terms(c.temperature, c.t2_scale, c.teacher_agg)
                total = total + self.distilled[slot] * opinions.distillation(logits[slot], lessons, terms)
        if self.paired and own in slots:
            if c.trades_beta:
                total = total + (c.base_scale * c.trades_beta) * losses.trades_term(logits[clean], logits[own])
            if c.pair_weight:
                total = total + (c.base_scale * c.pair_weight) * losses.logit_pairing(logits[clean], logits[own])
        return total


@dataclass(frozen=True)
class CohortPlan:
    """The plans of all peers and what must travel between them."""

    peers: tuple[PeerPlan, ...]

    @classmethod
    def of(cls, complete: Sequence[LossConfig]) -> CohortPlan:
        """From the complete loss of every peer, in peer order; all peers are listened to."""
        return cls(tuple(PeerPlan(i, len(complete), Coefficients.of(loss)) for i, loss in enumerate(complete)))

    def muting(self, peers: Iterable[int]) -> CohortPlan:
        """The same losses when nobody listens to `peers`, and to all others."""
        muted = frozenset(peers)
        return CohortPlan(tuple(replace(row, muted=muted) for row in self.peers))

    @cached_property
    def taught(self) -> tuple[tuple[int, ...], ...]:
        """For each peer the slots on which somebody learns its opinion, ascending."""
        slots: list[set[int]] = [set() for _ in self.peers]
        for student in self.peers:
            for source in range(len(self.peers)):
                for teacher in student.teachers(source):
                    slots[teacher].add(student.teacher_slot(teacher, source))
        return tuple(tuple(sorted(s)) for s in slots)

    @cached_property
    def position(self) -> dict[tuple[int, int], int]:
        """(teacher, slot) -> index on the second axis of the gathered logits."""
        return {(i, slot): n for i, slots in enumerate(self.taught) for n, slot in enumerate(slots)}

    @cached_property
    def most_taught(self) -> int:
        """Size of that axis: the most slots that one peer teaches; 0 when nobody does."""
        return max(len(slots) for slots in self.taught)

    @cached_property
    def shares_aes(self) -> bool:
        """Whether a peer needs the AEs of another one."""
        needed = [set(plan.learned) | set(self.taught[i]) for i, plan in enumerate(self.peers)]
        return any(slot not in (i, len(self.peers)) for i, slots in enumerate(needed) for slot in slots)

    def forwarded(self, peer: int) -> tuple[int, ...]:
        """Slots that a peer forwards without a graph because it only teaches on them."""
        return tuple(s for s in self.taught[peer] if s not in self.peers[peer].learned)
