"""A plain mutual adversarial training in one process, written from the formulas: own forward, BN, PGD, SGD.

Nothing of the package but keyed random numbers, and the sets of l1 and MSD, which have slow references of their own
(tests/unit/test_norms.py, tests/unit/test_methods.py). A case (`Case`) states its loss as a function of logits; `agree`
trains it here and in the package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.norms import Threat
from mat_dist.config.schema import Config
from tests import cohorts
from tests.cohorts import BATCH, CLASSES, complete, cut, nets, train

LR, MOMENTUM, DECAY = 0.1, 0.9, 5e-4
STEPS, ATTACK_STEPS = 3, 2
Stats = list[tuple[Tensor, Tensor]]
# The clean images ("clean"), the AEs of a peer for its first threat (its number), or for its n-th one (number, n).
Look = int | str | tuple[int, int]
Z = Callable[[int, Look], Tensor]
Formula = Callable[[int, Z, Z, Tensor, int], Tensor]  # (peer, logits, constant logits, labels, step) -> loss


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
    """Train-mode logits of a step, each computed once: of peer k on what it looks at."""

    def __init__(self, peers: dict[int, Reference], inputs: Callable[[Look], Tensor], fixed: set[int]) -> None:
        self._peers, self._inputs, self._fixed = peers, inputs, fixed
        self._known: dict[tuple[int, Look], Tensor] = {}
        self.stats: dict[tuple[int, Look], Stats] = {}

    def z(self, k: int, look: Look) -> Tensor:
        """Logits with graph; of a frozen peer in eval mode."""
        look = view(look)
        if (k, look) not in self._known:
            stats = self.stats[k, look] = []
            self._known[k, look] = self._peers[k].logits(self._inputs(look), None if k in self._fixed else stats)
        return self._known[k, look]

    def t(self, i: int, look: Look) -> Tensor:
        """The same, constant."""
        return self.z(i, look).detach()


def view(look: Look) -> str | tuple[int, int]:
    """The AEs of a peer alone are those for its first threat."""
    return (look, 0) if isinstance(look, int) else look


# ------------------------------------------------------------------------------------------------ cases


def images(step: int, rows: int = BATCH, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Grey ones: an l1 step treats values at 0 or 1 apart, and rounding would decide which are."""
    x, y = cohorts.batch(step, rows, dtype)
    return 0.35 + 0.3 * x, y


