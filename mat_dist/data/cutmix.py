"""CutMix on a whole batch: a window of another image, and of its label as much as its area.

Yun, Han, Oh, Chun, Choe and Yoo, ICCV 2019; for adversarial training with averaged weights: Rebuffi et al., "Data
augmentation can improve robustness", NeurIPS 2021.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mat_dist import rng


def cutmix(x_BCHW: Tensor, y_B: Tensor, *, probability: float, classes: int, seed: int, step: int
           ) -> tuple[Tensor, Tensor]:
    """Images with a window of another one of the batch, and mixed labels (B, K) in the images' type.

    Each image has draws of its own, keyed by (seed, step): whether it is mixed, the share lambda of its own pixels,
    uniform in [0, 1) (a beta distribution of 1, 1, as published), and the window's centre, anywhere in the image. The
    window has int(sqrt(1 - lambda) H) rows and as many columns of W, halves rounded down on either side of the centre,
    and is cut to the image; labels weigh by what is left of it. The other image is the one in the same place of a
    permutation of the batch.

    Args:
        x_BCHW, y_B: a whole batch, all replicas' rows of it.
        probability: of an image to be mixed, in (0, 1].
        classes: number of classes (K).
    """
    count, (height, width) = len(x_BCHW), x_BCHW.shape[2:]
    u_B, kept_B, row_B, column_B = rng.uniform(
        rng.key(seed, "augment-cutmix", step), (count, 4), device=x_BCHW.device, dtype=torch.float64).unbind(1)
    other_B = rng.permutation(rng.key(seed, "augment-cutmix-order", step), count, device=x_BCHW.device)
    side_B = (1 - kept_B).sqrt()
    window_BHW = (_covered(row_B, side_B, height)[:, :, None] & _covered(column_B, side_B, width)[:, None, :]
                  & (u_B < probability)[:, None, None])
    mixed_BCHW = torch.where(window_BHW[:, None], x_BCHW[other_B], x_BCHW)
    # Whole numbers, then a division and sums of exact products: a GPU rounds as the CPU does, where a mean need not.
    share_B1 = (window_BHW.sum((1, 2)).double() / (height * width)).to(x_BCHW.dtype)[:, None]
    y_BK = F.one_hot(y_B, classes).to(x_BCHW.dtype)
    return mixed_BCHW, y_BK * (1 - share_B1) + y_BK[other_B] * share_B1


def _covered(u_B: Tensor, side_B: Tensor, count: int) -> Tensor:
    """Which of `count` positions the window covers: bool (B, count)."""
    half_B, centre_B = (side_B * count).long() // 2, (u_B * count).long()
    place = torch.arange(count, device=u_B.device)
    return (place >= (centre_B - half_B)[:, None]) & (place < (centre_B + half_B)[:, None])
