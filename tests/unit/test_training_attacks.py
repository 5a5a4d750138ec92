"""N-FGSM against its formula, written here from the paper; attacks guided by teachers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mat_dist import rng
from mat_dist.attacks.pgd import attack_loss, n_fgsm
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


def test_an_attack_without_a_teacher_moves_away_from_its_own_clean_prediction() -> None:
    (model,) = nets(1)
    x, y = batch(0)
    logits = model.eval()(x + 0.1)
    alone = attack_loss(model, x, y, "kl_teacher")(logits)
    assert torch.equal(alone, attack_loss(model, x, y, "kl_clean")(logits))
    assert not torch.equal(alone, attack_loss(model, x, y, "kl_teacher", torch.zeros_like(logits))(logits))
