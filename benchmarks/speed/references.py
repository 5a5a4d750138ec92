"""Mutual adversarial training as research repositories write it: what `benchmarks.speed naive` compares with.

Frozen before the step of mat_dist was tuned; do not make it faster. Imports nothing of mat_dist. fp32, contiguous
layout, one process, peers one after another. What repositories do and what it costs (*naive*):

- the attack calls `loss.backward()`, so every attack pass computes weight gradients that nobody reads, and leaves
  the model in train mode, so batch norm also computes and stores statistics;
- the teachers' logits are computed again for every pair of student and teacher;
- `.item()` on every loss of every step;
- images come one by one from a DataLoader with torchvision's PIL transforms.

*Careful* is the same with an eval-mode attack that differentiates the input only. The mathematics is that of preset
`mat` (docs/loss.md), or of `at`, where each peer learns from its own AEs alone: the same adversarial examples give
the same losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms


@dataclass(frozen=True)
class Recipe:
    """What both trainers are told: the l_inf attack, and the weights of preset `mat`, or of `at`."""

    eps: float
    step_size: float
    attack_steps: int
    hard_weight: float
    kd_weight: float


class Images(Dataset[tuple[Tensor, int]]):
    """uint8 images (N, H, W, C) through PIL: pad 4 and crop, mirror, to tensor."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.numpy(), labels.tolist()
        self.transform = transforms.Compose([
            transforms.RandomCrop(images.shape[1], padding=4), transforms.RandomHorizontalFlip(),
            transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return self.transform(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)), self.labels[index]


def batches(images: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end. No worker processes: their CPU time would not be counted."""
    loader = DataLoader(Images(images, labels), batch_size, shuffle=True, drop_last=True, num_workers=0)
    while True:
        yield from loader


def naive_attack(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe) -> Tensor:
    """PGD on one model, as most repositories write it."""
    model.train()
    x_adv = x + torch.empty_like(x).uniform_(-recipe.eps, recipe.eps)
    x_adv = torch.clamp(x_adv, 0, 1)
    for _ in range(recipe.attack_steps):
        x_adv.requires_grad_()
        loss = F.cross_entropy(model(x_adv), y)
        model.zero_grad()
        loss.backward()
        assert x_adv.grad is not None
        x_adv = x_adv.detach() + recipe.step_size * x_adv.grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - recipe.eps), x + recipe.eps)
        x_adv = torch.clamp(x_adv, 0, 1)
    return x_adv.detach()


def careful_attack(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, start: Tensor | None = None) -> Tensor:
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


Attack = Callable[[nn.Module, Tensor, Tensor, Recipe], Tensor]


def mutual_losses(models: Sequence[nn.Module], aes: Sequence[Tensor], y: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """The loss of each peer, with graph, one after another."""
    peers = len(models)
    for i, model in enumerate(models):
        model.train()
        loss = torch.zeros((), device=y.device)
        for j, x_adv in enumerate(aes):
            if j != i and not recipe.kd_weight:  # preset `at`: peers learn alone
                continue
            logits = model(x_adv)
            if j == i:
                loss = loss + recipe.hard_weight * F.cross_entropy(logits, y)
            for k, teacher in enumerate(models):
                if k != i and recipe.kd_weight:
                    with torch.no_grad():
                        target = F.softmax(teacher(x_adv), dim=1)
                    loss = loss + recipe.kd_weight / peers / (peers - 1) * F.kl_div(
                        F.log_softmax(logits, dim=1), target, reduction="batchmean")
        yield loss


def train_step(models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer], x: Tensor, y: Tensor,
               recipe: Recipe, attack: Attack = naive_attack) -> list[float]:
    """One step of all peers -> their losses."""
    aes = [attack(model, x, y, recipe) for model in models]
    for optimizer in optimizers:
        optimizer.zero_grad()
    told = []
    for loss in mutual_losses(models, aes, y, recipe):
        loss.backward()
        told.append(loss.item())
    for optimizer in optimizers:
        optimizer.step()
    return told
