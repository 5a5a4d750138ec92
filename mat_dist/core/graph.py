"""Who learns from what, and who teaches whom: tables of weights for every peer, and what must travel.

A *view* is one input of a step: the AEs that a peer makes for one of its threats, or the clean images. Any view may
travel, and any peer may learn from it or teach on it. Everything here is a function of the configuration (and of which
peers warm up), so all ranks know all of it without asking.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from mat_dist.attacks.norms import Threat
from mat_dist.config.fields import parse_threats
from mat_dist.config.methods import methods, strategies
from mat_dist.config.presets import LossWeights, hears
from mat_dist.config.schema import PeerConfig


class View(NamedTuple):
    """The AEs that peer `maker` makes for its threat number `threat`; CLEAN are the clean images."""

    maker: int
    threat: int = 0


CLEAN = View(-1)


@dataclass(frozen=True)
class PeerInfo:
    """What the others of a cohort must know of a peer.

    Attributes:
        role: `peer`, `specialist` or `generalist`.
        frozen: it does not train.
        threats: what it makes AEs for, its own threat first.
        views: how many views it makes: one, or one for each threat.
        worst: of several AEs of an image, the one with the highest cross-entropy counts.
        pairs: a method couples the logits on its clean images and own AEs.
        guided: its attack asks its teachers what they think of the clean images.
    """

    role: str
    frozen: bool
    threats: tuple[Threat, ...]
    views: int = 1
    worst: bool = False
    pairs: bool = False
    guided: bool = False

    @classmethod
    def of(cls, spec: PeerConfig) -> PeerInfo:
        """From a complete entry."""
        union = [Threat(norm, eps) for norm, eps in (parse_threats(spec.union.threats) if spec.union.threats else ())]
        strategy = strategies().get(spec.union.strategy or "")
        each = strategy is not None and strategy.each and bool(spec.loss.hard_own or spec.loss.kd_own)
        return cls(spec.role, spec.frozen, tuple(union) or (Threat(spec.threat.norm, spec.threat.eps),),
                   views=max(1, len(union)) if each else 1, worst=strategy is not None and strategy.worst,
                   pairs=any(methods()[name].pairs for name in spec.methods),
                   guided=any(method.guides(spec) for method in methods().values()))


@dataclass(frozen=True)
class PeerGraph:
    """The loss of peer `index` as weights of views and teachers.

    Attributes:
        infos: of the whole cohort.
    """

    index: int
    infos: tuple[PeerInfo, ...]
    weights: LossWeights

    @property
    def me(self) -> PeerInfo:
        return self.infos[self.index]

    @cached_property
    def mine(self) -> tuple[View, ...]:
        """The views that this peer makes."""
        return tuple(View(self.index, threat) for threat in range(self.me.views))

    @cached_property
    def teachers_of_me(self) -> tuple[int, ...]:
        """The other peers that this one learns from, in peer order."""
        return tuple(i for i, other in enumerate(self.infos)
                     if i != self.index and hears(self.me.role, other.role, other.frozen))

    def _shares(self, weight: float, own: float) -> dict[View, float]:
        """`weight` split into a share for the own views and even shares for those of the others."""
        if self.me.frozen:
            return {}
        others = [View(j, threat) for j in self.teachers_of_me for threat in range(self.infos[j].views)]
        shares = {view: weight * own / len(self.mine) for view in self.mine}
        shares.update({view: weight * (1 - own) / len(others) for view in others})
        return {view: share for view, share in shares.items() if share}

    @cached_property
    def hard(self) -> dict[View, float]:
        """Weight of cross-entropy on each view that has one."""
        c = self.weights
        clean = {CLEAN: c.clean_weight} if c.clean_weight and not self.me.frozen else {}
        return self._shares(c.hard_weight, c.hard_own) | clean

    @cached_property
    def distilled(self) -> dict[View, float]:
        """Weight of distillation on each view that has one."""
        c = self.weights
        clean = {CLEAN: c.kd_clean} if c.kd_clean and not self.me.frozen else {}
        return self._shares(c.kd_weight, c.kd_own) | clean

    @cached_property
    def paired(self) -> bool:
        """Whether a term couples the logits on clean images and own AEs."""
        return bool(self.weights.pair_kl or self.weights.pair_mse or self.me.pairs) and not self.me.frozen

    @cached_property
    def rivals(self) -> tuple[View, ...]:
        """Views that compete, image by image, where only the worst AE counts."""
        return tuple(view for view in self.hard if view != CLEAN) if self.me.worst else ()

    def threat_of(self, view: View) -> Threat:
        """For which threat a view is made."""
        return self.infos[view.maker].threats[view.threat]

    def threats_of(self, view: View) -> tuple[Threat, ...]:
        """For which threats the images of a view may be made: all of a maker with one view, which draws or mixes."""
        return self.infos[view.maker].threats if self.infos[view.maker].views == 1 else (self.threat_of(view),)

    @cached_property
    def learned(self) -> tuple[View, ...]:
        """Views that this peer forwards with a graph: others', then own ones for further threats, clean, the first own:
        coupled ones stand together, so that `memory: recompute` holds their graphs and no others, in the same order."""
        used = set(self.hard) | {view for view in self.distilled if self.teachers(view)}
        used |= {self.mine[0], CLEAN} if self.paired else set()
        last = (*self.mine[1:], CLEAN, self.mine[0])
        return tuple(sorted(used - set(last))) + tuple(view for view in last if view in used)

    def groups(self, coupled: Iterable[Sequence[View]] = ()) -> list[tuple[View, ...]]:
        """`learned`, in its order, cut into sets whose losses do not depend on each other; `coupled`: by hooks."""
        together = [*coupled, self.rivals, (CLEAN, self.mine[0]) if self.paired else ()]
        places = [[self.learned.index(view) for view in views] for views in together if views]
        cuts = [n for n in range(1, len(self.learned)) if not any(min(one) < n <= max(one) for one in places)]
        return [self.learned[first:end] for first, end in pairwise([0, *cuts, len(self.learned)])]

    @cached_property
    def alone(self) -> tuple[View, ...]:
        """Own AEs and clean images, as far as this peer has something to lose on them without the others."""
        own = (self.mine[0], CLEAN)
        return tuple(view for view in self.learned if view in own and (self.paired or self.hard.get(view)))

    def teachers(self, view: View) -> tuple[int, ...]:
        """Peers whose opinion this peer learns on a view, in peer order."""
        if not self.distilled.get(view):
            return ()
        if self.weights.teacher_set == "owner":
            return tuple(i for i in self.teachers_of_me if i == view.maker)
        if self.weights.teacher_set == "expert":
            norm = None if view == CLEAN else self.threat_of(view).norm
            return tuple(i for i in self.teachers_of_me if self.infos[i].threats[0].norm == norm)
        return tuple(i for i in self.teachers_of_me if self.weights.teacher_set == "all" or self.infos[i].frozen)

    def teacher_view(self, teacher: int, view: View) -> View:
        """What `teacher` looks at when it teaches this peer about a view."""
        return {"same_ae": view, "own_ae": View(teacher), "clean": CLEAN}[self.weights.teacher_input]

    def number(self, view: View) -> int:
        """A number for each view that keys what this peer's forward on it draws (dropout): the first views of the
        peers, clean, own further ones, those of others."""
        peers = len(self.infos)
        if view == CLEAN or view.threat == 0:
            return peers if view == CLEAN else view.maker
        return peers + view.threat + (0 if view.maker == self.index else (view.maker + 1) << 16)


@dataclass(frozen=True)
class CohortGraph:
    """The graphs of all peers and what must travel between them."""

    peers: tuple[PeerGraph, ...]

    @classmethod
    def of(cls, complete: Sequence[PeerConfig], warming_up: Iterable[int] = ()) -> CohortGraph:
        """From the complete entry of every peer, in peer order; those in `warming_up` still learn alone."""
        infos, alone = tuple(PeerInfo.of(spec) for spec in complete), set(warming_up)
        weights = [LossWeights.of(spec.loss) for spec in complete]
        return cls(tuple(PeerGraph(i, infos, one.alone() if i in alone else one) for i, one in enumerate(weights)))

    @cached_property
    def guides(self) -> tuple[tuple[int, ...], ...]:
        """For each peer those whose clean predictions guide its attack: frozen teachers where it has some, else all
        that it learns from."""
        return tuple((tuple(i for i in row.teachers_of_me if row.infos[i].frozen) or row.teachers_of_me)
                     if row.me.guided else () for row in self.peers)

    @cached_property
    def taught(self) -> tuple[tuple[View, ...], ...]:
        """For each peer the views on which somebody learns its opinion."""
        views: list[set[View]] = [set() for _ in self.peers]
        for student in self.peers:
            for view in student.distilled:
                for teacher in student.teachers(view):
                    views[teacher].add(student.teacher_view(teacher, view))
        return tuple(tuple(sorted(one)) for one in views)

    @cached_property
    def position(self) -> Mapping[tuple[int, View], int]:
        """(teacher, view) -> index on the second axis of the gathered logits."""
        return {(i, view): n for i, views in enumerate(self.taught) for n, view in enumerate(views)}

    @cached_property
    def most_taught(self) -> int:
        """Size of that axis: the most views that one peer teaches on; 0 when nobody does."""
        return max(len(views) for views in self.taught)

    def needed(self, peer: int) -> frozenset[View]:
        """The views that a peer forwards, to learn or to teach."""
        return frozenset(self.peers[peer].learned) | frozenset(self.taught[peer])

    def crafted(self, peer: int) -> tuple[View, ...]:
        """The views of a peer that anyone uses; the others are not made, but for the transfer table of a log step."""
        used = frozenset().union(*map(self.needed, range(len(self.peers))))
        return tuple(view for view in self.peers[peer].mine if view in used)

    @cached_property
    def travelling(self) -> frozenset[View]:
        """The views that somebody other than their maker needs; the others stay at home."""
        return frozenset(view for i in range(len(self.peers)) for view in self.needed(i)
                         if view != CLEAN and view.maker != i)

    def sent(self, peers: Sequence[int], log: bool = False) -> list[View]:
        """The views that a rank with these peers sends, in order; at log steps also every peer's first one."""
        return [view for i in peers for view in self.peers[i].mine
                if view in self.travelling or (log and view.threat == 0)]

    def width(self, ranks: Iterable[Sequence[int]], log: bool = False) -> int:
        """How many views each rank sends, padded to the one that sends most; `ranks`: the peers of each."""
        return max(len(self.sent(peers, log)) for peers in ranks)

    def forwarded(self, peer: int) -> tuple[View, ...]:
        """Views that a peer forwards without a graph because it only teaches on them."""
        return tuple(view for view in self.taught[peer] if view not in self.peers[peer].learned)
