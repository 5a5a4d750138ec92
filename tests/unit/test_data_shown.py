"""Views of padded images against the augmentation itself, and against loops over pixels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mat_dist.config.schema import AugmentConfig
from mat_dist.data.augment import AugmentedView, augment_batch

COUNT, SHAPE = 9, (2, 5, 6)
AUGMENTS = [AugmentConfig(), AugmentConfig(flip=True), AugmentConfig(pad=2), AugmentConfig(pad=3, flip=True)]


def shown_of(augment: AugmentConfig, step: int = 4, first_row: int = 0, rows: int = 7) -> AugmentedView:
    return AugmentedView.augmented(torch.arange(rows) + 1, COUNT, augment, seed=3, step=step, first_row=first_row)


@pytest.mark.parametrize("augment", AUGMENTS, ids=str)
def test_a_view_of_the_padded_images_is_what_the_augmentation_makes(augment: AugmentConfig) -> None:
    x = torch.rand(7, *SHAPE)
    frames = F.pad(x, (augment.pad,) * 4)
    assert torch.equal(shown_of(augment).view(frames), augment_batch(x, augment, seed=3, step=4))
    part = shown_of(augment).rows(2, 5)
    assert torch.equal(part.view(frames[2:5]), augment_batch(x, augment, seed=3, step=4)[2:5])
    assert torch.equal(shown_of(augment, first_row=2, rows=3).view(frames[2:5]), part.view(frames[2:5]))


def put_slowly(shown: AugmentedView, frames: Tensor, views: Tensor) -> Tensor:
    frames = frames.clone()
    height, width = views.shape[2:]
    for b in range(len(views)):
        for i in range(height):
            for j in range(width):
                seen = width - 1 - j if shown.mirrored_B[b] else j
                frames[b, :, int(shown.row_B[b]) + i, int(shown.column_B[b]) + j] = views[b, :, i, seen]
    return frames


@pytest.mark.parametrize("augment", AUGMENTS, ids=str)
def test_a_view_that_is_put_back_replaces_what_it_shows_and_nothing_else(augment: AugmentConfig) -> None:
    shown, views = shown_of(augment), torch.rand(7, *SHAPE)
    frames = torch.rand(7, SHAPE[0], SHAPE[1] + 2 * augment.pad, SHAPE[2] + 2 * augment.pad)
    after = shown.put(frames, views)
    assert torch.equal(after, put_slowly(shown, frames, views))
    assert torch.equal(shown.view(after), views)
