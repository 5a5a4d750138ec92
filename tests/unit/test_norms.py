"""Balls and boxes: exact membership in float64, steepest steps and projections against slow references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mat_dist import rng
from mat_dist.attacks import margin, pgd
from mat_dist.attacks.norms import L1, Threat
from mat_dist.errors import ConfigError

Array = NDArray[np.float64]
KEYS = st.integers(-(2**63), 2**63 - 1)
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
@given(key=KEYS, spread=st.sampled_from([1e-3, 0.1, 10.0]))
def test_projections_and_starts_lie_in_ball_and_box(norm: str, eps: float, dtype: torch.dtype, key: int,
                                                    spread: float) -> None:
    threat, x = Threat(norm, eps), images(key, dtype=dtype)
    region = threat.region(x)
    noises = rng.normal(key ^ 1, x.shape, dtype=dtype), torch.ones_like(x)
    points = [region.inside(x + spread * noise) for noise in noises]
    points += [region.start(kind, stream=key) for kind in ("uniform", "gaussian", "zero")]
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
    settled = region.round_inward(inside)
    assert torch.equal(region.round_inward(settled), settled)


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


@pytest.mark.parametrize("size", [0.1, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_zero_gradient_gives_a_zero_step(norm: str, dtype: torch.dtype, size: float) -> None:
    x = images(6).to(dtype)
    region = Threat(norm, 2.0).region(x)
    assert torch.equal(region.step(x, torch.zeros_like(x), size), x)
    assert torch.equal(region.step(x, torch.zeros_like(x), torch.full((6,), size, dtype=dtype)), x)


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
    start = region.start("uniform", stream=13)
    adv = pgd(model, x, y, region=region, start_BCHW=start, loss="ce", steps=1, step_size=alpha)
    delta = (start - x).requires_grad_()
    (g,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x + delta), y), delta)
    expected = x + ((delta + alpha * g.sign()).clamp(-eps, eps)).clamp(-x, 1 - x)
    assert torch.allclose(adv, expected, atol=1e-12)


def test_starts_are_spread_over_the_ball() -> None:
    x = torch.full((400, 1, 2, 2), 0.5, dtype=torch.float64)
    linf = Threat("linf", 0.1)
    d = linf.region(x).start("uniform", stream=1) - x
    assert abs(d.std() - 0.1 / 3**0.5) < 0.004
    l2 = Threat("l2", 0.1)
    r = l2.distance(l2.region(x).start("uniform", stream=1), x)
    assert abs((r**4).mean() - 0.1**4 / 2) < 0.1**4 * 0.06  # r^4 is uniform in [0, eps^4] in 4 dimensions
    noise = l2.region(x).start("gaussian", stream=1) - x
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
    with pytest.raises(ConfigError, match=r"l7.* linf, l2, l1"):
        Threat("l7", 0.1)
    with pytest.raises(ConfigError):
        Threat("linf", 0.1).region(x).start("middle", stream=1)


@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf")])
def test_a_radius_that_is_none_is_refused(eps: float) -> None:
    with pytest.raises(ConfigError, match=f"a radius cannot be {eps}.*8/255"):
        Threat("linf", eps)


def test_attack_noise_of_replicas_is_a_slice_of_the_whole() -> None:
    x = images(21)
    for norm, kind in itertools.product(("linf", "l2", "l1"), ("uniform", "gaussian")):
        threat = Threat(norm, 0.2)
        whole = threat.region(x).start(kind, stream=22)
        part = threat.region(x[2:5]).start(kind, stream=22, first_row=2)
        assert torch.equal(whole[2:5], part)


# ------------------------------------------------------------------------------------------------ l1


def bisected(x: Array, point: Array, eps: float) -> Array:
    """The nearest point of one image, in float64: for a multiplier m every value has its own one-dimensional problem,
    min (z - p)^2 / 2 + m |z - x| over [0, 1]; m is found by bisection."""
    def nearest(m: float) -> Array:
        return np.clip(x + np.sign(point - x) * np.maximum(np.abs(point - x) - m, 0), 0, 1)

    low, high = 0.0, float(np.abs(point - x).max())
    if np.abs(nearest(0.0) - x).sum() <= eps:
        return nearest(0.0)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.abs(nearest(middle) - x).sum() > eps else (low, middle)
    return nearest(high)


def best_gain(x: Array, direction: Array, eps: float) -> float:
    """max direction (z - x) over ball and box: fill the values with the largest entries first, each to its wall."""
    gain, left = 0.0, eps
    for i in np.argsort(-np.abs(direction)):
        length = min(left, 1 - x[i] if direction[i] > 0 else x[i])
        gain, left = gain + abs(direction[i]) * length, left - length
    return gain


def case(key: int, spread: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with values on the walls and points with values that stay, 40 values each."""
    x = (1.5 * rng.uniform(key, (5, 1, 4, 10), dtype=dtype) - 0.25).clamp(0, 1)
    move = spread * rng.normal(key ^ 1, x.shape, dtype=dtype)
    move[:, :, 0] = move[:, :, 1]  # ties
    move[:, :, 3, ::2] = 0
    return x, x + move


