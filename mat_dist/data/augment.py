"""Training augmentation of a whole batch on its device, with keyed draws, and what a batch shows of its images.

Every draw is a row of a stream keyed by (seed, operation, step), so a replica that holds rows 64..127 of a batch
draws what a process with the whole batch draws for them. Images stay in [0, 1]. CutMix takes the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mat_dist import rng
from mat_dist.config.schema import AugmentConfig
from mat_dist.data.idbh import Draw, idbh, within

RATIO = (3 / 4, 4 / 3)  # width / height of a random resized crop, as in the Inception and torchvision recipes


def augment_batch(x_BCHW: Tensor, config: AugmentConfig, *, seed: int, step: int, first_row: int = 0) -> Tensor:
    """The augmentations of single images that are on, in the order crop, resized crop, flip, IDBH.

    Args:
        x_BCHW: images in [0, 1], rows [first_row, first_row + B) of the whole batch.
    """
    draw = draws(len(x_BCHW), seed=seed, step=step, first_row=first_row, device=x_BCHW.device)
    if config.pad:
        x_BCHW = pad_crop(x_BCHW, config.pad, *draw("crop", 2))
    if config.random_resized_crop:
        boxes_B4 = crop_boxes(*draw("resize", 4), size=x_BCHW.shape[2:], smallest=config.random_resized_crop)
        x_BCHW = resized_crop(x_BCHW, boxes_B4)
    if config.flip:
        x_BCHW = flip(x_BCHW, *draw("flip", 1))
    if config.idbh != "off":
        x_BCHW = idbh(x_BCHW, config.idbh, draw)
    return x_BCHW


def draws(count: int, *, seed: int, step: int, first_row: int, device: torch.device) -> Draw:
    """(operation, n) -> n tensors (B,) of uniform float64 numbers in [0, 1), for `count` rows from `first_row` on."""
    def draw(operation: str, numbers: int) -> tuple[Tensor, ...]:
        stream = rng.key(seed, f"augment-{operation}", step)
        return rng.uniform(stream, (count, numbers), first_row=first_row, device=device, dtype=torch.float64).unbind(1)
    return draw


def crop_corner(u_B: Tensor, pad: int) -> Tensor:
    """Where a crop begins on one side of the padded image: floor((2 pad + 1) u)."""
    return (u_B * (2 * pad + 1)).long()


def pad_crop(x_BCHW: Tensor, pad: int, top_B: Tensor, left_B: Tensor) -> Tensor:
    """Zero-pad by `pad` pixels, then cut the old size out, with its corner at `crop_corner` of the padded image."""
    padded = F.pad(x_BCHW, (pad, pad, pad, pad))
    return crop(padded, x_BCHW.shape[2], x_BCHW.shape[3], crop_corner(top_B, pad), crop_corner(left_B, pad))


def crop(x_BCHW: Tensor, height: int, width: int, row_B: Tensor, column_B: Tensor) -> Tensor:
    """The part of each image that begins at (row, column) -> (B, C, height, width)."""
    windows = x_BCHW.unfold(2, height, 1).unfold(3, width, 1)  # a view: 6 times faster than indexing single pixels
    return windows[torch.arange(len(x_BCHW), device=x_BCHW.device), :, row_B, column_B]


def flip(x_BCHW: Tensor, u_B: Tensor) -> Tensor:
    """Mirror left-right where u < 1/2."""
    return mirror(x_BCHW, u_B < 0.5)


def mirror(x_BCHW: Tensor, which_B: Tensor) -> Tensor:
    """Mirror some images left-right."""
    return torch.where(which_B[:, None, None, None], x_BCHW.flip(-1), x_BCHW)


def crop_boxes(area_B: Tensor, ratio_B: Tensor, top_B: Tensor, left_B: Tensor, *, size: Sequence[int],
               smallest: float) -> Tensor:
    """Boxes (B, 4) of top, left, height, width in whole pixels, from four uniform numbers.

    Area share uniform in [smallest, 1], log of the aspect ratio uniform in [log 3/4, log 4/3], as in
    torchvision.transforms.RandomResizedCrop. Where a side would not fit into the image it is cut to the image, while
    torchvision draws again up to ten times: rejection has no fixed number of draws. Cutting changes the area and the
    ratio of those boxes (with smallest = 0.08, 14 % of them on square images).
    """
    height, width = size
    area_B = height * width * (smallest + (1 - smallest) * area_B)
    low, high = (math.log(ratio) for ratio in RATIO)
    ratio_B = torch.exp(low + (high - low) * ratio_B)
    tall_B = torch.sqrt(area_B / ratio_B).round().clamp(1, height)
    wide_B = torch.sqrt(area_B * ratio_B).round().clamp(1, width)
    first_row_B, first_column_B = (top_B * (height - tall_B + 1)).floor(), (left_B * (width - wide_B + 1)).floor()
    return torch.stack([first_row_B, first_column_B, tall_B, wide_B], dim=1)


def resized_crop(x_BCHW: Tensor, box_B4: Tensor) -> Tensor:
    """Cut each image's box (top, left, height, width) out and resize it bilinearly to the whole size.

    The sample points stay inside the centres of the box's pixels, so the result is that of cutting first.
    """
    height, width = x_BCHW.shape[2:]
    top_B, left_B, tall_B, wide_B = box_B4.unbind(1)
    row_BH = _sample_points(top_B, tall_B, height)
    column_BW = _sample_points(left_B, wide_B, width)
    # grid_sample with align_corners: -1 and 1 are the centres of the first and last pixel.
    y_BHW = (row_BH * (2 / max(height - 1, 1)) - 1)[:, :, None].expand(-1, -1, width)
    x_BHW = (column_BW * (2 / max(width - 1, 1)) - 1)[:, None, :].expand(-1, height, -1)
    grid = torch.stack([x_BHW, y_BHW], dim=-1).to(x_BCHW.dtype)
    resized = F.grid_sample(x_BCHW, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return resized.clamp_(0, 1)  # the four weights sum to 1 only up to rounding


def _sample_points(first_B: Tensor, length_B: Tensor, count: int) -> Tensor:
    """Where `count` pixels of a resized side lie in the image, in pixels: (B, count)."""
    centre = (torch.arange(count, device=first_B.device, dtype=first_B.dtype) + 0.5) / count
    inside = (centre * length_B[:, None] - 0.5).clamp(min=0).minimum(length_B[:, None] - 1)
    return first_B[:, None] + inside


def cutmix(x_BCHW: Tensor, y_B: Tensor, *, probability: float, classes: int, seed: int, step: int
           ) -> tuple[Tensor, Tensor]:
    """Images with a window of another one of the batch, and mixed labels (B, K) in the images' type.

    Yun et al., ICCV 2019; for adversarial training with averaged weights: Rebuffi et al., "Data augmentation can
    improve robustness", NeurIPS 2021.

    Each image has draws of its own, keyed by (seed, step): whether it is mixed, the share lambda of its own pixels,
    uniform in [0, 1) (a beta distribution of 1, 1, as published), and the window's centre, anywhere in the image. The
    window has int(sqrt(1 - lambda) H) rows and as many columns of W, halves rounded down on either side of the centre,
    and is cut to the image; labels weigh by what is left of it. The other image is the one in the same place of a
    permutation of the batch.

    Args:
        x_BCHW, y_B: a whole batch, all replicas' rows of it.
        probability: of an image to be mixed, in (0, 1].
    """
    count, (height, width) = len(x_BCHW), x_BCHW.shape[2:]
    u_B, kept_B, row_B, column_B = rng.uniform(
        rng.key(seed, "augment-cutmix", step), (count, 4), device=x_BCHW.device, dtype=torch.float64).unbind(1)
    other_B = rng.permutation(rng.key(seed, "augment-cutmix-order", step), count, device=x_BCHW.device)
    side_B = (1 - kept_B).sqrt()
    window_BHW = (_in_window(row_B, side_B, height)[:, :, None] & _in_window(column_B, side_B, width)[:, None, :]
                  & (u_B < probability)[:, None, None])
    mixed_BCHW = torch.where(window_BHW[:, None], x_BCHW[other_B], x_BCHW)
    # Whole numbers, then a division and sums of exact products: a GPU rounds as the CPU does, where a mean need not.
    share_B1 = (window_BHW.sum((1, 2)).double() / (height * width)).to(x_BCHW.dtype)[:, None]
    y_BK = F.one_hot(y_B, classes).to(x_BCHW.dtype)
    return mixed_BCHW, y_BK * (1 - share_B1) + y_BK[other_B] * share_B1


def _in_window(u_B: Tensor, side_B: Tensor, count: int) -> Tensor:
    """Which of `count` positions the window covers: bool (B, count)."""
    half_B = (side_B * count).long() // 2
    return within((u_B * count).long() - half_B, 2 * half_B, count)


@dataclass(frozen=True)
class AugmentedView:
    """Rows of a batch as views of padded training images.

    A view is what zero-padding, cropping and mirroring show of an image; whatever belongs to the whole image, as its
    perturbation, lies in a frame (C, H + 2 pad, W + 2 pad) of it.
    """

    images_B: Tensor  # number of each row's image, int64
    count: int  # how many images there are
    pad: int  # pixels on each side
    row_B: Tensor  # where in the frame the view begins
    column_B: Tensor
    mirrored_B: Tensor  # left-right

    @classmethod
    def plain(cls, images_B: Tensor, count: int) -> AugmentedView:
        nothing = torch.zeros_like(images_B)
        return cls(images_B, count, 0, nothing, nothing, nothing.bool())

    @classmethod
    def augmented(cls, images_B: Tensor, count: int, augment: AugmentConfig, *, seed: int, step: int,
                  first_row: int) -> AugmentedView:
        """What `augment_batch` shows; of its operations `pad` and `flip` alone."""
        draw = draws(len(images_B), seed=seed, step=step, first_row=first_row, device=images_B.device)
        one = cls.plain(images_B, count)
        row_B, column_B = (crop_corner(u_B, augment.pad) for u_B in draw("crop", 2))
        mirrored_B = draw("flip", 1)[0] < 0.5 if augment.flip else one.mirrored_B
        return cls(images_B, count, augment.pad, row_B, column_B, mirrored_B)

    def to(self, device: torch.device) -> AugmentedView:
        return self._each(lambda part: part.to(device))

    def rows(self, first: int, end: int) -> AugmentedView:
        return self._each(lambda part: part[first:end])

    def _each(self, change: Callable[[Tensor], Tensor]) -> AugmentedView:
        return replace(self, images_B=change(self.images_B), row_B=change(self.row_B),
                       column_B=change(self.column_B), mirrored_B=change(self.mirrored_B))

    def view(self, frames_BCHW: Tensor) -> Tensor:
        """What the rows show of their images' frames."""
        height, width = (side - 2 * self.pad for side in frames_BCHW.shape[2:])
        return mirror(crop(frames_BCHW, height, width, self.row_B, self.column_B), self.mirrored_B)

    def put(self, frames_BCHW: Tensor, views_BCHW: Tensor) -> Tensor:
        """The frames with these views in their places; what the rows do not show stays."""
        if self.pad == 0:
            return mirror(views_BCHW, self.mirrored_B)
        channels, height, width = views_BCHW.shape[1:]
        row_BY = torch.arange(frames_BCHW.shape[2], device=frames_BCHW.device) - self.row_B[:, None]
        column_BX = torch.arange(frames_BCHW.shape[3], device=frames_BCHW.device) - self.column_B[:, None]
        rows_BCYW = row_BY.clamp(0, height - 1)[:, None, :, None].expand(-1, channels, -1, width)
        spread = mirror(views_BCHW, self.mirrored_B).gather(2, rows_BCYW)
        columns_BCYX = column_BX.clamp(0, width - 1)[:, None, None, :].expand(-1, channels, spread.shape[2], -1)
        spread = spread.gather(3, columns_BCYX)
        inside_BYX = ((row_BY >= 0) & (row_BY < height))[:, :, None] & ((column_BX >= 0) & (column_BX < width))[:, None]
        return torch.where(inside_BYX[:, None], spread, frames_BCHW)
