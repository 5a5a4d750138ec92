"""IDBH: CropShift, one colour or shape transform, random erasing, for a whole batch at once (Li and Spratling, "Data
Augmentation Alone Can Improve Adversarial Training", ICLR 2023).

Operations, ranges and probabilities are those of the authors' CIFAR-10 policies. They work on 8-bit PIL images; here
blends are not rounded to levels. Mirroring, the first operation of their policies, is `data.augment.flip`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mat_dist.data.images import by_255

# (B) float64 uniform numbers in [0, 1) by operation name: how many of them per image
Draw = Callable[[str, int], tuple[Tensor, ...]]

ERASED = {"weak": 0.5, "strong": 1.0}  # probability of random erasing
CROP_SHARE = 10 / 32  # most pixels that CropShift removes, rows and columns together, as share of the shorter side
# The colour-biased set: each with probability 1/8. The first four blend with a degenerate image, at a weight of the
# image uniform in the range; shear is in radians, rotation in whole degrees, both with a random sign.
BLENDS = {"saturation": (0.1, 1.9), "brightness": (0.5, 1.9), "contrast": (0.5, 1.9), "sharpness": (0.1, 1.9)}
OPERATIONS = (*BLENDS, "autocontrast", "equalize", "shear", "rotate")
SHEAR, DEGREES = (0.05, 0.15), (1, 10)
# Random erasing (Zhong et al., AAAI 2020) with torchvision's numbers: share of the area, height / width, tries
ERASED_AREA, ERASED_RATIO, TRIES = (0.02, 0.33), (0.3, 3.3), 10
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL and torchvision
_GREY_LEVELS = 65535  # of the exact sums behind a mean


def idbh(x_BCHW: Tensor, strength: Literal["weak", "strong"], draw: Draw) -> Tensor:
    """CropShift, colour or shape transform, erasing (of half of the images with `weak`, of all with `strong`)."""
    x_BCHW = crop_shift(x_BCHW, *draw("cropshift", 6))
    x_BCHW = color_shape(x_BCHW, *draw("colorshape", 4))
    return erase(x_BCHW, ERASED[strength], *draw("erase", 3 + 2 * TRIES))


def whole(u_B: Tensor, highest_B: Tensor | int) -> Tensor:
    """Whole numbers 0..highest (float64), evenly."""
    return (u_B * (highest_B + 1)).floor()


def crop_shift(x_BCHW: Tensor, strength_B: Tensor, share_B: Tensor, top_B: Tensor, left_B: Tensor, down_B: Tensor,
               right_B: Tensor) -> Tensor:
    """Cut a random rectangle out and put it to a random place of a black image of the old size.

    `strength` rows and columns are removed together, 0..10 on images of 32 pixels (here: 10/32 of the shorter side,
    rounded down); `share` says how many of them are columns.
    """
    height, width = x_BCHW.shape[2:]
    lost_B = whole(strength_B, int(CROP_SHARE * min(height, width)))
    columns_B = whole(share_B, lost_B)
    rows_B = lost_B - columns_B
    row_BH, seen_BH = _shifted(whole(top_B, rows_B), whole(down_B, rows_B), height - rows_B, height)
    column_BW, seen_BW = _shifted(whole(left_B, columns_B), whole(right_B, columns_B), width - columns_B, width)
    return _take(x_BCHW, row_BH[:, :, None], column_BW[:, None, :], seen_BH[:, :, None] & seen_BW[:, None, :])


def _shifted(source_B: Tensor, target_B: Tensor, kept_B: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of `count` places: the place in the image that each shows (B, count), and whether it shows one."""
    place_BN = torch.arange(count, device=source_B.device, dtype=source_B.dtype) - target_B[:, None]
    return place_BN + source_B[:, None], (place_BN >= 0) & (place_BN < kept_B[:, None])


def _take(x_BCHW: Tensor, row: Tensor, column: Tensor, seen_BHW: Tensor) -> Tensor:
    """Pixels at (row, column), broadcast to (B, H, W), of each image; 0 where not seen."""
    place_BHW = (row * x_BCHW.shape[3] + column).masked_fill(~seen_BHW, 0).long()
    taken = x_BCHW.flatten(2).gather(2, place_BHW.flatten(1)[:, None].expand(-1, x_BCHW.shape[1], -1))
    return taken.view(x_BCHW.shape).masked_fill(~seen_BHW[:, None], 0)


