"""Balls and boxes: exact membership in float64, steepest steps and projections against slow references."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mat_dist import rng
from mat_dist.attacks import margin, pgd
from mat_dist.attacks.norms import Threat
from mat_dist.errors import ConfigError

CASES = [("linf", 8 / 255), ("linf", 0.1), ("linf", 0.031), ("linf", 1e-4),
         ("l2", 0.5), ("l2", 128 / 255), ("l2", 3.0), ("l2", 1e-3),
         ("l1", 2.0), ("l1", 2000 / 255), ("l1", 12.0), ("l1", 1e-3), ("l1", 1e3)]


def images(key: int, shape: tuple[int, ...] = (6, 3, 8, 8), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = rng.uniform(key, shape, dtype=dtype)
    x[:1], x[1:2] = 0.0, 1.0  # the corners of the box
    x[2:3] = (x[2:3] * 255).round() / 255  # pixels as data sets have them
    return x


@pytest.mark.parametrize("norm,eps", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=15, deadline=None)
@given(key=st.integers(-(2**63), 2**63 - 1), spread=st.sampled_from([1e-3, 0.1, 10.0]))
def test_projections_and_starts_lie_in_ball_and_box(norm: str, eps: float, dtype: torch.dtype, key: int,
                                                    spread: float) -> None:
    threat, x = Threat(norm, eps), images(key, dtype=dtype)
    region = threat.region(x)
    noises = rng.normal(key ^ 1, x.shape, dtype=dtype), torch.ones_like(x)
    points = [region.settle(region.project(x + spread * noise)) for noise in noises]
    points += [threat.start(kind, region, x, stream=key) for kind in ("uniform", "gaussian", "zero")]
    for adv in points:
        assert adv.dtype == dtype and adv.min() >= 0 and adv.max() <= 1
        assert (threat.distance(adv, x) <= eps * (1 + 1e-6)).all()


@pytest.mark.parametrize("norm,eps", CASES)
def test_projection_leaves_points_of_the_region_where_they_are(norm: str, eps: float) -> None:
    x = images(3)
    region = Threat(norm, eps).region(x)
    inside = region.project(x + 0.3 * rng.normal(9, x.shape))
    again = region.project(inside)
    assert (again - inside).abs().max() <= 2e-7  # a norm that rounds to just above eps is scaled by a few ulps
    settled = region.settle(inside)
    assert torch.equal(region.settle(settled), settled)


def test_linf_projection_is_the_nearest_point_by_enumeration() -> None:
    x, eps = torch.tensor([[[[0.05, 0.5, 0.97]]]], dtype=torch.float64), 0.1
    point = torch.tensor([[[[-0.2, 0.7, 1.4]]]], dtype=torch.float64)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    best = [min((g for g in grid.tolist() if abs(g - xi) <= eps + 1e-12), key=lambda g: abs(g - pi))
            for xi, pi in zip(x.flatten().tolist(), point.flatten().tolist(), strict=True)]
    projected = Threat("linf", eps).region(x).project(point).flatten()
    assert torch.allclose(projected, torch.tensor(best, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_step_is_the_steepest_of_its_length(norm: str) -> None:
    """Among many moves of the same norm none raises a linear function more; for l1 with one value (1 % of 4)."""
    def lengths(moves: torch.Tensor) -> torch.Tensor:
        return moves.flatten(1).norm({"linf": torch.inf, "l2": 2, "l1": 1}[norm], dim=1)

    x, g = images(4, (2, 1, 2, 2), torch.float64), rng.normal(5, (2, 1, 2, 2), dtype=torch.float64)
    move = Threat(norm, 0.5).region(x).step(x, g, 0.25) - x
    assert torch.allclose(lengths(move), torch.full((2,), 0.25, dtype=torch.float64))
    gain = (move * g).flatten(1).sum(1)
    for trial in range(300):
        other = rng.normal(100 + trial, g.shape, dtype=torch.float64).flatten(1)
        other /= lengths(other)[:, None]
        assert ((0.25 * other * g.flatten(1)).sum(1) <= gain + 1e-12).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_zero_gradient_gives_a_zero_step(norm: str) -> None:
    x = images(6)
    region = Threat(norm, 0.5).region(x)
    assert torch.equal(region.step(x, torch.zeros_like(x), 0.1), x)


@pytest.mark.parametrize("norm,eps", [("linf", 0.05), ("l2", 0.3)])
def test_pgd_reaches_the_known_optimum_of_a_linear_model(norm: str, eps: float) -> None:
    """Logits (w x, 0), label 1: the margin is raised by eps |w|_1 (linf) or eps |w|_2 (l2) away from the box."""
    w = rng.normal(8, (12,), dtype=torch.float64)
    x = 0.5 + 0.02 * rng.normal(9, (4, 3, 2, 2), dtype=torch.float64)
    y = torch.ones(4, dtype=torch.long)
    def model(images: torch.Tensor) -> torch.Tensor:
        return torch.stack([images.flatten(1) @ w, torch.zeros(len(images), dtype=torch.float64)], 1)
    region = Threat(norm, eps).region(x)
    for loss in ("ce", "margin"):
        adv = pgd(model, x, y, region=region, start_BCHW=x.clone(), loss=loss, steps=20, step_size=eps / 4)
        gain = model(adv)[:, 0] - model(x)[:, 0]
        best = eps * (w.abs().sum() if norm == "linf" else w.norm())
        assert torch.allclose(gain, best.expand(4), rtol=1e-6)


def test_margin_is_the_best_wrong_logit_minus_the_true_one() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.5], [3.0, -1.0, 0.0]])
    assert margin(logits, torch.tensor([1, 1])).tolist() == [2.5 - 4.0, 3.0 + 1.0]


def test_single_step_with_uniform_start_is_fgsm_rs() -> None:
    """One step of the loop equals the published two lines (Wong et al., 2020), written out."""
    x, y = images(11, (5, 1, 4, 4), torch.float64), torch.tensor([0, 1, 2, 0, 1])
    w = rng.normal(12, (16, 3), dtype=torch.float64)
    def model(z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z.flatten(1) @ w)
    eps, alpha = 0.1, 0.125
    region = Threat("linf", eps).region(x)
    start = Threat("linf", eps).start("uniform", region, x, stream=13)
    adv = pgd(model, x, y, region=region, start_BCHW=start, loss="ce", steps=1, step_size=alpha)
    delta = (start - x).requires_grad_()
    (g,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x + delta), y), delta)
    expected = x + ((delta + alpha * g.sign()).clamp(-eps, eps)).clamp(-x, 1 - x)
    assert torch.allclose(adv, expected, atol=1e-12)


def test_starts_are_spread_over_the_ball() -> None:
    x = torch.full((400, 1, 2, 2), 0.5, dtype=torch.float64)
    linf = Threat("linf", 0.1)
    d = linf.start("uniform", linf.region(x), x, stream=1) - x
    assert abs(d.std() - 0.1 / 3**0.5) < 0.004
    l2 = Threat("l2", 0.1)
    r = l2.distance(l2.start("uniform", l2.region(x), x, stream=1), x)
    assert abs((r**4).mean() - 0.1**4 / 2) < 0.1**4 * 0.06  # r^4 is uniform in [0, eps^4] in 4 dimensions
    noise = l2.start("gaussian", l2.region(x), x, stream=1) - x
    assert abs(noise.std() - 0.001) < 1e-4


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_length_for_each_image_steps_as_one_length_for_each(norm: str) -> None:
    x, g = 0.5 * images(31), rng.normal(32, (6, 3, 8, 8))
    region, sizes = Threat(norm, 0.5).region(x), [0.1, 0.2, 0.05, 0.3, 0.4, 0.1]
    together = region.step(x, g, torch.tensor(sizes))
    for row, size in enumerate(sizes):
        assert torch.allclose(together[row], region.step(x, g, size)[row], rtol=0, atol=1e-7)


def test_unknown_norms_and_starts_are_refused() -> None:
    x = images(1)
    with pytest.raises(ConfigError):
        Threat("l7", 0.1).region(x)
    with pytest.raises(ConfigError):
        Threat("linf", 0.1).start("middle", Threat("linf", 0.1).region(x), x, stream=1)


def test_attack_noise_of_replicas_is_a_slice_of_the_whole() -> None:
    x = images(21)
    for norm, kind in itertools.product(("linf", "l2", "l1"), ("uniform", "gaussian")):
        threat = Threat(norm, 0.2)
        whole = threat.start(kind, threat.region(x), x, stream=22)
        part = threat.start(kind, threat.region(x[2:5]), x[2:5], stream=22, first_row=2)
        assert torch.equal(whole[2:5], part)
