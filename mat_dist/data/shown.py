"""Which training images a batch shows, and which part of them: for what is remembered of an image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mat_dist.config.schema import AugmentConfig
from mat_dist.data.augment import crop, crop_corner, draws, mirror


@dataclass(frozen=True)
class AugmentedView:
    """Rows of a batch as views of padded training images.

    A view is what zero-padding, cropping and mirroring show of an image; whatever belongs to the whole image, as its
    perturbation, lies in a frame (C, H + 2 pad, W + 2 pad) of it.

    Attributes:
        images_B: number of each row's image, int64.
        count: how many images there are.
        pad: pixels on each side.
        row_B, column_B: where in the frame the view begins.
        mirrored_B: whether it is mirrored left-right.
    """

    images_B: Tensor
    count: int
    pad: int
    row_B: Tensor
    column_B: Tensor
    mirrored_B: Tensor

    @classmethod
    def plain(cls, images_B: Tensor, count: int) -> AugmentedView:
        """Whole images."""
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
        """The same on a device."""
        return AugmentedView(self.images_B.to(device), self.count, self.pad, self.row_B.to(device),
                             self.column_B.to(device), self.mirrored_B.to(device))

    def rows(self, first: int, end: int) -> AugmentedView:
        """Some of the rows."""
        cut = slice(first, end)
        return AugmentedView(self.images_B[cut], self.count, self.pad, self.row_B[cut], self.column_B[cut],
                             self.mirrored_B[cut])

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
