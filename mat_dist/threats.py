"""Threats: norm balls intersected with the box [0, 1], as three pure hooks for the attack loop.

    start       where the attack begins
    step        one steepest-ascent step of a given length
    project     back onto the ball and the box

All work on batches x_BCHW in image space. Guarantees of `start` and of an attack's result, tested: every pixel
lies in [0, 1] exactly, and the distance to the clean image, measured in float64, is at most eps (1 + 1e-6).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from mat_dist import streams
from mat_dist.errors import ConfigError

GAUSSIAN_START_STD = 0.001  # Zhang et al., "TRADES", ICML 2019: 0.001 * randn


def per_image(values_B: Tensor, like_BCHW: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to scale images."""
    return values_B.view(-1, *[1] * (like_BCHW.dim() - 1))


def l2_norm(d_BCHW: Tensor) -> Tensor:
    """Euclidean length of each image -> (B,)."""
    return d_BCHW.flatten(1).norm(dim=1)


class Region(Protocol):
    """One batch's feasible set: the ball of radius eps round x_BCHW, cut with [0, 1]."""

    def random(self, stream: int, first_row: int) -> Tensor:
        """A random point of the ball, projected -> (B, C, H, W)."""

    def step(self, adv_BCHW: Tensor, grad_BCHW: Tensor, size: float) -> Tensor:
        """adv plus the steepest-ascent step of length `size` in this norm; not projected."""

    def project(self, adv_BCHW: Tensor) -> Tensor:
        """The point of the region for adv_BCHW (nearest for linf), up to rounding."""

    def settle(self, adv_BCHW: Tensor) -> Tensor:
        """A projected point, moved by the ulps that rounding may have carried it out of the ball."""


def _round_inward(bound64: Tensor, x: Tensor, *, up: bool) -> Tensor:
    """`bound64` in x's type, rounded towards x: x + eps rounded up would leave the ball by half a ulp."""
    bound = bound64.to(x.dtype)
    outside = bound.double() < bound64 if up else bound.double() > bound64
    return torch.where(outside, torch.nextafter(bound, x), bound)


class LinfRegion:
    """max |adv - x| <= eps. The bounds are formed in float64 and rounded inward, so membership is exact."""

    def __init__(self, x_BCHW: Tensor, eps: float) -> None:
        x64 = x_BCHW.double()
        self.x, self.eps = x_BCHW, eps
        self.low = _round_inward((x64 - eps).clamp_(min=0), x_BCHW, up=True)
        self.high = _round_inward((x64 + eps).clamp_(max=1), x_BCHW, up=False)

    def random(self, stream: int, first_row: int) -> Tensor:
        """Uniform in the cube (Madry et al., ICLR 2018), then cut with the box."""
        u = streams.uniform(stream, self.x.shape, first_row=first_row, device=self.x.device, dtype=self.x.dtype)
        return self.project(self.x + u.mul_(2).sub_(1).mul_(self.eps))

    def step(self, adv_BCHW: Tensor, grad_BCHW: Tensor, size: float) -> Tensor:
        return torch.add(adv_BCHW, grad_BCHW.sign(), alpha=size)

    def project(self, adv_BCHW: Tensor) -> Tensor:
        return torch.clamp(adv_BCHW, self.low, self.high)

    def settle(self, adv_BCHW: Tensor) -> Tensor:
        return adv_BCHW