def color_shape(x_BCHW: Tensor, kind_B: Tensor, amount_B: Tensor, sign_B: Tensor, axis_B: Tensor) -> Tensor:
    """One of `OPERATIONS` for each image, chosen by `kind`, as strong as `amount` says."""
    kind_B = (kind_B * len(OPERATIONS)).long()
    for number, (name, (low, high)) in enumerate(BLENDS.items()):
        weight_B = (low + (high - low) * amount_B).to(x_BCHW.dtype)
        x_BCHW = _where(kind_B == number, partial(blend, name), x_BCHW, weight_B)
    for name, change in (("autocontrast", autocontrast), ("equalize", equalize)):
        x_BCHW = _where(kind_B == OPERATIONS.index(name), change, x_BCHW)
    side_B = torch.where(sign_B < 0.5, -1.0, 1.0).to(amount_B.dtype)
    shears_B, turns_B = kind_B == OPERATIONS.index("shear"), kind_B == OPERATIONS.index("rotate")
    tilt_B = torch.tan(side_B * (SHEAR[0] + (SHEAR[1] - SHEAR[0]) * amount_B)) * shears_B
    angle_B = torch.deg2rad(side_B * (DEGREES[0] + whole(amount_B, DEGREES[1] - DEGREES[0]))) * turns_B
    return _where(shears_B | turns_B, move, x_BCHW, angle_B, tilt_B * (axis_B < 0.5), tilt_B * (axis_B >= 0.5))


def _where(chosen_B: Tensor, change: Callable[..., Tensor], x_BCHW: Tensor, *values_B: Tensor) -> Tensor:
    """`change` of the chosen images and their values, the others as they are.

    A GPU changes all and keeps the chosen ones, since to count them the host would have to wait for it; a CPU changes
    no others (a fifth of the time). The bits are the same: no operation mixes images.
    """
    if x_BCHW.device.type != "cpu":
        return torch.where(chosen_B[:, None, None, None], change(x_BCHW, *values_B), x_BCHW)
    rows = chosen_B.nonzero().flatten()
    if not len(rows):
        return x_BCHW
    return x_BCHW.index_copy(0, rows, change(x_BCHW[rows], *(value_B[rows] for value_B in values_B)))


def blend(name: str, x_BCHW: Tensor, weight_B: Tensor) -> Tensor:
    """weight x + (1 - weight) y, clamped, with y by name: grey image, black, mean grey, smoothed image."""
    weight = weight_B[:, None, None, None]
    other: Tensor | float = 0.0
    if name == "saturation":
        other = luma(x_BCHW)
    elif name == "contrast":
        # Exact sums of whole numbers: a mean does not depend on how many images are summed side by side.
        levels = (luma(x_BCHW).double() * _GREY_LEVELS).round().long().sum((1, 2, 3), keepdim=True)
        other = (levels.double() / (x_BCHW[0, 0].numel() * _GREY_LEVELS)).to(x_BCHW.dtype)
    elif name == "sharpness":
        other = smoothed(x_BCHW)
    return (weight * x_BCHW + (1 - weight) * other).clamp(0, 1)


def luma(x_BCHW: Tensor) -> Tensor:
    """Brightness (B, 1, H, W): of three channels as RGB, of others their mean."""
    channels = x_BCHW.unbind(1)
    weights = LUMA if len(channels) == len(LUMA) else (1 / len(channels),) * len(channels)
    total = channels[0] * weights[0]
    for channel, weight in zip(channels[1:], weights[1:], strict=True):
        total = total + channel * weight
    return total[:, None]


def smoothed(x_BCHW: Tensor) -> Tensor:
    """PIL's SMOOTH filter: 5/13 of the pixel, 1/13 of each of its eight neighbours; the border stays."""
    height, width = x_BCHW.shape[2:]
    if min(height, width) < 3:
        return x_BCHW
    inner = x_BCHW[:, :, 1:-1, 1:-1]
    total = inner * 4
    for row in range(3):  # not a convolution, whose rounding may depend on the number of images
        for column in range(3):
            total = total + x_BCHW[:, :, row : row + height - 2, column : column + width - 2]
    result = x_BCHW.clone()
    result[:, :, 1:-1, 1:-1] = total / 13
    return result


