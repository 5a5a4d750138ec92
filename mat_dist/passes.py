"""Passes of a batch through the networks of a cohort: arithmetic on its settings and plan."""

from __future__ import annotations

from mat_dist.config.schema import Config, PeerConfig
from mat_dist.objective import own_slots
from mat_dist.plan import CohortPlan, PeerPlan

Counts = tuple[float, float, float, float, float]  # attack, learning, teaching; forward and backward in all


def mean_counts(config: Config, turns: list[CohortPlan]) -> list[Counts]:
    """Passes of each peer in a step, in the mean over the plans of a period: attack and learning (forward and
    backward), teaching (forward only), and their sums."""
    each = [_counts(config, plan) for plan in turns]
    return [tuple(sum(numbers) / len(turns) for numbers in zip(*rows, strict=True))
            for rows in zip(*each, strict=True)]


def total_passes(config: Config, turns: list[CohortPlan], steps: int) -> tuple[int, int]:
    """Forward and backward passes of all peers in `steps` steps from the first."""
    forward = backward = 0
    for turn, plan in enumerate(turns):
        often = len(range(turn, steps, len(turns)))
        for *_, forwards, backwards in _counts(config, plan):
            forward, backward = forward + often * forwards, backward + often * backwards
    return forward, backward


def _counts(config: Config, plan: CohortPlan) -> list[tuple[int, int, int, int, int]]:
    """The passes of a step with one plan."""
    return [_of_peer(config, plan, spec, row) for spec, row in zip(config.peers, plan.peers, strict=True)]


def _of_peer(config: Config, plan: CohortPlan, spec: PeerConfig, row: PeerPlan) -> tuple[int, int, int, int, int]:
    learning = len(row.learned) + (len(own_slots(row)) if spec.optim.awp_gamma and not spec.frozen else 0)
    # With memory: recompute, no graph is kept until the logits have travelled: what is taught is run twice.
    again = config.step.memory == "recompute" or config.step.teachers == "ema"
    teaching = len(plan.taught[row.index] if again else plan.forwarded(row.index))
    teaching += int(any(plan.guided))
    attack = spec.attack.steps * len(row.own) if plan.crafts[row.index] else 0
    # Forwards alone: the clean prediction once, APGD's look at its last point, E-AT's at its AEs, MSD's at each
    # step of each norm.
    alone = (int(spec.attack.loss == "kl_clean") + int(spec.attack.method == "apgd")) * len(row.own)
    alone += int(row.me.strategy == "eat")
    alone += spec.attack.steps * len(row.me.union) if row.me.strategy == "msd" else 0
    backward = attack + learning
    return attack, learning, teaching, backward + teaching + (alone if attack else 0), backward
