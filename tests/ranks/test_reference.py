"""The package against a plain single-process MAT that was written from the formula alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mat_dist import streams
from tests.cohorts import BATCH, CLASSES, SHAPE, Net, batch, cohort_config, nets, train

P, STEPS, ATTACK_STEPS, LR, MOMENTUM, DECAY = 3, 5, 4, 0.1, 0.9, 5e-4
PRESETS = ["at", "mat_share", "mat_kd", "dml_at", "mat", "trades", "mat_trades", "cat"]
Weights = dict[str, Tensor]


class Reference:
    """One peer as plain tensors: own forward, own BN, own PGD, own SGD."""

    def __init__(self, net: Net) -> None:
        state = copy.deepcopy(net).state_dict()
        names = ["body.0.weight", "body.1.weight", "body.1.bias", "body.3.weight", "body.4.weight", "body.4.bias",
                 "body.7.weight", "body.7.bias"]
        self.w: list[Tensor] = [state[n].clone().requires_grad_() for n in names]
        self.velocity = [torch.zeros_like(w) for w in self.w]
        self.running = [state["body.1.running_mean"].clone(), state["body.1.running_var"].clone(),
                        state["body.4.running_mean"].clone(), state["body.4.running_var"].clone()]
        self.names = names

    def _norm(self, h: Tensor, which: int, gain: Tensor, bias: Tensor,
              stats: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        if stats is None:  # evaluation: running statistics
            mean, var = self.running[2 * which], self.running[2 * which + 1]
        else:
            mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)
            stats.append((mean.detach(), h.var((0, 2, 3), unbiased=True).detach()))
        shape = (1, -1, 1, 1)
        return (h - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt() * gain.view(shape) + bias.view(shape)

    def logits(self, x: Tensor, stats: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        w = self.w
        h = torch.relu(self._norm(F.conv2d(x, w[0], padding=1), 0, w[1], w[2], stats))
        h = torch.relu(self._norm(F.conv2d(h, w[3], stride=2, padding=1), 1, w[4], w[5], stats))
        return h.flatten(1) @ w[6].T + w[7]

    def attack(self, x: Tensor, y: Tensor, noise: Tensor, norm: str, eps: float, trades: bool) -> Tensor:
        clean = self.logits(x, None).detach().log_softmax(1)
        adv = self._project(x + noise, x, norm, eps)
        for _ in range(ATTACK_STEPS):
            adv = adv.detach().requires_grad_()
            z = self.logits(adv, None).log_softmax(1)
            loss = (clean.exp() * (clean - z)).sum() if trades else -z[torch.arange(len(y)), y].sum()
            (g,) = torch.autograd.grad(loss, adv)
            size = 2.5 * eps / ATTACK_STEPS
            move = g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            adv = self._project(adv.detach() + size * move, x, norm, eps)
        return adv.detach()

    @staticmethod
    def _project(adv: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
        delta = adv - x
        if norm == "linf":
            delta = delta.clamp(-eps, eps)
        else:
            delta = delta * (eps / delta.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
        return (x + delta).clamp(0, 1)

    def settle(self, learned: list[list[tuple[Tensor, Tensor]]]) -> None:
        """Move the running statistics by every learned forward; all of them together weigh as one step."""
        m = 1 - (1 - 0.1) ** (1 / len(learned))
        for stats in learned:
            for which, (mean, var) in enumerate(stats):
                self.running[2 * which] = (1 - m) * self.running[2 * which] + m * mean
                self.running[2 * which + 1] = (1 - m) * self.running[2 * which + 1] + m * var

    def descend(self, loss: Tensor) -> None:
        for i, g in enumerate(torch.autograd.grad(loss, self.w)):
            self.velocity[i] = MOMENTUM * self.velocity[i] + g + DECAY * self.w[i].detach()
            self.w[i] = (self.w[i].detach() - LR * self.velocity[i]).requires_grad_()


def ce(z: Tensor, y: Tensor) -> Tensor:
    return -z.log_softmax(1)[torch.arange(len(y)), y].mean()


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student), mean over images, teacher constant unless it carries a gradient."""
    return (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1).mean()


