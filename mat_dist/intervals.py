"""Intervals of paired differences over images and over seeds. No torch.

An interval over images alone says how far the result would move with other test images; it knows nothing of what
another seed would have given. With two or more seeds both count, and the wider one is taken.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959964  # two-sided 95 % quantile of the normal distribution
# The same of Student's t by degrees of freedom; the normal distribution's beyond.
STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of the 95 % interval of Student's t over seeds; infinite for one seed."""
    if len(values) < 2:
        return statistics.fmean(values), math.inf
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), STUDENT.get(len(values) - 1, Z_95) * error


def image_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of the 95 % interval over images (normal approximation)."""
    mean = statistics.fmean(values)  # not pstdev: its exact fractions took most of the time of an evidence page
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    return mean, Z_95 * math.sqrt(variance / len(values))


@dataclass(frozen=True)
class Difference:
    """A difference of two accuracies with its 95 % interval, in the units of the values.

    Attributes:
        by_seed: mean difference of each seed.
        images: number of images, the smallest over the seeds.
    """

    mean: float
    low: float
    high: float
    by_seed: tuple[float, ...]
    images: int

    @property
    def verdict(self) -> str:
        """`noise` where the interval holds 0, else `above` or `below`; said of one seed where there is only one."""
        word = "noise" if self.low <= 0 <= self.high else "above" if self.mean > 0 else "below"
        return word if word == "noise" or len(self.by_seed) > 1 else f"{word} (one seed)"


def paired_difference(differences: Sequence[Sequence[float]]) -> Difference:
    """The difference of two rows from their differences image by image, for each seed.

    The half width is the larger one of Student's t over the seeds' means (from two seeds on) and of the images:
    1.96 sqrt(sum of the variances of the means) / seeds. Raises ValueError without a seed or an image.
    """
    if not differences or not all(differences):
        raise ValueError("a paired difference needs a seed and an image")
    found = [image_interval(values) for values in differences]
    means = [mean for mean, _ in found]
    half = math.sqrt(sum(width * width for _, width in found)) / len(found)
    mean, over_seeds = seed_interval(means)
    if len(means) > 1:
        half = max(half, over_seeds)
    return Difference(mean, mean - half, mean + half, tuple(means), min(map(len, differences)))