class L2Region:
    """||adv - x||_2 <= eps. Scaling to the sphere, then the box, which can only shorten the perturbation."""

    def __init__(self, x_BCHW: Tensor, eps: float) -> None:
        self.x, self.eps = x_BCHW, eps

    def random(self, stream: int, first_row: int) -> Tensor:
        """Uniform in the ball: a normal direction, and a radius eps u^(1/d)."""
        shape = self.x.shape
        device, dtype = self.x.device, self.x.dtype
        direction = streams.normal(stream, shape, first_row=first_row, device=device, dtype=dtype)
        radius = streams.key(stream, "radius")
        u_B = streams.uniform(radius, shape[:1], first_row=first_row, device=device, dtype=dtype)
        radius_B = self.eps * u_B ** (1 / shape[1:].numel())
        return self.project(self.x + direction * per_image(radius_B / l2_norm(direction), direction))

    def step(self, adv_BCHW: Tensor, grad_BCHW: Tensor, size: float) -> Tensor:
        # A zero gradient gives a zero step, not NaN.
        norm_B = l2_norm(grad_BCHW).clamp_(min=torch.finfo(grad_BCHW.dtype).tiny)
        return torch.addcmul(adv_BCHW, grad_BCHW, per_image(size / norm_B, grad_BCHW))

    def project(self, adv_BCHW: Tensor) -> Tensor:
        delta = adv_BCHW - self.x
        norm_B = l2_norm(delta)
        scale_B = torch.where(norm_B > self.eps, self.eps / norm_B, torch.ones_like(norm_B))
        return torch.addcmul(self.x, delta, per_image(scale_B, delta)).clamp_(0, 1)

    def settle(self, adv_BCHW: Tensor) -> Tensor:
        """Scale in float64 and round every pixel towards the clean one: no pixel's part of the norm can grow."""
        x64 = self.x.double()
        delta64 = adv_BCHW.double() - x64
        scale_B = (self.eps / l2_norm(delta64).clamp_(min=torch.finfo(torch.float64).tiny)).clamp_(max=1)
        target64 = (x64 + delta64 * per_image(scale_B, delta64)).clamp_(0, 1)
        adv = target64.to(self.x.dtype)
        outside = (adv.double() - x64).abs() > (target64 - x64).abs()
        return torch.where(outside, torch.nextafter(adv, self.x), adv)


def eps_text(eps: float) -> str:
    """A radius as an exact fraction where it is one of n/255 or a short decimal: 8/255, 1/10, 12."""
    for limit in (255, 1000):
        fraction = Fraction(eps).limit_denominator(limit)
        if math.isclose(fraction, eps, rel_tol=1e-12):
            return str(fraction)
    return repr(eps)


@dataclass(frozen=True)
class Threat:
    """A norm (`linf`, `l2`; `l1` can only be measured) and a radius eps > 0 for images in [0, 1]."""

    norm: str
    eps: float

    @property
    def label(self) -> str:
        """As people write it: linf 8/255."""
        return f"{self.norm} {eps_text(self.eps)}"

    def region(self, x_BCHW: Tensor) -> Region:
        """The feasible set round x_BCHW (float, in [0, 1])."""
        regions: dict[str, Callable[[Tensor, float], Region]] = {"linf": LinfRegion, "l2": L2Region}
        if self.norm not in regions:
            raise ConfigError(f"unknown norm {self.norm!r}", "threat.norm", f"use one of {', '.join(regions)}")
        return regions[self.norm](x_BCHW, self.eps)

    def start(self, kind: str, region: Region, x_BCHW: Tensor, *, stream: int, first_row: int = 0) -> Tensor:
        """The attack's first point: `uniform` in the ball, `gaussian` (x + 0.001 normal) or `zero` (x itself).

        Args:
            stream: key of the noise.
            first_row: row of the global batch at which x_BCHW starts, so that replicas get their slice.
        """
        if kind == "zero":
            return x_BCHW.clone()
        if kind == "uniform":
            return region.settle(region.random(stream, first_row))
        if kind == "gaussian":
            noise = streams.normal(stream, x_BCHW.shape, first_row=first_row, device=x_BCHW.device, dtype=x_BCHW.dtype)
            return region.settle(region.project(x_BCHW + GAUSSIAN_START_STD * noise))
        raise ConfigError(f"unknown attack start {kind!r}", "attack.start", "use uniform, gaussian or zero")

    def distance(self, adv_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        """Distance in this norm, in float64 -> (B,)."""
        d = (adv_BCHW.double() - x_BCHW.double()).flatten(1)
        if self.norm == "l1":
            return d.abs().sum(1)
        return d.abs().amax(1) if self.norm == "linf" else d.norm(dim=1)
