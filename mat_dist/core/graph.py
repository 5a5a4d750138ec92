"""Who learns from what: the mutual loss of every peer as tables of weights, and what follows from them.

A *slot* is an input of the step: slot j < P holds the AEs that peer j crafted, slot P the clean images. Slots
beyond P are a peer's own: the AEs that it crafted for the other threats of its union; they never travel.
Everything here is a function of the configuration, so all ranks know all of it without asking.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm

from mat_dist.attacks.norms import Threat
from mat_dist.config.presets import hears
from mat_dist.config.schema import PeerConfig
from mat_dist.core.coefficients import Coefficients
from mat_dist.core.member import Member
from mat_dist.core.rotation import attacker, partner, period

# Strategies that craft an AE for each threat of the union; the others craft one batch (attacks/union.py).
CRAFTS_EACH = ("avg", "max", "ramp")


@dataclass(frozen=True)
class PeerPlan:
    """The loss of peer `index`.

    Attributes:
        members: of the whole cohort.
        muted: nobody learns from these: their shares go to the other peers.
        alone: the peer still warms up: hard labels on own AEs, no distillation.
        drawn: the one peer from whose AEs this one learns in this step, where its strategy draws one.
        split: all slots of AEs hold one batch, of which each peer has made a part.
        turn: number of the step, for `attackers: partner` and `one`.
    """

    index: int
    members: tuple[Member, ...]
    loss: Coefficients
    split: bool = False
    muted: frozenset[int] = frozenset()
    alone: bool = False
    drawn: int | None = None
    turn: int = 0

    @property
    def peers(self) -> int:
        return len(self.members)

    @property
    def me(self) -> Member:
        return self.members[self.index]

    @property
    def clean(self) -> int:
        """The slot of the clean images."""
        return self.peers

    @cached_property
    def own(self) -> tuple[int, ...]:
        """The slots of the AEs that this peer crafts; one but for a union."""
        each = self.me.strategy in CRAFTS_EACH and self.loss.hard_own > 0
        return (self.index, *range(self.clean + 1, self.clean + len(self.me.union))) if each else (self.index,)

    @cached_property
    def source(self) -> int:
        """The slot of the AEs that count as own ones: its own, or those of the only attacker."""
        if self.loss.attackers == "one" and not self.alone:
            return attacker(self.index, self.heard, self.turn)
        return self.index

    def _shares(self, weight: float, own: float, mine: Sequence[int]) -> dict[int, float]:
        """`weight` split into a share for the own slots and even shares for those of the others."""
        if self.me.frozen:
            return {}
        others = self.heard if self.drawn is None else (self.drawn,)
        if self.loss.attackers == "one":
            own, mine, others = 1.0, (self.source,), ()
        elif self.loss.attackers == "partner" and others:
            others = (partner(self.index, others, self.turn),)
        shares = {slot: weight * own / len(mine) for slot in mine}
        shares.update({j: weight * (1 - own) / len(others) for j in others})
        return {slot: share for slot, share in shares.items() if share}

    @cached_property
    def heard(self) -> tuple[int, ...]:
        """The other peers that this one learns from, in peer order."""
        return tuple(i for i, other in enumerate(self.members)
                     if i != self.index and i not in self.muted
                     and hears(self.me.role, other.role, other.frozen))

    @cached_property
    def draws(self) -> bool:
        """Whether this peer learns from the AEs of one other peer per step (`random`, `eat`), with none of its own."""
        return self.me.strategy in ("random", "eat") and not self.loss.hard_own and not self.me.frozen

    @cached_property
    def hard(self) -> dict[int, float]:
        """a_kj: weight of cross-entropy on each slot that has one."""
        c = self.loss
        if self.alone and c.hard_weight:
            shares = self._shares(c.hard_weight + c.kd_weight + c.kd_clean, 1.0, self.own)
        else:
            shares = self._shares(c.hard_weight, c.hard_own, self.own)
        return shares | ({self.clean: c.clean_weight} if c.clean_weight and not self.me.frozen else {})

    @cached_property
    def distilled(self) -> dict[int, float]:
        """m_kj: weight of distillation on each slot that has one."""
        if self.alone:
            return {}
        shares = self._shares(self.loss.kd_weight, self.loss.kd_own, (self.index,))
        return shares | ({self.clean: self.loss.kd_clean} if self.loss.kd_clean and not self.me.frozen else {})

    @cached_property
    def paired(self) -> bool:
        """Whether a term couples the clean and the own-AE logits."""
        c = self.loss
        return bool(c.trades_beta or c.pair_weight or c.mart_beta) and not self.me.frozen

    @cached_property
    def rivals(self) -> tuple[int, ...]:
        """Slots whose AEs compete, image by image: `max` and `ramp` learn from the worst one."""
        if self.me.strategy not in ("max", "ramp"):
            return ()
        return tuple(slot for slot in self.hard if slot != self.clean)

    @cached_property
    def ramp(self) -> tuple[int, int] | None:
        """The two slots that RAMP pairs: linf and l1 where both are there, else the first and the last threat."""
        if self.me.strategy != "ramp" or len(self.rivals) < 2:
            return None
        norms = {self.threat_of(slot).norm: slot for slot in reversed(self.rivals)}
        return (norms["linf"], norms["l1"]) if {"linf", "l1"} <= set(norms) else (self.rivals[0], self.rivals[-1])

    def threat_of(self, slot: int) -> Threat:
        """For which threat the AEs of a slot are made."""
        if slot > self.clean:
            return self.me.union[slot - self.clean]
        return self.members[slot].threat

    @cached_property
    def learned(self) -> tuple[int, ...]:
        """Slots that this peer forwards with a graph: other sources, then clean, then own.

        Clean and own (or the only attacker's) come last and together, so that `memory: recompute` can hold the coupled
        graphs and no others, in the same order as `memory: keep`.
        """
        used = set(self.hard) | {slot for slot in self.distilled if self.teachers(slot)}
        used |= {self.source, self.clean} if self.paired else set()
        last = (*self.own[1:], self.clean, self.source)
        return tuple(sorted(used - set(last))) + tuple(slot for slot in last if slot in used)

    def groups(self) -> list[tuple[int, ...]]:
        """`learned`, in its order, cut into sets whose losses do not depend on each other."""
        together = set(self.rivals) | ({self.clean, self.source} if self.paired else set())
        places = [n for n, slot in enumerate(self.learned) if slot in together]
        first, end = (places[0], places[-1] + 1) if places else (0, 0)
        coupled = [self.learned[first:end]] if places else []
        return [(slot,) for slot in self.learned[:first]] + coupled + [(slot,) for slot in self.learned[end:]]

    def teachers(self, slot: int) -> tuple[int, ...]:
        """Peers whose opinion this peer learns on a slot, in peer order."""
        if not self.distilled.get(slot):
            return ()
        if self.loss.teacher_set == "owner":
            return tuple(i for i in self.heard if i == slot)
        return tuple(i for i in self.heard if self.loss.teacher_set == "all" or self.members[i].frozen)

    def teacher_slot(self, teacher: int, slot: int) -> int:
        """What `teacher` looks at when it teaches this peer about a slot."""
        if self.split and self.loss.teacher_input == "same_ae" and slot == self.index:
            return teacher  # which holds the same images, and which the teacher forwards anyway
        return {"same_ae": slot, "own_ae": teacher, "clean": self.clean}[self.loss.teacher_input]


@dataclass(frozen=True)
class CohortPlan:
    """The plans of all peers and what must travel between them.

    Attributes:
        led: the peers whose attacks teachers guide (`attack.loss: kl_teacher`).
    """

    peers: tuple[PeerPlan, ...]
    led: frozenset[int] = frozenset()

    @classmethod
    def of(cls, complete: Sequence[PeerConfig]) -> CohortPlan:
        """From the complete entry of every peer, in peer order; all peers are listened to."""
        members = tuple(Member.of(spec) for spec in complete)
        peers = tuple(PeerPlan(i, members, Coefficients.of(spec.loss), spec.attack.split_batch)
                      for i, spec in enumerate(complete))
        led = frozenset(i for i, spec in enumerate(complete) if spec.attack.loss == "kl_teacher")
        return cls(peers, led).drawing({row.index: row.heard[0] for row in peers if row.draws and row.heard})

    def listening(self, muted: Iterable[int], alone: Iterable[int], turn: int = 0) -> CohortPlan:
        """The same losses when nobody listens to `muted` and the peers in `alone` listen to nobody, at step `turn`."""
        silent, warming = frozenset(muted), frozenset(alone)
        return replace(self, peers=tuple(replace(row, muted=silent, alone=row.index in warming, turn=turn)
                                         for row in self.peers))

    @cached_property
    def period(self) -> int:
        """After how many steps all peers have the same sources again; 1 where these never change."""
        return lcm(*(period(row.loss.attackers, row.heard) for row in self.peers if not row.me.frozen))

    @cached_property
    def turns(self) -> tuple[CohortPlan, ...]:
        """The plan of each step of a period, with nobody muted or warming up."""
        return tuple(self.listening((), (), turn) for turn in range(self.period))

    def drawing(self, drawn: Mapping[int, int]) -> CohortPlan:
        """The same losses when these peers learn from the AEs of the one that each of them drew."""
        return replace(self, peers=tuple(replace(row, drawn=drawn.get(row.index)) for row in self.peers))

    @cached_property
    def guided(self) -> tuple[tuple[int, ...], ...]:
        """For each peer the teachers whose clean predictions guide its attack."""
        return tuple(_guides(plan) if plan.index in self.led else () for plan in self.peers)

    @cached_property
    def taught(self) -> tuple[tuple[int, ...], ...]:
        """For each peer the slots on which somebody learns its opinion, ascending."""
        slots: list[set[int]] = [set() for _ in self.peers]
        for student in self.peers:
            for slot in student.distilled:
                for teacher in student.teachers(slot):
                    slots[teacher].add(student.teacher_slot(teacher, slot))
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
    def crafts(self) -> tuple[bool, ...]:
        """Whether each peer's AEs are used by anyone; those of the others are not made but at log steps."""
        used = {slot for i, plan in enumerate(self.peers) for slot in (*plan.learned, *self.taught[i])}
        return tuple(plan.index in used for plan in self.peers)

    @property
    def split(self) -> bool:
        """Whether the peers make one batch of AEs together."""
        return self.peers[0].split

    @property
    def makers(self) -> int:
        """How many peers make each source's batch of AEs."""
        return len(self.peers) if self.split else 1

    def part(self, peer: int, step: int) -> slice:
        """The rows of a (micro-)batch for which a peer crafts: all, or in turn every P-th."""
        return slice((peer - step) % self.makers, None, self.makers)

    @cached_property
    def shares_aes(self) -> bool:
        """Whether a peer needs the AEs of another one."""
        if self.split:
            return True
        needed = [set(plan.learned) | set(self.taught[i]) for i, plan in enumerate(self.peers)]
        return any(slot < len(self.peers) and slot != i for i, slots in enumerate(needed) for slot in slots)

    def forwarded(self, peer: int) -> tuple[int, ...]:
        """Slots that a peer forwards without a graph because it only teaches on them."""
        return tuple(s for s in self.taught[peer] if s not in self.peers[peer].learned)


def _guides(plan: PeerPlan) -> tuple[int, ...]:
    """Whose clean predictions a peer's attack moves away from: frozen teachers where it has some, else all it hears."""
    return tuple(i for i in plan.heard if plan.members[i].frozen) or plan.heard
