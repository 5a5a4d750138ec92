"""Adversarial weight perturbation (AWP; Wu, Xia and Wang, NeurIPS 2020)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightPerturbation:
    """One step up a loss in the space of weights, and back bit by bit.

    Each weight tensor of more than one dimension moves by gamma times its norm along its gradient, as the authors'
    code does.

    Args:
        gamma: length of the step relative to the weights' norm, >= 0.
    """

    def __init__(self, model: nn.Module, gamma: float) -> None:
        self._model, self._gamma = model, gamma
        self._before: list[tuple[nn.Parameter, Tensor]] = []

    def perturb(self, loss: Tensor) -> None:
        """Move the weights up `loss`, a scalar whose graph reaches them."""
        moved = [p for p in self._model.parameters() if p.requires_grad and p.ndim > 1]
        gradients = torch.autograd.grad(loss, moved)
        self._before = [(p, p.detach().clone()) for p in moved]
        with torch.no_grad():
            for p, g in zip(moved, gradients, strict=True):
                p.add_(g * (self._gamma * p.norm() / (g.norm() + torch.finfo(g.dtype).tiny)))

    @torch.no_grad()
    def restore(self) -> None:
        """Give the weights back that `perturb` has moved."""
        for parameter, before in self._before:
            parameter.copy_(before)
        self._before = []
