"""Intervals of shares, and of paired differences over images. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

Z_95 = 1.959964  # two-sided 95 % quantile of the normal distribution


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` images (Wilson, 1927); stays in [0, 1] also at 0 and 1."""
    z2 = Z_95 * Z_95
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Paired:
    """The difference of two shares on the same `n` images, second minus first, with its 95 % interval.

    Attributes:
        gained, lost: images that only the second, only the first gets right.
    """

    n: int
    gained: int
    lost: int

    @property
    def difference(self) -> float:
        return (self.gained - self.lost) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wald's interval for paired shares, with Agresti and Min's half pair added to each cell (2005)."""
        gained, lost, n = self.gained + 0.5, self.lost + 0.5, self.n + 2
        centre = (gained - lost) / n
        half = Z_95 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
        return centre - half, centre + half

    @property
    def p(self) -> float:
        """Two-sided exact McNemar test: a sign test of the images in which the two differ."""
        from scipy.stats import binomtest  # half a second that only --compare needs

        return float(binomtest(self.gained, self.gained + self.lost).pvalue) if self.gained + self.lost else 1.0