def formula(preset: str, k: int, z: Callable[[int, Any], Tensor], t: Callable[[int, Any], Tensor], y: Tensor) -> Tensor:
    """L_k of each preset as docs/method.md writes it. z(k, slot): peer k's logits; t(i, slot): the same, constant."""
    others = [i for i in range(P) if i != k]
    def opinion(slot: int) -> Tensor:
        return sum(kl(t(i, slot), z(k, slot)) for i in others) / len(others)  # type: ignore[return-value]
    everywhere = lambda: sum(opinion(j) for j in range(P)) / P  # noqa: E731
    trades = lambda: ce(z(k, "clean"), y) + 6 * kl(z(k, "clean"), z(k, k))  # noqa: E731
    if preset == "at":
        return ce(z(k, k), y)
    if preset == "mat_share":
        return sum(ce(z(k, j), y) for j in range(P)) / P  # type: ignore[return-value]
    if preset == "mat_kd":
        return 0.5 * ce(z(k, k), y) + 0.5 * opinion(k)
    if preset == "dml_at":
        return 0.5 * ce(z(k, k), y) + 0.5 * sum(kl(t(i, i), z(k, k)) for i in others) / len(others)
    if preset == "mat":
        return 0.5 * ce(z(k, k), y) + 0.5 * everywhere()
    if preset == "trades":
        return trades()
    if preset == "mat_trades":
        return trades() + 0.5 * everywhere()
    assert preset == "cat"
    if k % 2 == 0:
        return trades() / 20 + 19 / 20 * opinion(k)
    alp = 0.5 * ce(z(k, k), y) + 0.5 * ce(z(k, "clean"), y) + ((z(k, k) - z(k, "clean")) ** 2).mean()
    return alp / 20 + 19 / 20 * opinion(k)


def learned_slots(preset: str, k: int) -> list[Any]:
    """Inputs with a gradient, in the order that the running statistics see them: others, clean, own."""
    others = [j for j in range(P) if j != k]
    return {"at": [k], "mat_share": [*others, k], "mat_kd": [k], "dml_at": [k], "mat": [*others, k],
            "trades": ["clean", k], "mat_trades": [*others, "clean", k], "cat": ["clean", k]}[preset]


def reference_step(peers: list[Reference], preset: str, x: Tensor, y: Tensor, noises: list[Tensor], norm: str,
                   eps: float) -> None:
    """One mutual step of all peers at once."""
    def trades_attack(k: int) -> bool:
        return preset in ("trades", "mat_trades") or (preset == "cat" and k % 2 == 0)
    aes = [p.attack(x, y, noises[k], norm, eps, trades_attack(k)) for k, p in enumerate(peers)]
    inputs: dict[Any, Tensor] = {**dict(enumerate(aes)), "clean": x}
    stats: dict[Any, list[tuple[Tensor, Tensor]]] = {(k, s): [] for k in range(P) for s in inputs}
    table = {(k, s): peers[k].logits(inputs[s], stats[k, s]) for k in range(P) for s in inputs}
    losses = [formula(preset, k, lambda i, s: table[i, s], lambda i, s: table[i, s].detach(), y) for k in range(P)]
    for k, p in enumerate(peers):
        p.descend(losses[k])
        p.settle([stats[k, s] for s in learned_slots(preset, k)])


def start_noise(preset: str, k: int, step: int, norm: str, eps: float, x: Tensor) -> Tensor:
    """The start noise as a tensor, from the published keys of the streams."""
    key = streams.key(0, "attack", step, k)
    if preset in ("trades", "mat_trades") or (preset == "cat" and k % 2 == 0):
        return 0.001 * streams.normal(key, x.shape, dtype=torch.float64)
    if norm == "linf":
        return eps * (2 * streams.uniform(key, x.shape, dtype=torch.float64) - 1)
    direction = streams.normal(key, x.shape, dtype=torch.float64)
    radius = eps * streams.uniform(streams.key(key, "radius"), (len(x),), dtype=torch.float64) ** (1 / x[0].numel())
    return direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * radius.view(-1, 1, 1, 1)


@pytest.mark.parametrize("norm,eps", [("linf", 0.1), ("l2", 0.8)])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_equals_the_plain_formula_over_5_steps(preset: str, norm: str, eps: float,
                                                            run_ranks: Callable[..., list[Any]]) -> None:
    assert len({P, BATCH, CLASSES, SHAPE[0]}) == 4  # equal sizes would hide a wrong axis
    models = nets(P, dtype=torch.float64)
    config = cohort_config(preset, P, norm=norm, eps=eps, steps=ATTACK_STEPS, step={"precision": "fp64"})
    (cohort,) = run_ranks(lambda mesh: train(config, mesh, models, STEPS, dtype=torch.float64), P, 1)
    peers = [Reference(m) for m in models]  # type: ignore[arg-type]
    for step in range(STEPS):
        x, y = batch(step, dtype=torch.float64)
        reference_step(peers, preset, x, y, [start_noise(preset, k, step, norm, eps, x) for k in range(P)], norm, eps)
    for ours, theirs in zip(cohort.peers, peers, strict=True):
        state = ours.model.state_dict()
        for name, value in zip(theirs.names, theirs.w, strict=True):
            assert (state[name] - value).abs().max() < 1e-9, f"{ours.name} {name}"
        statistics = [f"body.{layer}.running_{kind}" for layer in (1, 4) for kind in ("mean", "var")]
        for name, value in zip(statistics, theirs.running, strict=True):
            assert (state[name] - value).abs().max() < 1e-9, f"{ours.name} {name}"
        moved = (state["body.0.weight"] - models[ours.index].state_dict()["body.0.weight"]).abs().max()
        assert moved > 1e-3  # the comparison is of weights that learned
