"""Mean and standard deviation per channel, for the normalisation layer of a model."""

from __future__ import annotations

from fractions import Fraction

import torch

from mat_dist import rng
from mat_dist.data.images import ImageSet

MAPPED_IMAGES = 50_000  # of a mapped set are looked at: all of ImageNet would be read from disk
LEAST_STD = 1 / 255  # a constant channel must not divide by zero
_CHUNK = 512  # images per sum; 2**16 levels squared times 512 images of 1024 x 1024 pixels stay below 2**63
_FLOAT_LEVELS = 65535


def sampled_rows(train: ImageSet) -> int:
    """How many images `channel_stats` looks at."""
    return min(len(train), MAPPED_IMAGES) if train.mapped else len(train)


def channel_stats(train: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel over all training images and pixels, in [0, 1] units; std is at least 1/255.

    From exact integer sums, so the numbers are the same on every rank, device and thread count. float32 images are
    rounded to 1/65535 for this. Of a mapped set with more than 50 000 images a keyed subset of that size is used,
    the same on every run.
    """
    levels = 255 if train.store.dtype == torch.uint8 else _FLOAT_LEVELS
    count = sampled_rows(train)
    rows = torch.arange(count)
    if count < len(train):
        rows = rng.permutation(rng.key(0, "channel-stats"), len(train))[:count].sort().values
    channels = train.shape[0]
    sums, squares = [0] * channels, [0] * channels
    for part in rows.split(_CHUNK):
        images = train.batch(part)[0]
        words = images.to(torch.int32) if levels == 255 else (images.double() * levels).round().to(torch.int64)
        first = words.sum((0, 2, 3), dtype=torch.int64).tolist()
        second = words.square_().sum((0, 2, 3), dtype=torch.int64).tolist()
        for k in range(channels):
            sums[k] += first[k]
            squares[k] += second[k]
    pixels = count * train.shape[1] * train.shape[2]
    means = [Fraction(total, pixels) for total in sums]
    variances = [Fraction(total, pixels) - mean**2 for total, mean in zip(squares, means, strict=True)]
    return (tuple(float(mean / levels) for mean in means),
            tuple(max(float(variance) ** 0.5 / levels, LEAST_STD) for variance in variances))
