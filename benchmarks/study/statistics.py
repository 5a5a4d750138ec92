"""Intervals of differences between two rows of a table, over images and over seeds.

An interval over images alone says how far the result would move with other test images; it knows nothing of what
another seed would have given. With two or more seeds both count, and the wider one is taken.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from mat_dist.evaluation.results import Z_95


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of the 95 % interval of Student's t over seeds; infinite for one seed."""
    if len(values) < 2:
        return statistics.fmean(values), math.inf
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(stdtrit(len(values) - 1, 0.975)) * error


# Images that are added to those that were measured, as (value, how many).
PAIRS = ((1.0, 0.5), (-1.0, 0.5), (0.0, 1.0))  # half of one in each outcome of a pair: Agresti and Min, Stat. Med. 2005
SHARES = ((1.0, 2.0), (0.0, 2.0))  # two right and two wrong: Agresti and Coull, Am. Stat. 1998


def image_half_width(seeds: Sequence[Mapping[int, float]], added: Sequence[tuple[float, float]] = PAIRS) -> float:
    """Half the width of the 95 % interval over images of a mean over seeds (normal approximation).

    An image that several seeds have counts once, with the sum of what it adds, so that seeds which share their images
    do not narrow the interval. Each seed has a few images more, taken to be the same for all seeds: without them four
    gained and none lost of 100 would be called a gain, where the exact sign test has p = .125. For pairs the width is
    that of `evaluate --compare`.
    """
    parts: dict[int, float] = {}
    more = 0.0
    for values in seeds:
        count = len(values) + sum(number for _, number in added)
        mean = math.fsum([*values.values(), *(value * number for value, number in added)]) / count
        weight = 1 / (count * len(seeds))
        for image, value in values.items():
            parts[image] = parts.get(image, 0.0) + weight * (value - mean)
        more += weight * math.sqrt(math.fsum(number * (value - mean) ** 2 for value, number in added))
    return Z_95 * math.sqrt(math.fsum(value * value for value in parts.values()) + more * more)


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


def paired_difference(differences: Sequence[Mapping[int, float]]) -> Difference:
    """The difference of two rows from their differences by image, for each seed.

    The half width is the larger one of Student's t over the seeds' means (from two seeds on) and that over images.
    Raises ValueError without a seed or an image.
    """
    if not differences or not all(differences):
        raise ValueError("a paired difference needs a seed and an image")
    means = _means(differences)
    mean, half = _wider(means, image_half_width(differences))
    return Difference(mean, mean - half, mean + half, tuple(means), min(map(len, differences)))


def accuracy_interval(seeds: Sequence[Mapping[int, float]]) -> tuple[float, float]:
    """The 95 % interval of an accuracy from those of each image, for each seed; as wide as a paired difference's."""
    return _within(*_wider(_means(seeds), image_half_width(seeds, SHARES)))


def share_interval(means: Sequence[float], images: int) -> tuple[float, float]:
    """The same where only means over images are known: as if each image were right or wrong, and in all seeds alike,
    which no accuracy is less certain than."""
    count = images + sum(number for _, number in SHARES)
    share = (statistics.fmean(means) * images + SHARES[0][1]) / count
    return _within(*_wider(means, Z_95 * math.sqrt(share * (1 - share) / count)))


def _means(seeds: Sequence[Mapping[int, float]]) -> list[float]:
    return [math.fsum(values.values()) / len(values) for values in seeds]


def _wider(means: Sequence[float], over_images: float) -> tuple[float, float]:
    """Mean, and half the width over seeds (from two on) or over images."""
    mean, over_seeds = seed_interval(means)
    return mean, max(over_images, over_seeds) if len(means) > 1 else over_images


def _within(mean: float, half: float) -> tuple[float, float]:
    return max(mean - half, 0.0), min(mean + half, 1.0)
