"""Several norms for one peer: which of its threats it trains against, batch by batch, image by image, step by step.

    msd           in every step the norm whose step raises the loss most, per image (Maini, Wong and Kolter,
                  "Adversarial robustness against the union of multiple perturbation models", ICML 2020)
    random_norm   one norm per batch, at random (SAT: Madaan, Shin and Hwang, "Learning to generate noise for
                  multi-attack robustness", ICML 2021)
    EatChoice     one norm per batch, the less robust one more often (E-AT: Croce and Hein, "Adversarial robustness
                  against multiple and single l_p-threat models via quick fine-tuning of robust classifiers", ICML 2022)

The mean over norms and the worst of each image (`avg`, `max`: Tramer and Boneh, "Adversarial training and robustness
for multiple perturbations", NeurIPS 2019) need nothing of this: they combine losses (`objective.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mat_dist import rng
from mat_dist.attacks.norms import L1Region, Region, per_image
from mat_dist.attacks.pgd import Model, attack_loss

MSD_TOPS = (5, 20)  # an l1 step of MSD moves so many values, drawn anew in each step (its code, locuslab/robust_union)
EAT_UNSEEN = 0.5  # weight of every norm until all were used (its code, fra31/robust-finetuning)


def msd(model: Model, x_BCHW: Tensor, y_B: Tensor, *, regions: Sequence[Region], step_sizes: Sequence[float],
        start_BCHW: Tensor, loss: str, steps: int, stream: int) -> Tensor:
    """Multi steepest descent -> AEs (B, C, H, W), each in one of the regions, detached.

    Each step tries the step of every norm, projected onto its own region, and goes on from the one with the highest
    loss, image by image; the best point of all steps counts. A step costs one gradient and as many forwards as norms.

    Args:
        model: images in [0, 1] -> logits, frozen by the caller as for `pgd`.
        regions: feasible sets of x_BCHW, one per norm.
        step_sizes: length of a step in each region's norm. Published for CIFAR-10 (50 steps, 0.03, 0.5, 12): linf
            0.003, l2 0.05, l1 1 (the top k values by 0.05 * 20 / k each).
        start_BCHW: first iterate; published: x_BCHW.
        loss: `ce`, `kl_clean` or `margin`.
        steps: number of steps, >= 1.
        stream: key of the draws: k of the l1 steps, uniform in 5..20.
    """
    objective = attack_loss(model, x_BCHW, y_B, loss)
    adv = best = start_BCHW.detach()
    best_B = torch.full_like(x_BCHW.flatten(1)[:, 0], -torch.inf)
    owner_B = torch.zeros_like(best_B, dtype=torch.int64)
    for number in range(steps):
        leaf = adv.detach().requires_grad_(True)
        with torch.enable_grad():
            value = objective(model(leaf).to(x_BCHW.dtype)).sum()
        (grad,) = torch.autograd.grad(value, leaf)
        top = _drawn(stream, number)
        tried = [region.project(_step(region, adv, grad, size, top))
                 for region, size in zip(regions, step_sizes, strict=True)]
        with torch.no_grad():
            values_NB = torch.stack([objective(model(one).to(x_BCHW.dtype)) for one in tried])
        value_B, which_B = values_NB.max(0)
        adv = _pick(tried, which_B)
        better_B = value_B > best_B
        best = torch.where(per_image(better_B, adv), adv, best)
        best_B, owner_B = torch.where(better_B, value_B, best_B), torch.where(better_B, which_B, owner_B)
    return _pick([region.settle(best) for region in regions], owner_B)


def _step(region: Region, adv_BCHW: Tensor, grad_BCHW: Tensor, size: float, top: int) -> Tensor:
    if isinstance(region, L1Region):
        return region.step(adv_BCHW, grad_BCHW, size, min(top, region.values))
    return region.step(adv_BCHW, grad_BCHW, size)


def _drawn(stream: int, number: int) -> int:
    """How many values the l1 step of this number moves."""
    low, high = MSD_TOPS
    return low + rng.key(stream, "msd-top", number) % (high - low + 1)


def _pick(batches: Sequence[Tensor], which_B: Tensor) -> Tensor:
    """Image b of batch which_B[b] -> (B, C, H, W)."""
    picked = batches[0]
    for index, batch in enumerate(batches[1:], 1):
        picked = torch.where(per_image(which_B == index, batch), batch, picked)
    return picked


def random_norm(count: int, *, stream: int) -> int:
    """Index of the norm that a peer trains against in a step, each of `count` as likely.

    Args:
        stream: key of the step's draw.
    """
    return stream % count


@dataclass
class EatChoice:
    """E-AT's choice of a norm, published for linf and l1 (l2 follows from them): with weight 1 - robust accuracy.

    The accuracies run from the start of the training. Counts are those of the whole batch, over replicas, so that all
    ranks choose alike.

    Attributes:
        held: images per norm that were classified correctly at every point of the attack, as E-AT's code counts.
        seen: images per norm that were attacked.
    """

    held: list[int]
    seen: list[int]

    @classmethod
    def of(cls, count: int) -> EatChoice:
        """For `count` norms of which nothing is known."""
        return cls([0] * count, [0] * count)

    def weights(self) -> list[float]:
        """Chance of each norm; they sum to 1."""
        if all(self.seen):
            raw = [1 - held / seen for held, seen in zip(self.held, self.seen, strict=True)]
        else:
            raw = [EAT_UNSEEN] * len(self.seen)
        total = sum(raw)
        # A model that withstands everything leaves no weight.
        return [weight / total for weight in raw] if total > 0 else [1 / len(raw)] * len(raw)

    def choose(self, *, stream: int) -> int:
        """Index of the norm of a step, keyed by `stream`; the same wherever the counts are the same."""
        u = rng.uniform(stream, (1,), dtype=torch.float64).item()
        for index, weight in enumerate(self.weights()[:-1]):
            if u < weight:
                return index
            u -= weight
        return len(self.seen) - 1

    def update(self, norm: int, held: int, seen: int) -> None:
        """Count an attacked batch: `held` of `seen` images withstood the attack of index `norm`."""
        self.held[norm] += held
        self.seen[norm] += seen

    def state(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"held": list(self.held), "seen": list(self.seen)}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state of as many norms."""
        self.held, self.seen = list(state["held"]), list(state["seen"])
