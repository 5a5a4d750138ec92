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

from mat_dist.evaluation.statistics import Z_95


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of the 95 % interval of Student's t over seeds; infinite for one seed."""
    if len(values) < 2:
        return statistics.fmean(values), math.inf
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(stdtrit(len(values) - 1, 0.975)) * error


def image_half_width(differences: Sequence[Mapping[int, float]]) -> float:
    """Half the width of the 95 % interval over images of a mean over seeds (normal approximation).

    An image that several seeds have counts once, with the sum of what it adds, so that seeds which share their images
    do not narrow the interval. Each seed has two images more, half of one in each outcome of a pair (the width of
    Agresti and Min's interval, Stat. Med. 2005, which `evaluate --compare` has too), taken to be the same for all
    seeds: without them four gained and none lost of 100 would be called a gain, where the exact sign test has p = .125.
    """
    added: dict[int, float] = {}
    more = 0.0
    for values in differences:
        count = len(values) + 2
        mean, weight = math.fsum(values.values()) / count, 1 / (count * len(differences))
        for image, value in values.items():
            added[image] = added.get(image, 0.0) + weight * (value - mean)
        more += weight * math.sqrt(1 + 2 * mean * mean)
    return Z_95 * math.sqrt(math.fsum(value * value for value in added.values()) + more * more)


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
    means = [math.fsum(values.values()) / len(values) for values in differences]
    mean, over_seeds = seed_interval(means)
    half = image_half_width(differences)
    if len(means) > 1:
        half = max(half, over_seeds)
    return Difference(mean, mean - half, mean + half, tuple(means), min(map(len, differences)))
