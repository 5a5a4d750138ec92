"""How many passes of a batch each network makes: in a step, and in a whole training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from mat_dist.config.schema import Config, PeerConfig
from mat_dist.objective import own_slots
from mat_dist.plan import CohortPlan, PeerPlan
from mat_dist.schedules import attack_steps_at


class Passes(NamedTuple):
    """Of one peer: attack and learning (forward and backward), teaching (forward only), and their sums.

    A pass of a part of the batch counts as that part.
    """

    attack: Fraction
    learning: Fraction
    teaching: Fraction
    forward: Fraction
    backward: Fraction


def step_passes(config: Config, plan: CohortPlan, attack_steps: Sequence[Fraction] | None = None) -> list[Passes]:
    """The passes of each peer in one step.

    Args:
        attack_steps: gradient steps of each peer's attack; default those of the settings.
    """
    if attack_steps is None:
        attack_steps = [Fraction(spec.attack.steps) for spec in config.peers]
    return [_passes(config, plan, spec, row, steps)
            for spec, row, steps in zip(config.peers, plan.peers, attack_steps, strict=True)]


def total_passes(config: Config, plan: CohortPlan, total: int, per_epoch: int) -> tuple[int, int]:
    """Forward and backward passes of all peers in `total` steps, `per_epoch` of which make an epoch."""
    means = [_mean_steps(spec, total, per_epoch) for spec in config.peers]
    rows = step_passes(config, plan, means)
    return math.ceil(total * sum(r.forward for r in rows)), math.ceil(total * sum(r.backward for r in rows))


def _mean_steps(spec: PeerConfig, total: int, per_epoch: int) -> Fraction:
    """Gradient steps of an attack, on average over the training."""
    growing = round(spec.attack.steps_warmup_epochs * per_epoch)
    grown = sum(attack_steps_at(step, spec.attack.steps, growing) for step in range(min(total, growing)))
    return Fraction(grown + spec.attack.steps * max(0, total - growing), total)


def _passes(config: Config, plan: CohortPlan, spec: PeerConfig, row: PeerPlan, steps: Fraction) -> Passes:
    learning = len(row.learned) + (len(own_slots(row)) if spec.optim.awp_gamma and not spec.frozen else 0)
    # With memory: recompute, no graph is kept until the logits have travelled: what is taught is run twice.
    again = config.step.memory == "recompute" or config.step.teachers == "ema"
    teaching = len(plan.taught[row.index] if again else plan.forwarded(row.index)) + int(any(plan.guided))
    crafts = plan.crafts[row.index] and spec.attack.method != "free"  # which takes its gradient from learning
    attack = steps * len(row.own) if crafts else Fraction(0)
    # Forwards alone: the clean prediction once, APGD's look at its last point, E-AT's at its AEs, MSD's at each
    # step of each norm.
    alone = Fraction((int(spec.attack.loss == "kl_clean") + int(spec.attack.method == "apgd")) * len(row.own))
    alone += int(row.me.strategy == "eat")
    alone += steps * len(row.me.union) if row.me.strategy == "msd" else 0
    attack, alone = attack / plan.makers, alone / plan.makers
    backward = attack + learning
    return Passes(attack, Fraction(learning), Fraction(teaching), backward + teaching + (alone if attack else 0),
                  backward)
