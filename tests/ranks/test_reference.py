"""The package against a plain single-process MAT that was written from the formula alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mat_dist import rng
from mat_dist.attacks.norms import Threat
from tests.cohorts import BATCH, CLASSES, SHAPE, batch, cohort_config, nets, train
from tests.reference_mat import Reference, Table, ce, kl, start_noise

P, STEPS, ATTACK_STEPS = 3, 5, 4
PRESETS = ["at", "mat_share", "mat_kd", "dml_at", "mat", "trades", "mat_trades", "cat"]


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


def trades_attack(preset: str, k: int) -> bool:
    """Whether a peer's attack is that of TRADES: KL from a normal start."""
    return preset in ("trades", "mat_trades") or (preset == "cat" and k % 2 == 0)


def reference_step(peers: list[Reference], preset: str, step: int, threat: Threat) -> None:
    """One mutual step of all peers at once."""
    x, y = batch(step, dtype=torch.float64)
    aes = []
    for k, peer in enumerate(peers):
        start, loss = ("gaussian", "kl_clean") if trades_attack(preset, k) else ("uniform", "ce")
        noise = start_noise(rng.key(0, "attack", step, k), start, threat, x)
        aes.append(peer.attack(x, y, noise, threat, steps=ATTACK_STEPS, loss=loss))
    table = Table(peers, lambda k, slot: x if slot == "clean" else aes[slot], set())
    losses = [formula(preset, k, table.z, table.t, y) for k in range(P)]
    gradients = [torch.autograd.grad(loss, peer.w, retain_graph=True) for loss, peer in zip(losses, peers, strict=True)]
    for k, peer in enumerate(peers):
        peer.descend(gradients[k])
        peer.settle([table.stats[k, slot] for slot in learned_slots(preset, k)])


@pytest.mark.parametrize("norm,eps", [("linf", 0.1), ("l2", 0.8)])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_equals_the_plain_formula_over_5_steps(preset: str, norm: str, eps: float,
                                                            run_ranks: Callable[..., list[Any]]) -> None:
    assert len({P, BATCH, CLASSES, SHAPE[0]}) == 4  # equal sizes would hide a wrong axis
    models = nets(P, dtype=torch.float64)
    config = cohort_config(preset, P, norm=norm, eps=eps, steps=ATTACK_STEPS, step={"precision": "fp64"})
    (cohort,) = run_ranks(lambda mesh: train(config, mesh, models, STEPS, dtype=torch.float64), P, 1)
    peers = [Reference(m) for m in models]
    for step in range(STEPS):
        reference_step(peers, preset, step, Threat(norm, eps))
    for ours, theirs in zip(cohort.peers, peers, strict=True):
        state = ours.model.state_dict()
        assert theirs.differences(state) < 1e-9, ours.name
        moved = (state["body.0.weight"] - models[ours.index].state_dict()["body.0.weight"]).abs().max()
        assert moved > 1e-3  # the comparison is of weights that learned
