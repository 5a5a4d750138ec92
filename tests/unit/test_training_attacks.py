"""N-FGSM against its formula, written here from the paper; attacks guided by teachers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mat_dist import rng
from mat_dist.attacks.pgd import attack_loss, n_fgsm
from mat_dist.core.step import Batch
from tests.cohorts import batch, cohort_config, first_view, make_peer, nets

EPS = 0.05


def test_the_step_is_taken_from_noise_of_twice_the_radius_and_not_cut_to_the_ball() -> None:
    (model,) = nets(1, dtype=torch.float64)
    model.eval().requires_grad_(False)
    x, y = batch(0, dtype=torch.float64)
    found = n_fgsm(model, x, y, eps=EPS, step_size=EPS, loss="ce", stream=7, first_row=0)
    noise = (4 * rng.uniform(7, x.shape, dtype=torch.float64) - 2) * EPS
    start = (x + noise).clamp(0, 1).requires_grad_()
    F.cross_entropy(model(start), y).backward()
    assert start.grad is not None
    expected = (start.detach() + EPS * start.grad.sign()).clamp(0, 1)
    assert torch.allclose(found, expected, atol=1e-12)
    far = (found - x).abs().max()
    assert EPS < far <= 3 * EPS + 1e-12
    rows = n_fgsm(model, x[3:], y[3:], eps=EPS, step_size=EPS, loss="ce", stream=7, first_row=3)
    assert torch.allclose(rows, found[3:], atol=1e-12)  # a replica's rows


def test_a_peer_trains_with_it() -> None:
    config = cohort_config("at", 1, eps=EPS, steps=1, entry={"attack": {"method": "n_fgsm", "steps": 1}})
    assert config.peers[0].attack.step_size == pytest.approx(EPS)
    (model,) = nets(1)
    x, y = batch(0)
    adv = first_view(make_peer(model, config), x, y)
    assert adv.min() >= 0 and adv.max() <= 1 and (adv - x).abs().max() > EPS


@pytest.mark.parametrize("entry", [{"attack": {"method": "n_fgsm", "steps": 1}},
                                   *({"union": {"strategy": name, "threats": "linf:0.1,l2:1"}}
                                     for name in ("msd", "avg", "random", "eat"))], ids=str)
def test_every_attack_and_every_view_moves_away_from_what_the_guide_thinks(entry: dict[str, Any]) -> None:
    """A guide that thinks as the model does makes it TRADES' attack; another one makes another attack."""
    x, y = batch(0)
    threats = entry.get("union", {}).get("threats", "linf:0.1")
    if entry.get("union", {}).get("strategy") == "eat":
        entry = {"union": {**entry["union"], "threats": threats.replace("l2:1", "l1:4")}}

    def attacked(loss: str, guide: torch.Tensor | None) -> torch.Tensor:
        settings = {**entry, "attack": {**entry.get("attack", {"steps": 2}), "loss": loss}}
        peer = make_peer(nets(1)[0], cohort_config("at", 1, eps=EPS, entry=settings))
        return torch.stack([*peer.attack(Batch(x, y, 0), peer.row.mine, guide).values()])

    own = nets(1)[0].eval()(x).log_softmax(-1).detach()
    found = attacked("kl_teacher", own)
    assert len(found) == (2 if "avg" in str(entry) else 1)
    assert torch.allclose(found, attacked("kl_clean", None), atol=1e-5)
    other = attacked("kl_teacher", own.roll(1, 1))
    assert all((one - two).abs().max() > 1e-3 for one, two in zip(found, other, strict=True))


def test_an_attack_without_a_teacher_moves_away_from_its_own_clean_prediction() -> None:
    (model,) = nets(1)
    x, y = batch(0)
    logits = model.eval()(x + 0.1)
    alone = attack_loss(model, x, y, "kl_teacher")(logits)
    assert torch.equal(alone, attack_loss(model, x, y, "kl_clean")(logits))
    assert not torch.equal(alone, attack_loss(model, x, y, "kl_teacher", torch.zeros_like(logits))(logits))
