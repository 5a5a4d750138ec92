"""The naive trainer by a careful author: an eval-mode attack that differentiates the input only, otherwise the same.

Frozen before the step of mat_dist was tuned; do not make it faster.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import naive
from benchmarks.naive import Recipe


def attack(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, start: Tensor | None = None) -> Tensor:
    """PGD on one model in eval mode; `start` replaces the random first point."""
    model.eval()
    if start is None:
        start = torch.clamp(x + torch.empty_like(x).uniform_(-recipe.eps, recipe.eps), 0, 1)
    x_adv = start
    for _ in range(recipe.attack_steps):
        x_adv.requires_grad_()
        loss = F.cross_entropy(model(x_adv), y)
        (grad,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + recipe.step_size * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - recipe.eps), x + recipe.eps)
        x_adv = torch.clamp(x_adv, 0, 1)
    return x_adv.detach()


def train_step(models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer], x: Tensor, y: Tensor,
               recipe: Recipe) -> list[float]:
    """One step of all peers -> their losses."""
    return naive.train_step(models, optimizers, x, y, recipe, attack)
