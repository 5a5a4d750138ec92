"""The l1 ball in the box: its projection against slow exact references, its steps against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mat_dist import rng
from mat_dist.attacks.norms import L1Region, Threat

Array = NDArray[np.float64]
KEYS = st.integers(-(2**63), 2**63 - 1)


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
    found = L1Region(x, eps).project(point)
    for row in range(len(x)):
        slow = bisected(x[row].flatten().numpy(), point[row].flatten().numpy(), eps)
        assert np.abs(found[row].flatten().numpy() - slow).max() < 1e-12 * max(1, spread)


@settings(max_examples=25, deadline=None)
@given(key=KEYS, eps=st.floats(1e-3, 30), spread=st.sampled_from([0.1, 1.0, 50.0]))
def test_no_feasible_direction_from_the_l1_projection_leads_nearer(key: int, eps: float, spread: float) -> None:
    """z is the projection of p if and only if it lies in the convex set and (p - z) (w - z) <= 0 for all w in it."""
    x, point = case(key, spread, torch.float64)
    region = L1Region(x, eps)
    found = region.settle(region.project(point))
    for row in range(len(x)):
        x1, z, p = (t[row].flatten().numpy() for t in (x, found, point))
        assert z.min() >= 0 and z.max() <= 1 and np.abs(z - x1).sum() <= eps * (1 + 1e-12)
        assert best_gain(x1, p - z, eps) <= (p - z) @ (z - x1) + 1e-9 * spread**2


@settings(max_examples=25, deadline=None)
@given(key=KEYS, eps=st.floats(1e-3, 30), spread=st.sampled_from([0.1, 1.0]))
def test_the_float32_projection_agrees_to_rounding_and_leaves_what_does_not_move(key: int, eps: float,
                                                                                spread: float) -> None:
    x, point = case(key, spread, torch.float32)
    region, exact = L1Region(x, eps), L1Region(x.double(), eps)
    found = region.settle(region.project(point))
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
    region = L1Region(x, 1.0, share=0.15)
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
    assert torch.equal(L1Region(x, 1.0).step(x, torch.ones_like(x), 0.5), x)


def test_random_l1_points_are_uniform_in_the_ball() -> None:
    """In 3 dimensions, away from the box: length^3 is uniform, all octants and all three values alike."""
    x = torch.full((6000, 1, 1, 3), 0.5, dtype=torch.float64)
    moved = (L1Region(x, 0.4).random(2, 0) - x).flatten(1)
    cubes = (moved.abs().sum(1) / 0.4) ** 3
    for share in (0.1, 0.5, 0.9):
        assert abs((cubes < share).double().mean() - share) < 0.025  # 4 standard deviations
    octants = ((moved > 0).long() @ torch.tensor([1, 2, 4])).bincount(minlength=8)
    assert ((octants - 750).abs() < 110).all()
    assert torch.allclose(moved.abs().mean(0), torch.full((3,), 0.1, dtype=torch.float64), atol=0.005)