def autocontrast(x_BCHW: Tensor) -> Tensor:
    """Each channel of each image stretched to [0, 1]; constant ones stay."""
    low, high = x_BCHW.amin((2, 3), keepdim=True), x_BCHW.amax((2, 3), keepdim=True)
    return torch.where(high > low, ((x_BCHW - low) / (high - low)).clamp(0, 1), x_BCHW)


def equalize(x_BCHW: Tensor) -> Tensor:
    """Histogram equalisation of each channel of each image at 256 levels, with PIL's rounding."""
    batch, channels, height, width = x_BCHW.shape
    level = (x_BCHW * 255).round().long().view(batch * channels, height * width)
    counts = torch.zeros(batch * channels, 256, dtype=torch.int64, device=x_BCHW.device)
    counts.scatter_add_(1, level, torch.ones_like(level))
    last = counts.gather(1, level.amax(1, keepdim=True))  # images of the brightest level that occurs
    step = (height * width - last) // 255
    before = counts.cumsum(1) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp(max=255)
    result = by_255(table.gather(1, level).to(x_BCHW.dtype)).view(x_BCHW.shape)
    return torch.where((step > 0).view(batch, channels, 1, 1), result, x_BCHW)


def move(x_BCHW: Tensor, angle_B: Tensor, across_B: Tensor, down_B: Tensor) -> Tensor:
    """Rotate about the centre by `angle` (radians, counter-clockwise) and shear by two tangents; nearest pixel, black
    outside."""
    height, width = x_BCHW.shape[2:]
    y = torch.arange(height, device=angle_B.device, dtype=angle_B.dtype)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=angle_B.device, dtype=angle_B.dtype)[None, :] - (width - 1) / 2
    cosine, sine, across, down = (t_B[:, None, None] for t_B in (angle_B.cos(), angle_B.sin(), across_B, down_B))
    column = ((cosine * x + (across - sine) * y) + (width - 1) / 2).round()
    row = (((sine + down) * x + cosine * y) + (height - 1) / 2).round()
    return _take(x_BCHW, row, column, (row >= 0) & (row < height) & (column >= 0) & (column < width))


def erase(x_BCHW: Tensor, probability: float, chosen_B: Tensor, top_B: Tensor, left_B: Tensor,
          *tried_B: Tensor) -> Tensor:
    """Zero a rectangle with 2 to 33 % of the area and a log-uniform ratio of its sides where chosen < probability.

    Args:
        tried_B: (area, ratio) of ten tries; the first rectangle that is smaller than the image in both directions
            counts, as in torchvision.
    """
    height, width = x_BCHW.shape[2:]
    area_BT, ratio_BT = torch.stack(tried_B[0::2], 1), torch.stack(tried_B[1::2], 1)
    area_BT = height * width * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * area_BT)
    low, high = (math.log(ratio) for ratio in ERASED_RATIO)
    ratio_BT = torch.exp(low + (high - low) * ratio_BT)
    tall_BT, wide_BT = (area_BT * ratio_BT).sqrt().round(), (area_BT / ratio_BT).sqrt().round()
    fits_BT = (tall_BT < height) & (wide_BT < width)
    first_B1 = fits_BT.to(torch.uint8).argmax(1, keepdim=True)  # the first of equal ones
    tall_B, wide_B = tall_BT.gather(1, first_B1).squeeze(1), wide_BT.gather(1, first_B1).squeeze(1)
    on_B = fits_BT.any(1) & (chosen_B < probability)
    hidden_BH = within(whole(top_B, height - tall_B), tall_B, height)
    hidden_BW = within(whole(left_B, width - wide_B), wide_B, width)
    return x_BCHW.masked_fill((hidden_BH[:, :, None] & hidden_BW[:, None, :] & on_B[:, None, None])[:, None], 0)


def within(first_B: Tensor, length_B: Tensor, count: int) -> Tensor:
    """Which of `count` places lie in [first, first + length): bool (B, count)."""
    place = torch.arange(count, device=first_B.device)
    return (place >= first_B[:, None]) & (place < (first_B + length_B)[:, None])
