"""How many passes of a batch each network makes: in a step, and in a whole training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from mat_dist.config.methods import Method, methods
from mat_dist.config.schema import Config, PeerConfig
from mat_dist.core.graph import CohortGraph


class Passes(NamedTuple):
    """Of one peer: attack and learning (forward and backward), teaching (forward only), and their sums."""

    attack: Fraction
    learning: Fraction
    teaching: Fraction
    forward: Fraction
    backward: Fraction


def step_passes(config: Config, graph: CohortGraph) -> list[Passes]:
    """The passes of each peer in one step of full attacks."""
    return [_passes(config, graph, index, Fraction(spec.attack.steps)) for index, spec in enumerate(config.peers)]


def total_passes(config: Config, graph: CohortGraph, total: int) -> tuple[int, int]:
    """Forward and backward passes of all peers in `total` steps."""
    rows = step_passes(config, graph)
    return math.ceil(total * sum(row.forward for row in rows)), math.ceil(total * sum(row.backward for row in rows))


def used_by(spec: PeerConfig) -> Sequence[Method]:
    """The methods of a peer."""
    return [method for method in methods().values() if method.uses(spec)]


def _passes(config: Config, graph: CohortGraph, index: int, steps: Fraction) -> Passes:
    spec, row, used = config.peers[index], graph.peers[index], used_by(config.peers[index])
    learning = Fraction(len(row.learned) + sum(method.learning(spec, row) for method in used if method.learning))
    # With memory: recompute, no graph is kept until the logits have travelled: what is taught is run twice.
    again = config.step.memory == "recompute" or config.step.teachers == "ema"
    teaching = Fraction(len(graph.taught[index] if again else graph.forwarded(index)) + any(graph.guides))
    # Forwards alone: the clean prediction once, APGD's look at its last point.
    attack, alone = steps, Fraction((spec.attack.loss == "kl_clean") + (spec.attack.method == "apgd"))
    views = len(graph.crafted(index))
    attack, alone = attack * views, alone * views
    for method in used:
        if views and method.attack_passes is not None:
            instead, more = method.attack_passes(spec, steps)
            attack, alone = attack + instead - steps, alone + more
    backward = attack + learning
    return Passes(attack, learning, teaching, backward + teaching + alone, backward)