@settings(max_examples=25, deadline=None)
@given(key=KEYS, eps=st.floats(1e-4, 30), spread=st.sampled_from([1e-3, 0.1, 1.0, 50.0]))
def test_the_l1_projection_is_the_nearest_point_found_by_bisection(key: int, eps: float, spread: float) -> None:
    x, point = case(key, spread, torch.float64)
    found = L1(x, eps).project(point)
    for row in range(len(x)):
        slow = bisected(x[row].flatten().numpy(), point[row].flatten().numpy(), eps)
        assert np.abs(found[row].flatten().numpy() - slow).max() < 1e-12 * max(1, spread)


@settings(max_examples=25, deadline=None)
@given(key=KEYS, eps=st.floats(1e-3, 30), spread=st.sampled_from([0.1, 1.0, 50.0]))
def test_no_feasible_direction_from_the_l1_projection_leads_nearer(key: int, eps: float, spread: float) -> None:
    """z is the projection of p if and only if it lies in the convex set and (p - z) (w - z) <= 0 for all w in it."""
    x, point = case(key, spread, torch.float64)
    region = L1(x, eps)
    found = region.inside(point)
    for row in range(len(x)):
        x1, z, p = (t[row].flatten().numpy() for t in (x, found, point))
        assert z.min() >= 0 and z.max() <= 1 and np.abs(z - x1).sum() <= eps * (1 + 1e-12)
        assert best_gain(x1, p - z, eps) <= (p - z) @ (z - x1) + 1e-9 * spread**2


@settings(max_examples=25, deadline=None)
@given(key=KEYS, eps=st.floats(1e-3, 30), spread=st.sampled_from([0.1, 1.0]))
def test_the_float32_projection_agrees_to_rounding_and_leaves_what_does_not_move(key: int, eps: float,
                                                                                spread: float) -> None:
    x, point = case(key, spread, torch.float32)
    region, exact = L1(x, eps), L1(x.double(), eps)
    found = region.inside(point)
    assert (found - exact.project(point.double())).abs().max() < 2e-6
    assert torch.equal(found[:, :, 3, ::2], x[:, :, 3, ::2])
    assert (region.project(found) - found).abs().max() < 2e-7


@settings(max_examples=25, deadline=None)
@given(key=KEYS, eps=st.floats(1e-3, 1), spread=st.sampled_from([0.1, 1.0]))
def test_the_linf_projection_is_the_nearest_point(key: int, eps: float, spread: float) -> None:
    """Value by value, against bounds in float64."""
    x, point = case(key, spread, torch.float32)
    x64 = x.double().numpy()
    slow = np.minimum(np.maximum(point.double().numpy(), np.maximum(x64 - eps, 0)), np.minimum(x64 + eps, 1))
    assert np.abs(Threat("linf", eps).region(x).project(point).double().numpy() - slow).max() < 1e-7


@pytest.mark.parametrize("own", [False, True], ids=["share", "per image"])
@settings(max_examples=12, deadline=None)
@given(key=KEYS)
def test_an_l1_step_moves_the_largest_entries_that_can_move(own: bool, key: int) -> None:
    """Against a loop over images; each of the chosen moves by an equal part of the length."""
    x, _ = case(key, 0.1, torch.float64)
    gradient = rng.normal(key ^ 2, x.shape, dtype=torch.float64)
    tops = [1, 3, 8, 20, 40] if own else [6] * 5  # 15 % of 40 values
    region = L1(x, 1.0, share=0.15)
    moved = region.step(x, gradient, 0.5, torch.tensor(tops) if own else None) - x
    for row, top in enumerate(tops):
        x1, g = x[row].flatten(), gradient[row].flatten()
        able = [i for i in range(40) if not (g[i] > 0 and x1[i] == 1) and not (g[i] < 0 and x1[i] == 0)]
        chosen = sorted(able, key=lambda i: -abs(g[i]))[:top]
        expected = torch.zeros(40, dtype=torch.float64)
        for i in chosen:
            expected[i] = g[i].sign() * 0.5 / len(chosen)
        assert torch.allclose(moved[row].flatten(), expected, rtol=0, atol=1e-12)


def test_an_image_that_cannot_move_stays_where_it_is() -> None:
    x = torch.ones(2, 1, 2, 2)
    assert torch.equal(L1(x, 1.0).step(x, torch.ones_like(x), 0.5), x)


def test_random_l1_points_are_uniform_in_the_ball() -> None:
    """In 3 dimensions, away from the box: length^3 is uniform, all octants and all three values alike."""
    x = torch.full((6000, 1, 1, 3), 0.5, dtype=torch.float64)
    moved = (L1(x, 0.4).random(2, 0) - x).flatten(1)
    cubes = (moved.abs().sum(1) / 0.4) ** 3
    for share in (0.1, 0.5, 0.9):
        assert abs((cubes < share).double().mean() - share) < 0.025  # 4 standard deviations
    octants = ((moved > 0).long() @ torch.tensor([1, 2, 4])).bincount(minlength=8)
    assert ((octants - 750).abs() < 110).all()
    assert torch.allclose(moved.abs().mean(0), torch.full((3,), 0.1, dtype=torch.float64), atol=0.005)
