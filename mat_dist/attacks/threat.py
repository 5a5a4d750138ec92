"""A threat: a norm and a radius, and where an attack may begin."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from mat_dist import rng
from mat_dist.attacks.l1 import L1_SHARE, L1Region
from mat_dist.attacks.regions import L2Region, LinfRegion, Region
from mat_dist.errors import ConfigError

GAUSSIAN_START_STD = 0.001  # Zhang et al., "TRADES", ICML 2019: 0.001 * randn


def eps_text(eps: float) -> str:
    """A radius as an exact fraction where it is one of n/255 or a short decimal: 8/255, 1/10, 12."""
    for limit in (255, 1000):
        fraction = Fraction(eps).limit_denominator(limit)
        if math.isclose(fraction, eps, rel_tol=1e-12):
            return str(fraction)
    return repr(eps)


@dataclass(frozen=True)
class Threat:
    """A norm (`linf`, `l2`, `l1`) and a radius eps > 0 for images in [0, 1]."""

    norm: str
    eps: float

    @property
    def label(self) -> str:
        """As people write it: linf 8/255."""
        return f"{self.norm} {eps_text(self.eps)}"

    def scaled(self, factor: float) -> Threat:
        """The threat of `factor` times the radius."""
        return self if factor == 1 else Threat(self.norm, factor * self.eps)

    def region(self, x_BCHW: Tensor, share: float | None = None) -> Region:
        """The feasible set round x_BCHW (float, in [0, 1]).

        Args:
            share: of the values that a step moves, in (0, 1], for l1 alone; default 1 %.
        """
        regions: dict[str, Callable[[], Region]] = {
            "linf": lambda: LinfRegion(x_BCHW, self.eps), "l2": lambda: L2Region(x_BCHW, self.eps),
            "l1": lambda: L1Region(x_BCHW, self.eps, L1_SHARE if share is None else share)}
        if self.norm not in regions:
            raise ConfigError(f"unknown norm {self.norm!r}", "threat.norm", f"use one of {', '.join(regions)}")
        return regions[self.norm]()

    def start(self, kind: str, region: Region, x_BCHW: Tensor, *, stream: int, first_row: int = 0) -> Tensor:
        """The attack's first point.

        Args:
            kind: `uniform` in the ball, `gaussian` (x + 0.001 normal) or `zero` (x itself).
            stream: key of the noise.
            first_row: row of the global batch at which x_BCHW starts, so that replicas get their slice.
        """
        if kind == "zero":
            return x_BCHW.clone()
        if kind == "uniform":
            return region.settle(region.random(stream, first_row))
        if kind == "gaussian":
            noise = rng.normal(stream, x_BCHW.shape, first_row=first_row, device=x_BCHW.device, dtype=x_BCHW.dtype)
            return region.settle(region.project(x_BCHW + GAUSSIAN_START_STD * noise))
        raise ConfigError(f"unknown attack start {kind!r}", "attack.start", "use uniform, gaussian or zero")

    def distance(self, adv_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        """Distance in this norm, in float64 -> (B,)."""
        d = (adv_BCHW.double() - x_BCHW.double()).flatten(1)
        if self.norm == "l1":
            return d.abs().sum(1)
        return d.abs().amax(1) if self.norm == "linf" else d.norm(dim=1)
