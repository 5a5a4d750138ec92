"""How many passes of a batch each network makes: in a step, and in a whole training."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from mat_dist.config.schema import Config, PeerConfig
from mat_dist.objective import own_slots
from mat_dist.plan import CohortPlan, PeerPlan


class Passes(NamedTuple):
    """Of one peer: attack and learning (forward and backward), teaching (forward only), and their sums."""

    attack: Fraction
    learning: Fraction
    teaching: Fraction
    forward: Fraction
    backward: Fraction


def step_passes(config: Config, plan: CohortPlan) -> list[Passes]:
    """The passes of each peer in one step, on average over a round of turns (`loss.attackers`)."""
    turns = [_turn_passes(config, turn) for turn in plan.turns]
    return [Passes(*(sum(column) / Fraction(len(turns)) for column in zip(*rows, strict=True)))
            for rows in zip(*turns, strict=True)]


def total_passes(config: Config, plan: CohortPlan, total: int) -> tuple[int, int]:
    """Forward and backward passes of all peers in `total` steps from the first."""
    forward = backward = Fraction(0)
    for number, turn in enumerate(plan.turns):
        often = len(range(number, total, len(plan.turns)))
        for row in _turn_passes(config, turn):
            forward, backward = forward + often * row.forward, backward + often * row.backward
    return int(forward), int(backward)


def _turn_passes(config: Config, plan: CohortPlan) -> list[Passes]:
    """The passes of each peer in a step with one plan."""
    return [_passes(config, plan, spec, row, Fraction(spec.attack.steps))
            for spec, row in zip(config.peers, plan.peers, strict=True)]


def _passes(config: Config, plan: CohortPlan, spec: PeerConfig, row: PeerPlan, steps: Fraction) -> Passes:
    learning = len(row.learned) + (len(own_slots(row)) if spec.optim.awp_gamma and not spec.frozen else 0)
    learning += int(bool(spec.union.projection_beta) and not spec.frozen)  # the gradient on clean images
    # With memory: recompute, no graph is kept until the logits have travelled: what is taught is run twice.
    again = config.step.memory == "recompute" or config.step.teachers == "ema"
    teaching = len(plan.taught[row.index] if again else plan.forwarded(row.index)) + int(any(plan.guided))
    attack = steps * len(row.own) if plan.crafts[row.index] else Fraction(0)
    # Forwards alone: the clean prediction once, APGD's look at its last point, which E-AT needs with PGD too, MSD's
    # at each step of each norm.
    alone = Fraction((int(spec.attack.loss == "kl_clean") + int(spec.attack.method == "apgd")) * len(row.own))
    alone += int(row.me.strategy == "eat" and bool(row.me.union) and spec.attack.method == "pgd")
    alone += steps * len(row.me.union) if row.me.strategy == "msd" else 0
    backward = attack + learning
    return Passes(attack, Fraction(learning), Fraction(teaching), backward + teaching + (alone if attack else 0),
                  backward)
