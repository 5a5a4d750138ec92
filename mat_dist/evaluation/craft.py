"""From the name of an attack to its AEs on one chunk of images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.noise import noisy
from mat_dist.attacks.norms import Threat
from mat_dist.attacks.pgd import likely_wrong
from mat_dist.attacks.random_search import patch_change, random_search
from mat_dist.evaluation.attacks import AttackPlan, restarts
from mat_dist.evaluation.autoattack import Found, autoattack, chunk_seed
from mat_dist.evaluation.menu import AUTOATTACK, MENU
from mat_dist.models.modes import frozen

NOISE_DRAWS = 20  # of `uniform` and of `gaussian`


@dataclass(frozen=True)
class Job:
    """What is done to every chunk.

    Attributes:
        threats: each is an evaluation of its own.
        plans: our gradient attacks, by name.
        attacks: names of all attacks, in order.
        version, custom: of AutoAttack.
        transfer: replay each target's AEs on the others.
        seed: of all noise.
        queries: of random search.
    """

    threats: tuple[Threat, ...]
    plans: Mapping[str, AttackPlan]
    attacks: tuple[str, ...]
    version: str
    custom: tuple[str, ...]
    transfer: bool
    seed: int
    queries: int = 1000


def made(name: str, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, threat: Threat, job: Job, chunk: int,
         found: list[Found]) -> Iterator[Tensor]:
    """The AEs that one attack makes with one module; `found` gets what pyautoattack told."""
    maker = MENU[name].maker
    if maker == "pgd":
        yield from crafted(model, x_BCHW, y_B, threat, job.plans[name], seed=job.seed, chunk=chunk)
    elif maker == "noise":
        for draw in range(NOISE_DRAWS):
            yield noisy(name, x_BCHW, threat, stream=rng.key(job.seed, f"eval-{name}-{threat.norm}", draw, chunk))
    elif maker == "search":
        stream = rng.key(job.seed, f"eval-search-attack-{threat.norm}", chunk)
        yield random_search(model, x_BCHW, y_B, region=threat.region(x_BCHW), size=patch_change(threat, x_BCHW),
                            queries=job.queries, stream=stream)
    else:
        seed = chunk_seed(job.seed, threat.norm, chunk)
        if name == AUTOATTACK:
            one = autoattack(model, x_BCHW, y_B, threat, version=job.version, custom=job.custom, seed=seed)
        else:
            one = autoattack(model, x_BCHW, y_B, threat, version="standard", custom=(), seed=seed, alone=name)
        found.append(one)
        yield one.adv_BCHW


def crafted(model: nn.Module, x_BCHW: Tensor, y_B: Tensor, threat: Threat, plan: AttackPlan, *, seed: int, chunk: int,
            first: int = 0) -> Iterator[Tensor]:
    """The AEs of each restart of PGD, and of each target class. Where memory runs out, the chunk is attacked in
    halves, quarters, ...

    An image's noise does not depend on the parts, so the result is the same but for the rounding of other batch sizes.

    Args:
        first: number of the first restart, which keys its noise.
    """
    with frozen(model):
        goals = likely_wrong(model, x_BCHW, y_B, plan.targets) if plan.targets else [y_B]
    parts, one = 1, replace(plan, restarts=1)
    for number in range(plan.restarts * len(goals)):
        goal_B = goals[number % len(goals)]
        while True:
            size = -(-len(y_B) // parts)
            try:
                yield torch.cat([adv for row in range(0, len(y_B), size) for adv in restarts(
                    model, x_BCHW[row:row + size], goal_B[row:row + size], threat, one, seed=seed, chunk=chunk,
                    first=first + number, first_row=row)])
                break
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                parts *= 2
