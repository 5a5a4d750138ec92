"""A plain mutual adversarial training in one process, written from the formulas: own forward, BN, PGD, SGD.

Nothing of the package but keyed random numbers, and the sets of l1 and MSD, which have slow references of their own
(tests/unit/test_norms.py, tests/unit/test_union.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.norms import Threat

LR, MOMENTUM, DECAY = 0.1, 0.9, 5e-4
Stats = list[tuple[Tensor, Tensor]]
Slot = Any  # number of the peer that made the AEs, "clean", or ("own", n) for the n-th threat of a union


class Reference:
    """One peer of `tests.cohorts.Net` as plain tensors."""

    names = ("body.0.weight", "body.1.weight", "body.1.bias", "body.3.weight", "body.4.weight", "body.4.bias",
             "body.7.weight", "body.7.bias")
    statistics = tuple(f"body.{layer}.running_{kind}" for layer in (1, 4) for kind in ("mean", "var"))

    def __init__(self, net: nn.Module) -> None:
        state = copy.deepcopy(net).state_dict()
        self.w: list[Tensor] = [state[n].clone().requires_grad_() for n in self.names]
        self.velocity = [torch.zeros_like(w) for w in self.w]
        self.running = [state[n].clone() for n in self.statistics]
        self.ema = [t.detach().clone() for t in (*self.w, *self.running)]

    def _norm(self, h: Tensor, which: int, gain: Tensor, bias: Tensor, stats: Stats | None) -> Tensor:
        if stats is None:  # evaluation: running statistics
            mean, var = self.running[2 * which], self.running[2 * which + 1]
        else:
            mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)
            stats.append((mean.detach(), h.var((0, 2, 3), unbiased=True).detach()))
        shape = (1, -1, 1, 1)
        return (h - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt() * gain.view(shape) + bias.view(shape)

    def logits(self, x: Tensor, stats: Stats | None) -> Tensor:
        """With batch statistics, noted in `stats`, or (None) with the running ones."""
        w = self.w
        h = torch.relu(self._norm(F.conv2d(x, w[0], padding=1), 0, w[1], w[2], stats))
        h = torch.relu(self._norm(F.conv2d(h, w[3], stride=2, padding=1), 1, w[4], w[5], stats))
        return h.flatten(1) @ w[6].T + w[7]

    def averaged_logits(self, x: Tensor) -> Tensor:
        """Of the averaged weights and statistics, in eval mode."""
        other = copy.copy(self)
        other.w, other.running = self.ema[:len(self.w)], self.ema[len(self.w):]
        return other.logits(x, None).detach()

    def attack(self, x: Tensor, y: Tensor, noise: Tensor, threat: Threat, *, steps: int, loss: str = "ce",
               guide: Tensor | None = None, held: list[Tensor] | None = None) -> Tensor:
        """PGD of 2.5 eps / steps; `guide` are the log-probabilities that kl_teacher moves away from; `held` takes
        which images are right at each of its points."""
        target = self.logits(x, None).detach().log_softmax(1) if guide is None else guide
        adv = project(x + noise, x, threat)
        for _ in range(steps):
            adv = adv.detach().requires_grad_()
            z = self.logits(adv, None).log_softmax(1)
            value = ce_per_image(z, y) if loss == "ce" else (target.exp() * (target - z)).sum(1)
            (g,) = torch.autograd.grad(value.sum(), adv)
            if held is not None:
                held.append(z.argmax(1) == y)
            adv = project(step_along(g, adv.detach(), x, threat, 2.5 * threat.eps / steps), x, threat)
        if held is not None:
            held.append(self.logits(adv, None).argmax(1) == y)
        return adv.detach()

    def settle(self, learned: list[Stats]) -> None:
        """Move the running statistics by every learned forward; all of them together weigh as one step."""
        m = 1 - (1 - 0.1) ** (1 / len(learned))
        for stats in learned:
            for which, (mean, var) in enumerate(stats):
                self.running[2 * which] = (1 - m) * self.running[2 * which] + m * mean
                self.running[2 * which + 1] = (1 - m) * self.running[2 * which + 1] + m * var

    def descend(self, gradients: tuple[Tensor, ...]) -> None:
        """SGD with momentum and weight decay."""
        for i, g in enumerate(gradients):
            self.velocity[i] = MOMENTUM * self.velocity[i] + g + DECAY * self.w[i].detach()
            self.w[i] = (self.w[i].detach() - LR * self.velocity[i]).requires_grad_()

    def average(self, decay: float, step: int) -> None:
        """Averaged weights with the warm-up min(decay, (1 + t) / (10 + t))."""
        d = min(decay, (1 + step) / (10 + step))
        now = [t.detach() for t in (*self.w, *self.running)]
        self.ema = [d * old + (1 - d) * new for old, new in zip(self.ema, now, strict=True)]

    def differences(self, state: dict[str, Tensor]) -> float:
        """Largest difference of weights and running statistics from those of a module."""
        mine = zip((*self.names, *self.statistics), (*self.w, *self.running), strict=True)
        return max((state[name] - value.detach()).abs().max().item() for name, value in mine)


def project(adv: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """Into the ball round x and into [0, 1]."""
    if threat.norm == "l1":
        return threat.region(x).project(adv)
    delta = adv - x
    if threat.norm == "linf":
        delta = delta.clamp(-threat.eps, threat.eps)
    else:
        delta = delta * (threat.eps / delta.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
    return (x + delta).clamp(0, 1)


def step_along(g: Tensor, adv: Tensor, x: Tensor, threat: Threat, size: float) -> Tensor:
    """A step of a length along a gradient, not yet projected."""
    if threat.norm == "l1":
        return threat.region(x).step(adv, g, size)
    move = g.sign() if threat.norm == "linf" else g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return adv + size * move


def start_noise(key: int, kind: str, threat: Threat, x: Tensor) -> Tensor:
    """The start noise as a tensor, from the published keys of the streams."""
    if kind == "gaussian":
        return 0.001 * rng.normal(key, x.shape, dtype=torch.float64)
    if threat.norm == "linf":
        return threat.eps * (2 * rng.uniform(key, x.shape, dtype=torch.float64) - 1)
    direction = rng.normal(key, x.shape, dtype=torch.float64)
    if threat.norm == "l1":  # projected by the attack; of the length that the package's own start has
        return threat.region(x).start("uniform", stream=key) - x
    radius = threat.eps * rng.uniform(rng.key(key, "radius"), (len(x),),
                                          dtype=torch.float64) ** (1 / x[0].numel())
    return direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * radius.view(-1, 1, 1, 1)


def ce(z: Tensor, y: Tensor) -> Tensor:
    return ce_per_image(z, y).mean()


def ce_per_image(z: Tensor, y: Tensor) -> Tensor:
    if y.ndim == 2:  # mixed labels: each class by its share
        return -sum(y[:, k] * z.log_softmax(1)[:, k] for k in range(y.shape[1]))  # type: ignore[return-value]
    return -z.log_softmax(1)[torch.arange(len(y)), y]


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student), mean over images, teacher constant unless it carries a gradient."""
    return kl_per_image(teacher, student).mean()


def kl_per_image(teacher: Tensor, student: Tensor) -> Tensor:
    return (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1)


class Table:
    """Train-mode logits of a step, each computed once: of peer k on a slot."""

    def __init__(self, peers: list[Reference], inputs: Callable[[int, Slot], Tensor], fixed: set[int]) -> None:
        self._peers, self._inputs, self._fixed = peers, inputs, fixed
        self._known: dict[tuple[int, Slot], Tensor] = {}
        self.stats: dict[tuple[int, Slot], Stats] = {}

    def z(self, k: int, slot: Slot) -> Tensor:
        """Logits with graph; of a frozen peer in eval mode."""
        if (k, slot) not in self._known:
            stats = self.stats[k, slot] = []
            self._known[k, slot] = self._peers[k].logits(self._inputs(k, slot), None if k in self._fixed else stats)
        return self._known[k, slot]

    def t(self, i: int, slot: Slot) -> Tensor:
        """The same, constant."""
        return self.z(i, slot).detach()
