"""Gradient projection: what natural training would do, as far as adversarial training agrees (RAMP: Jiang and Singh,
NeurIPS 2024, equations 4 to 7; there the updates of whole epochs are combined, here the gradients of a step, as in its
definition 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class NaturalGradient:
    """The gradient of natural training in a step, summed over micro-batches, until it is projected.

    Attributes:
        parts: for each trainable parameter, in order; empty where there is none. Replicas average them.
    """

    def __init__(self, model: nn.Module, beta: float) -> None:
        self._model, self._beta = model, beta
        self.parts: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Add the gradient of a loss on clean images; zeros where a parameter took no part."""
        trainable = [p for p in self._model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, trainable, allow_unused=True, materialize_grads=True)
        self.parts = [a + b for a, b in zip(self.parts, found, strict=True)] if self.parts else list(found)

    def project(self, adversarial: Sequence[Tensor]) -> None:
        """Mix it into the gradients of the training loss, in place, and forget it."""
        if self.parts:
            project(adversarial, self.parts, self._beta)
        self.parts = []


@torch.no_grad()
def project(adversarial: Sequence[Tensor], natural: Sequence[Tensor], beta: float) -> None:
    """(1 - beta) g_a + beta max(0, cos(g_a, g_n)) g_n takes the place of each g_a, tensor by tensor.

    Single numbers are left alone, as in the authors' code. A gradient of zero has no direction: its cosine is 0.

    Args:
        adversarial: gradient of the training loss for each parameter; changed in place.
        natural: gradient of the loss on clean images.
        beta: weight of the natural part, in [0, 1).
    """
    for g_a, g_n in zip(adversarial, natural, strict=True):
        if g_a.ndim == 0:
            continue
        length = g_a.norm() * g_n.norm()
        cosine = (g_a * g_n).sum() / length.clamp(min=torch.finfo(length.dtype).tiny)
        g_a.mul_(1 - beta).add_(g_n * (beta * cosine.clamp(min=0)))