def mixed_images(step: int, rows: int = BATCH, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The same with mixed labels (B, K), half of them of two classes."""
    x, y = images(step, rows, dtype)
    share = torch.tensor([0.0, 0.3] * (rows // 2), dtype=dtype)[:, None]
    classes = torch.eye(CLASSES, dtype=dtype)
    return x, (1 - share) * classes[y] + share * classes[y.flip(0)]


@dataclass
class Case:
    """A cohort and what each of its peers should minimise.

    Attributes:
        peers: the entries of the configuration.
        loss: of a peer.
        learned: what it looks at with a gradient, in the order that its running statistics see it.
        own: its loss were it alone, up which its weights are moved (AWP).
        craft: its first AEs where they are not PGD on its own threat.
        guides: the teachers whose clean predictions guide its attack.
        natural: its loss on clean images, whose gradient is projected.
        images: images and labels of a step.
    """

    peers: list[dict[str, Any]]
    loss: Formula
    learned: Callable[[int, int], list[Look]]
    own: Formula | None = None
    craft: Callable[[Reference, int, int, Tensor, Tensor], Tensor] | None = None
    guides: dict[int, tuple[int, ...]] = field(default_factory=dict)
    natural: Formula | None = None
    images: Callable[..., tuple[Tensor, Tensor]] = images
    step: dict[str, Any] = field(default_factory=dict)
    attack_steps: int = ATTACK_STEPS

    def config(self, **step: Any) -> Config:
        return configured(self.peers, self.attack_steps, **{**self.step, **step})


def configured(peers: list[dict[str, Any]], attack_steps: int = ATTACK_STEPS, accumulate: int = 1,
               **step: Any) -> Config:
    """A configuration of entries in which most is left out; a loss may be a preset's name. Precision: fp64."""
    def full(loss: str | dict[str, Any]) -> dict[str, Any]:
        return {"preset": loss} if isinstance(loss, str) else loss
    entries = [{"threat": {"norm": "linf", "eps": 0.1}, **entry,
                "attack": {"steps": attack_steps, **entry.get("attack", {})}, "loss": full(entry.get("loss", "at")),
                "optim": {"lr": 0.1, "schedule": "constant", **entry.get("optim", {})}} for entry in peers]
    return complete({"peers": entries, "train": cut(accumulate), "step": {"precision": "fp64", **step}})


def threats_of(spec: Any) -> list[Threat]:
    """Of a union, or the own one."""
    union = [Threat(n, float(e)) for n, e in (t.split(":") for t in (spec.union.threats or "").split(",") if t)]
    return union or [Threat(spec.threat.norm, spec.threat.eps)]


def craft(peer: Reference, spec: Any, threat: Threat, number: int, k: int, step: int, x: Tensor, y: Tensor,
          guide: Tensor | None = None, held: list[Tensor] | None = None) -> Tensor:
    """PGD AEs of peer k for the `number`-th of its threats."""
    key = rng.key(0, "attack", step, *((number,) if number else ()), k)
    noise = start_noise(key, spec.attack.start, threat, x)
    return peer.attack(x, y, noise, threat, steps=spec.attack.steps, loss=spec.attack.loss, guide=guide, held=held)


def climb(case: Case, peer: Reference, k: int, gamma: float, inputs: Callable[[Look], Tensor], y: Tensor,
          step: int) -> list[Tensor]:
    """AWP: each weight tensor goes up the own loss by gamma times its norm -> the weights before."""
    before, passing = peer.w, Table({k: peer}, inputs, set())
    assert case.own is not None
    gradients = torch.autograd.grad(case.own(k, passing.z, passing.t, y, step), before, allow_unused=True)
    peer.w = [(w + gamma * w.norm() * g / g.norm() if w.ndim > 1 and g is not None else w).detach().requires_grad_()
              for w, g in zip(before, gradients, strict=True)]
    return before


def projected(adversarial: tuple[Tensor, ...], natural: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """RAMP, equations 4 to 7 with beta 0.5: a layer's natural gradient by its cosine, unless that is negative."""
    mixed, cosines = [], []
    for g_a, g_n in zip(adversarial, natural, strict=True):
        cosines.append(torch.cosine_similarity(g_a.flatten(), g_n.flatten(), dim=0).item())
        kept = cosines[-1] * g_n if cosines[-1] > 0 else torch.zeros_like(g_n)
        mixed.append(0.5 * kept + 0.5 * g_a)
    assert max(cosines) > 0.1
    return tuple(mixed)


def reference_step(case: Case, config: Config, peers: list[Reference], step: int) -> None:
    """One step of all peers."""
    x, y = case.images(step, BATCH, torch.float64)
    fixed, everyone = {k for k, spec in enumerate(config.peers) if spec.frozen}, dict(enumerate(peers))
    clean = Table(everyone, lambda look: x, fixed)
    aes: dict[tuple[int, int], Tensor] = {}
    for k, (peer, spec) in enumerate(zip(peers, config.peers, strict=True)):
        guide = None
        if k in case.guides:
            guide = torch.stack([clean.t(i, "clean").softmax(1) for i in case.guides[k]]).mean(0).log()
        for n, threat in enumerate(threats_of(spec)):
            aes[k, n] = (case.craft(peer, k, step, x, y) if case.craft and n == 0
                         else craft(peer, spec, threat, n, k, step, x, y, guide))

    def inputs(look: Look) -> Tensor:
        return x if isinstance(look, str) else aes[view(look)]  # type: ignore[index]

    kept = {k: climb(case, peers[k], k, spec.methods["awp"].gamma, inputs, y, step)  # type: ignore[attr-defined]
            for k, spec in enumerate(config.peers) if "awp" in spec.methods}
    table = Table(everyone, inputs, fixed)
    teach = table.t if config.step.teachers == "raw" else lambda i, look: peers[i].averaged_logits(inputs(look))
    training = [k for k in range(len(peers)) if k not in fixed]
    losses = {k: case.loss(k, table.z, teach, y, step) for k in training}
    gradients = {k: torch.autograd.grad(losses[k], peers[k].w, retain_graph=True) for k in training}
    if case.natural is not None:
        gradients = {k: projected(g, torch.autograd.grad(case.natural(k, table.z, teach, y, step), peers[k].w))
                     for k, g in gradients.items()}
    for k in training:
        peers[k].w = kept.get(k, peers[k].w)
        peers[k].descend(gradients[k])
        peers[k].settle([table.stats[k, view(look)] for look in case.learned(k, step)])
        peers[k].average(config.peers[k].optim.ema_decay or 0.0, step)


def agree(case: Case, run_ranks: Callable[..., list[Any]], steps: int = STEPS, moved: float = 1e-4) -> None:
    """Train both; weights and running statistics are equal, frozen peers as before, and the others moved by more than
    `moved`."""
    count = len(case.peers)
    assert count not in (BATCH, CLASSES)  # equal sizes would hide a wrong axis
    models, config = nets(count, dtype=torch.float64), case.config()
    (ours,) = run_ranks(lambda mesh: train(config, mesh, models, steps, data=case.images), count, 1)
    peers = [Reference(m) for m in models]
    for step in range(steps):
        reference_step(case, config, peers, step)
    for peer, theirs, model in zip(ours.peers, peers, models, strict=True):
        assert theirs.differences(peer.model.state_dict()) < 1e-9, peer.name
        change = (peer.model.state_dict()["body.0.weight"] - model.state_dict()["body.0.weight"]).abs().max()
        assert change == 0 if peer.spec.frozen else change > moved
