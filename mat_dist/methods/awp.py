"""Adversarial weight perturbation (AWP; Wu, Xia and Wang, NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence

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

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Those of `loss`, a scalar whose graph reaches the weights; replicas average them before `perturb`."""
        return list(torch.autograd.grad(loss, self._moved()))

    @torch.no_grad()
    def perturb(self, gradients: Sequence[Tensor]) -> None:
        """Move the weights along what `gradients` gave."""
        moved = self._moved()
        self._before = [(p, p.detach().clone()) for p in moved]
        for p, g in zip(moved, gradients, strict=True):
            p.add_(g * (self._gamma * p.norm() / (g.norm() + torch.finfo(g.dtype).tiny)))

    @torch.no_grad()
    def restore(self) -> None:
        """Give the weights back that `perturb` has moved."""
        for parameter, before in self._before:
            parameter.copy_(before)
        self._before = []

    def _moved(self) -> list[nn.Parameter]:
        return [p for p in self._model.parameters() if p.requires_grad and p.ndim > 1]
