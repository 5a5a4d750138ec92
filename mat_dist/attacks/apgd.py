"""Auto-PGD: gradient ascent that sets its own step length, image by image.

`apgd` is one search in one ball, `narrowing`, for l1, one in larger balls before. `_Halving`: Croce and Hein, "Reliable
evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks", ICML 2020: momentum, and a
step that is halved where the loss no longer rises. `_Sparsity`, for l1: Croce and Hein, "Mind the box", ICML 2021: no
momentum, and a step moves fewer values as the perturbation grows sparse. Everything that is decided per image is
decided on the device: no word to the host inside the loop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mat_dist import rng
from mat_dist.attacks.norms import Region, Threat, per_image
from mat_dist.attacks.pgd import Model, attack_loss, likeliest, loss_and_gradient
from mat_dist.config.norms import known_norms

MOMENTUM = 0.75  # weight of the new step; the rest repeats the last move (2020, eq. 3)
RISES = 0.75  # share of the steps since the last check that must raise the loss (2020, rho)
FIRST_CHECK, CHECK_FALL, LEAST_CHECK = 0.22, 0.03, 0.06  # of the steps (2020, section 3.2)
SPARSE_CHECK = 0.04  # of the steps, and the figures below: authors' code (fra31/auto-attack)
SPARSER = 1.5  # a step moves so many times fewer values than the best perturbation has
SPARSITY_FELL = 0.95  # below this share of the last count the step starts again at its full length
SHORTER, SHORTEST = 1.5, 10.0  # divisor of the step otherwise, and the largest divisor
RADII, LARGER = (3, 2, 1), 0.3  # of the balls, in eps, and share of the steps in each but the last (2021)
# Shares of the values that move in the first steps in a sparse norm: of an evaluation (authors' code), and in training
# (E-AT's code).
APGD_L1_SHARE, APGD_SHARE = 0.2, 0.05


class Apgd(NamedTuple):
    """The iterate with the highest loss, the start included; the newest one that is misclassified, where none is the
    best one; whether all iterates are classified correctly (bool)."""

    best_BCHW: Tensor
    wrong_BCHW: Tensor
    held_B: Tensor


def apgd(model: Model, x_BCHW: Tensor, y_B: Tensor, *, region: Region, start_BCHW: Tensor, loss: str, steps: int,
         step_size: float | None = None, teacher_BK: Tensor | None = None, goes_on: bool = False) -> Apgd:
    """Auto-PGD: `steps` gradients and steps + 1 forwards; arguments as those of `pgd`, but for two.

    Args:
        region: the `share` of a sparse one is that of the first steps.
        step_size: length of the first step; default: the norm's `apgd_step`.
        goes_on: in a sparse norm the start tells how many values the first steps move, as the best point does later.
    """
    objective = attack_loss(model, x_BCHW, y_B, loss, teacher_BK)
    if step_size is None:
        step_size = known_norms()[region.name].apgd_step * region.eps
    begun = start_BCHW if goes_on else None
    pace = _Sparsity(region, steps, step_size, begun) if region.sparse else _Halving(region, steps, step_size)
    adv, label_B = start_BCHW.detach(), likeliest(y_B)
    logits_BK, value_B, grad = loss_and_gradient(model, objective, adv)
    best, best_B, best_grad = adv, value_B, grad
    wrong, held_B = adv, logits_BK.argmax(-1) == label_B
    rises_B = torch.zeros_like(value_B)
    for number in range(1, steps + 1):
        adv, last_B = pace.move(adv, grad), value_B
        logits_BK, value_B, grad = loss_and_gradient(model, objective, adv, gradient=number < steps)
        fooled_B = logits_BK.argmax(-1) != label_B
        wrong, held_B = _where(fooled_B, adv, wrong), held_B & ~fooled_B
        better_B = value_B > best_B
        best, best_grad = _where(better_B, adv, best), _where(better_B, grad, best_grad)
        best_B = torch.where(better_B, value_B, best_B)
        rises_B = rises_B + (value_B > last_B)
        if number in pace.checks:
            back_B = pace.check(best, best_B, rises_B)
            adv, grad = _where(back_B, best, adv), _where(back_B, best_grad, grad)
            rises_B = torch.zeros_like(rises_B)
    return Apgd(region.round_inward(best), region.round_inward(_where(held_B, best, wrong)), held_B)


def narrowing(model: Model, x_BCHW: Tensor, y_B: Tensor, *, threat: Threat, share: float, stream: int | None,
              first_row: int, loss: str, steps: int, step_size: float) -> Apgd:
    """Auto-PGD in balls of three, two and one times the radius, each from the best point of the one before, brought
    into the smaller ball: `steps` gradients and up to steps + 3 forwards, in a sparse norm.

    It starts at normal noise of the key `stream`, brought into the largest ball; without a stream at x_BCHW, with steps
    that move `share` of the values. `step_size` is the first one in the smallest ball, in proportion in the others.
    """
    point, count = x_BCHW, int(LARGER * steps)
    if stream is not None:
        point = x_BCHW + rng.normal(stream, x_BCHW.shape, first_row=first_row, device=x_BCHW.device, dtype=x_BCHW.dtype)
    for factor, number in zip(RADII, (count, count, steps - 2 * count), strict=True):
        if number:  # few steps are for the smallest ball
            region = threat.scaled(factor).region(x_BCHW, share)
            found = apgd(model, x_BCHW, y_B, region=region, start_BCHW=region.inside(point), loss=loss, steps=number,
                         step_size=factor * step_size, goes_on=point is not x_BCHW)
            point = found.best_BCHW
    return found


def _where(rows_B: Tensor, yes_BCHW: Tensor, no_BCHW: Tensor) -> Tensor:
    return torch.where(per_image(rows_B, yes_BCHW), yes_BCHW, no_BCHW)


class _Halving:
    """Halve the step where too few steps raised the loss, or where a step that was kept gained nothing.

    Attributes:
        checks: numbers of the steps, from 1, after which `check` is asked.
    """

    def __init__(self, region: Region, steps: int, size: float) -> None:
        self._region = region
        self._last: Tensor | None = None  # the iterate before
        self._size_B = region.x.new_full((len(region.x),), size)
        self._halved_B = torch.ones_like(self._size_B, dtype=torch.bool)  # the first check asks for no gain
        self._best_B = torch.zeros_like(self._size_B)  # at the last check
        distance, number = max(int(FIRST_CHECK * steps), 1), 0
        places, self._distances = [], []
        while (number := number + distance) <= steps:
            places.append(number)
            self._distances.append(distance)
            distance = max(distance - max(int(CHECK_FALL * steps), 1), max(int(LEAST_CHECK * steps), 1))
        self.checks = frozenset(places)
        self._passed = 0

    def move(self, adv_BCHW: Tensor, grad_BCHW: Tensor) -> Tensor:
        """The next iterate, projected."""
        new = self._region.project(self._region.step(adv_BCHW, grad_BCHW, self._size_B))
        if self._last is not None:
            again = (1 - MOMENTUM) * (adv_BCHW - self._last)
            new = self._region.project(adv_BCHW + MOMENTUM * (new - adv_BCHW) + again)
        self._last = adv_BCHW
        return new

    def check(self, best_BCHW: Tensor, best_B: Tensor, rises_B: Tensor) -> Tensor:
        """Set the step length anew, from the best iterate, its loss, and the number of steps since the last check that
        raised the loss -> the images that go back to their best point (bool (B,))."""
        swings_B = rises_B <= RISES * self._distances[self._passed]
        stuck_B = ~self._halved_B & (self._best_B >= best_B)
        self._halved_B = swings_B | stuck_B
        self._size_B = torch.where(self._halved_B, self._size_B / 2, self._size_B)
        self._best_B = best_B
        self._passed += 1
        return self._halved_B


class _Sparsity:
    """As `_Halving`: from the number of values that the best perturbation changes follow the next steps' number and
    length. `begun`: a start that they follow too."""

    def __init__(self, region: Region, steps: int, size: float, begun: Tensor | None) -> None:
        self._region, self._size = region, size
        self._size_B = region.x.new_full((len(region.x),), size)
        self._changed_B = torch.full_like(self._size_B, region.x[0].numel())
        self._top: Tensor | None = None  # by the region's share at first
        if begun is not None:
            self._follow(begun)
        distance = max(int(SPARSE_CHECK * steps), 1)
        self.checks = frozenset(range(distance, steps + 1, distance))

    def move(self, adv_BCHW: Tensor, grad_BCHW: Tensor) -> Tensor:
        return self._region.project(self._region.step(adv_BCHW, grad_BCHW, self._size_B, self._top))

    def check(self, best_BCHW: Tensor, best_B: Tensor, rises_B: Tensor) -> Tensor:
        before_B = self._changed_B
        self._follow(best_BCHW)
        sparser_B = self._changed_B < SPARSITY_FELL * before_B
        shorter_B = (self._size_B / SHORTER).clamp(min=self._size / SHORTEST)
        self._size_B = torch.where(sparser_B, self._size, shorter_B)
        return sparser_B

    def _follow(self, best_BCHW: Tensor) -> None:
        changed_B = (best_BCHW != self._region.x).flatten(1).sum(1)
        self._top = (changed_B / SPARSER).ceil().long().clamp(min=1)
        self._changed_B = changed_B.to(self._size_B.dtype)
