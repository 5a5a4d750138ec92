"""How many passes of a batch each network makes: in a step, and in a whole training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from mat_dist.config.schema import Config, PeerConfig
from mat_dist.core.graph import CohortPlan, PeerPlan
from mat_dist.core.objective import own_slots
from mat_dist.core.schedules import attack_steps_at


class Passes(NamedTuple):
    """Of one peer: attack and learning (forward and backward), teaching (forward only), and their sums.

    A pass of a part of the batch counts as that part.
    """

    attack: Fraction
    learning: Fraction
    teaching: Fraction
    forward: Fraction
    backward: Fraction


def step_passes(config: Config, plan: CohortPlan) -> list[Passes]:
    """The passes of each peer in one step of full attacks, on average over a round of turns (`loss.attackers`)."""
    full = [Fraction(spec.attack.steps) for spec in config.peers]
    turns = [_turn_passes(config, turn, full) for turn in plan.turns]
    return [Passes(*(sum(column) / Fraction(len(turns)) for column in zip(*rows, strict=True)))
            for rows in zip(*turns, strict=True)]


def total_passes(config: Config, plan: CohortPlan, total: int, per_epoch: int) -> tuple[int, int]:
    """Forward and backward passes of all peers in `total` steps from the first, `per_epoch` of which make an epoch."""
    forward = backward = Fraction(0)
    for number, turn in enumerate(plan.turns):
        steps = range(number, total, len(plan.turns))
        means = [_mean_steps(spec, steps, per_epoch) for spec in config.peers]
        for row in _turn_passes(config, turn, means):
            forward, backward = forward + len(steps) * row.forward, backward + len(steps) * row.backward
    return math.ceil(forward), math.ceil(backward)


def _mean_steps(spec: PeerConfig, steps: Sequence[int], per_epoch: int) -> Fraction:
    """Gradient steps of an attack, on average over these steps of the training."""
    growing = round(spec.attack.steps_warmup_epochs * per_epoch)
    full = spec.attack.steps
    short = sum(full - attack_steps_at(step, full, growing) for step in steps if step < growing)
    return full - Fraction(short, max(1, len(steps)))


def _turn_passes(config: Config, plan: CohortPlan, steps: Sequence[Fraction]) -> list[Passes]:
    """The passes of each peer in a step with one plan, whose attacks have so many steps."""
    return [_passes(config, plan, spec, row, often)
            for spec, row, often in zip(config.peers, plan.peers, steps, strict=True)]


def _passes(config: Config, plan: CohortPlan, spec: PeerConfig, row: PeerPlan, steps: Fraction) -> Passes:
    learning = len(row.learned) + (len(own_slots(row)) if spec.optim.awp_gamma and not spec.frozen else 0)
    learning += int(bool(spec.union.projection_beta) and not spec.frozen)  # the gradient on clean images
    # With memory: recompute, no graph is kept until the logits have travelled: what is taught is run twice.
    again = config.step.memory == "recompute" or config.step.teachers == "ema"
    teaching = len(plan.taught[row.index] if again else plan.forwarded(row.index)) + int(any(plan.guided))
    crafts = plan.crafts[row.index] and spec.attack.method != "free"  # which takes its gradient from learning
    attack = steps * len(row.own) if crafts else Fraction(0)
    # Forwards alone: the clean prediction once, APGD's look at its last point, which E-AT needs with PGD too, MSD's
    # at each step of each norm.
    alone = Fraction((int(spec.attack.loss == "kl_clean") + int(spec.attack.method == "apgd")) * len(row.own))
    alone += int(row.me.strategy == "eat" and bool(row.me.union) and spec.attack.method == "pgd")
    alone += steps * len(row.me.union) if row.me.strategy == "msd" else 0
    attack, alone = attack / plan.makers, alone / plan.makers
    backward = attack + learning
    return Passes(attack, Fraction(learning), Fraction(teaching), backward + teaching + (alone if attack else 0),
                  backward)
