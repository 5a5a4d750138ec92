"""IDBH against torchvision and PIL, one image at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as reference

from mat_dist import rng
from mat_dist.config.schema import AugmentConfig
from mat_dist.data import idbh
from mat_dist.data.augment import augment_batch

COUNT = 24


def images(channels: int = 3, height: int = 32, width: int = 30, count: int = COUNT) -> Tensor:
    """Smooth noise in 255 levels: no image is flat, few values are 0 or 1."""
    noise = torch.rand(count, channels, height + 2, width + 2, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(noise, 3, 1)
    return (smooth * 255).round() / 255


def draws(numbers: int, key: int = 1, count: int = COUNT) -> tuple[Tensor, ...]:
    return rng.uniform(key, (count, numbers), dtype=torch.float64).unbind(1)


def constant(value: float, count: int = COUNT) -> Tensor:
    return torch.full((count,), value, dtype=torch.float64)


def only(operation: str, x: Tensor, amount: Tensor, sign: Tensor, axis: Tensor) -> Tensor:
    """`color_shape` with the same operation for all images."""
    kind = constant((idbh.OPERATIONS.index(operation) + 0.5) / len(idbh.OPERATIONS), len(x))
    return idbh.color_shape(x, kind, amount, sign, axis)


def test_crop_shift_equals_crop_pad_and_crop_of_each_image():
    x, u = images(), draws(6)
    strength, share, top, left, down, right = (t.tolist() for t in u)
    expected, lost = [], set()
    for b, image in enumerate(x):
        gone = math.floor(strength[b] * 10)  # 10/32 of 30 pixels are 9.4: 0 to 9
        columns = math.floor(share[b] * (gone + 1))
        rows = gone - columns
        lost.add(gone)
        kept = reference.crop(image, math.floor(top[b] * (rows + 1)), math.floor(left[b] * (columns + 1)), 32 - rows,
                              30 - columns)
        y, z = math.floor(down[b] * (rows + 1)), math.floor(right[b] * (columns + 1))
        expected.append(reference.pad(kept, [z, y, columns - z, rows - y]))
    assert torch.equal(idbh.crop_shift(x, *u), torch.stack(expected))
    assert {0, 9} <= lost


@pytest.mark.parametrize("operation", idbh.BLENDS)
def test_blends_equal_torchvision_at_the_published_strength(operation):
    x, u = images(), draws(3)
    low = 0.1 if operation in ("saturation", "sharpness") else 0.5
    change = getattr(reference, f"adjust_{operation}")
    expected = [change(image, low + (1.9 - low) * float(u[0][b])) for b, image in enumerate(x)]
    # torchvision's weights of the grey image, 0.2989 0.587 0.114, do not sum to 1
    assert torch.allclose(only(operation, x, *u), torch.stack(expected), atol=2e-4)


@pytest.mark.parametrize(("operation", "enhance"), [("saturation", ImageEnhance.Color),
                                                    ("contrast", ImageEnhance.Contrast),
                                                    ("sharpness", ImageEnhance.Sharpness)])
def test_blends_are_those_of_pil_within_its_rounding(operation, enhance):
    x, u = images(), draws(3)
    low = 0.5 if operation == "contrast" else 0.1
    for b, result in enumerate(only(operation, x, *u)):
        picture = Image.fromarray((x[b] * 255).round().byte().permute(1, 2, 0).numpy())
        expected = np.asarray(enhance(picture).enhance(low + (1.9 - low) * float(u[0][b]))).transpose(2, 0, 1)
        assert np.abs(result.numpy() * 255 - expected).max() < 2.5  # PIL rounds the grey image, then cuts the result


def test_autocontrast_and_equalize_equal_torchvision():
    x, u = images(), draws(3)
    x[0, 1] = 0.2  # a channel without contrast stays
    assert torch.allclose(only("autocontrast", x, *u), reference.autocontrast(x), atol=1e-6)
    levels = (x * 255).round().byte()
    assert torch.equal((only("equalize", x, *u) * 255).round().byte(), reference.equalize(levels))


@pytest.mark.parametrize("operation", ["shear", "rotate"])
def test_moved_images_equal_torchvision(operation):
    x, (amount, sign, axis) = images().double(), draws(3)
    expected = []
    for b, image in enumerate(x):
        side = -1 if sign[b] < 0.5 else 1
        if operation == "rotate":
            angle = side * (1 + math.floor(float(amount[b]) * 10))
            expected.append(reference.rotate(image, angle, InterpolationMode.NEAREST))
        else:
            tilt = math.degrees(side * (0.05 + 0.1 * float(amount[b])))
            expected.append(reference.affine(image, 0.0, [0, 0], 1.0, [tilt, 0.0] if axis[b] < 0.5 else [0.0, tilt],
                                             InterpolationMode.NEAREST))
    assert (only(operation, x, amount, sign, axis) == torch.stack(expected)).double().mean() > 0.999  # ties


def test_erased_rectangles_are_those_of_torchvision_one_by_one():
    x, u = images() + 0.01, draws(3 + 2 * idbh.TRIES)
    expected = x.clone()
    for b in range(COUNT):
        for n in range(idbh.TRIES):
            area = 32 * 30 * (0.02 + 0.31 * float(u[3 + 2 * n][b]))
            ratio = math.exp(math.log(0.3) + math.log(3.3 / 0.3) * float(u[4 + 2 * n][b]))
            tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if tall < 32 and wide < 30:
                break
        top, left = math.floor(float(u[1][b]) * (33 - tall)), math.floor(float(u[2][b]) * (31 - wide))
        expected[b, :, top : top + tall, left : left + wide] = 0
    assert torch.equal(idbh.erase(x, 1.0, *u), expected)
    half = idbh.erase(x, 0.5, *u)
    assert all(torch.equal(half[b], (expected if u[0][b] < 0.5 else x)[b]) for b in range(COUNT))


def test_each_operation_is_drawn_for_an_eighth_of_the_images():
    kind = (rng.uniform(3, (8000,), dtype=torch.float64) * len(idbh.OPERATIONS)).long()
    assert torch.bincount(kind).sub(1000).abs().max() < 120
    assert len(idbh.OPERATIONS) == 8


@pytest.mark.parametrize("strength", ["weak", "strong"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (4, 8, 8), (1, 2, 2)])
def test_rows_are_bitwise_those_of_the_whole_batch_and_stay_in_the_unit_interval(strength, shape):
    x, config = images(*shape), AugmentConfig(idbh=strength, flip=True)
    before = x.clone()
    together = augment_batch(x, config, seed=5, step=7)
    parts = [augment_batch(x[a:b], config, seed=5, step=7, first_row=a) for a, b in ((0, 8), (8, 9), (9, COUNT))]
    assert torch.equal(together, torch.cat(parts))
    assert together.shape == x.shape
    assert 0 <= float(together.min()) <= float(together.max()) <= 1
    assert torch.equal(x, before)
    assert not torch.equal(together, augment_batch(x, config, seed=5, step=8))


def test_strong_erases_more_images_than_weak():
    x = torch.ones(400, 1, 8, 8)
    black = {strength: float((augment_batch(x, AugmentConfig(idbh=strength), seed=0, step=0) == 0).double().mean())
             for strength in ("weak", "strong")}
    assert black["strong"] > black["weak"] + 0.05


def test_float64_images_stay_float64():
    assert augment_batch(images().double(), AugmentConfig(idbh="weak"), seed=0, step=0).dtype == torch.float64
