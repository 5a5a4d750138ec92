"""Gradient projection against numbers computed by hand."""

from __future__ import annotations

import pytest
import torch

from mat_dist.methods.ramp import project


def test_a_layer_keeps_of_the_natural_gradient_what_points_its_way() -> None:
    """g_a = (3, 4), g_n = (4, 3): cosine 24/25; half of 0.96 g_n and half of g_a."""
    layers = [torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.0]), torch.tensor(2.0), torch.tensor([0.0, 0.0])]
    natural = [torch.tensor([[4.0, 3.0]]), torch.tensor([-1.0, 5.0]), torch.tensor(9.0), torch.tensor([1.0, 1.0])]
    project(layers, natural, 0.5)
    assert layers[0].tolist() == [pytest.approx([0.5 * 0.96 * 4 + 1.5, 0.5 * 0.96 * 3 + 2])]
    assert layers[1].tolist() == [0.5, 0.0]  # against it: nothing of the natural one is left
    assert layers[2] == 2 and layers[3].tolist() == [0, 0]


def test_the_weight_is_that_of_the_natural_part() -> None:
    layers = [torch.tensor([3.0, 4.0])]
    project(layers, [torch.tensor([6.0, 8.0])], 0.25)
    assert layers[0].tolist() == pytest.approx([0.75 * 3 + 0.25 * 6, 0.75 * 4 + 0.25 * 8])


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_that_is_not_finite_stays_visible(which: int) -> None:
    pair = [[torch.ones(3)], [torch.ones(3)]]
    pair[which][0][1] = float("nan")
    project(pair[0], pair[1], 0.5)
    assert not pair[0][0].isfinite().all()
