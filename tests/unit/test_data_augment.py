"""Augmentation against slow references, one image at a time."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import functional as reference

from mat_dist import rng
from mat_dist.config.schema import AugmentConfig
from mat_dist.data.augment import augment_batch, crop_boxes, flip, pad_crop, resized_crop

ALL = AugmentConfig(pad=2, flip=True, random_resized_crop=0.08)


def images(count: int = 16, channels: int = 3, height: int = 12, width: int = 10) -> torch.Tensor:
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(0))


def uniform(count: int, number: int) -> tuple[torch.Tensor, ...]:
    return rng.uniform(number, (number, count), dtype=torch.float64).unbind(0)


def test_pad_crop_equals_torchvision_pad_and_crop_of_each_image():
    x, (top, left) = images(), uniform(16, 2)
    expected = [reference.crop(reference.pad(image, [3]), int(t * 7), int(u * 7), 12, 10)
                for image, t, u in zip(x, top.tolist(), left.tolist(), strict=True)]
    assert torch.equal(pad_crop(x, 3, top, left), torch.stack(expected))


def test_pad_crop_reaches_every_corner_and_no_further():
    x = torch.zeros(2, 1, 4, 4)
    x[:, 0, 0, 0] = 1
    last = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    moved = pad_crop(x, 3, last, last)
    assert moved[0, 0, 3, 3] == 1  # corner at 0 of the padded image: content moves down and right by the padding
    assert moved[1].sum() == 0  # corner at 2 * pad: it moves out


def test_flip_equals_torchvision_hflip_where_the_draw_is_below_one_half():
    x, (u,) = images(), uniform(16, 1)
    expected = [reference.hflip(image) if draw < 0.5 else image for image, draw in zip(x, u.tolist(), strict=True)]
    assert torch.equal(flip(x, u), torch.stack(expected))


@pytest.mark.parametrize("size", [(12, 10), (8, 8), (32, 32)])
def test_resized_crop_equals_torchvision_of_each_image(size):
    x = images(12, 3, *size)
    boxes = crop_boxes(*uniform(12, 4), size=size, smallest=0.08)
    expected = [reference.resized_crop(image, *[int(v) for v in box], list(size), antialias=False)
                for image, box in zip(x, boxes.tolist(), strict=True)]
    assert torch.allclose(resized_crop(x, boxes), torch.stack(expected), atol=2e-5)


def test_resized_crop_of_the_whole_image_changes_nothing():
    x = images(3)
    assert torch.allclose(resized_crop(x, torch.tensor([[0.0, 0, 12, 10]] * 3, dtype=torch.float64)), x, atol=1e-6)


def test_crop_boxes_lie_in_the_image_and_have_the_stated_distribution():
    draws = rng.uniform(1, (4, 20_000), dtype=torch.float64).unbind(0)
    top, left, tall, wide = crop_boxes(*draws, size=(64, 64), smallest=0.08).unbind(1)
    for first, length in ((top, tall), (left, wide)):
        assert (first >= 0).all()
        assert (length >= 1).all()
        assert (first + length <= 64).all()
    free = (tall < 64) & (wide < 64)  # boxes whose sides were not cut to the image
    # Whole pixels move the area of the smallest box, 18 x 18 of 64 x 64, by up to 6 %.
    assert float((tall * wide / 64**2).min()) > 0.08 * 0.94
    ratio = (wide / tall)[free]
    assert 3 / 4 * 0.94 < float(ratio.min()) < 0.78
    assert 1.28 < float(ratio.max()) < 4 / 3 * 1.06
    assert abs(float((wide / tall).log().mean())) < 0.01
    assert abs(float((tall * wide).mean()) / 64**2 - 0.54) < 0.03  # (0.08 + 1) / 2, less what the cuts take


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_augmented_images_stay_in_the_unit_interval_and_keep_their_type(dtype):
    x = (images(32) > 0.5).to(dtype)  # zeros and ones: overshoot would show
    result = augment_batch(x, ALL, seed=0, step=3)
    assert result.dtype == dtype
    assert result.shape == x.shape
    assert float(result.min()) >= 0
    assert float(result.max()) <= 1


@pytest.mark.parametrize("config", [AugmentConfig(pad=2), AugmentConfig(flip=True),
                                    AugmentConfig(random_resized_crop=0.3), ALL])
def test_rows_of_a_batch_are_bitwise_those_of_the_whole_batch(config):
    x = images(24)
    whole = augment_batch(x, config, seed=5, step=7)
    parts = [augment_batch(x[a:b], config, seed=5, step=7, first_row=a) for a, b in ((0, 8), (8, 9), (9, 24))]
    assert torch.equal(whole, torch.cat(parts))


def test_augmentation_changes_with_step_and_seed_and_repeats_otherwise():
    x = images()
    first = augment_batch(x, ALL, seed=0, step=0)
    assert torch.equal(first, augment_batch(x, ALL, seed=0, step=0))
    assert not torch.equal(first, augment_batch(x, ALL, seed=0, step=1))
    assert not torch.equal(first, augment_batch(x, ALL, seed=1, step=0))


def test_no_augmentation_returns_the_images():
    x = images()
    assert augment_batch(x, AugmentConfig(), seed=0, step=0) is x
