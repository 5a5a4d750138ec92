"""The feasible sets of linf and l2, and what every feasible set offers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mat_dist import rng


def per_image(values_B: Tensor, like_BCHW: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to scale images."""
    return values_B.view(-1, *[1] * (like_BCHW.dim() - 1))


def l2_norm(d_BCHW: Tensor) -> Tensor:
    """Euclidean length of each image -> (B,)."""
    return d_BCHW.flatten(1).norm(dim=1)


class Region(Protocol):
    """One batch's feasible set: the ball of radius eps round x_BCHW, cut with [0, 1]."""

    x: Tensor
    eps: float

    def random(self, stream: int, first_row: int) -> Tensor:
        """A random point of the ball, projected -> (B, C, H, W)."""

    def step(self, adv_BCHW: Tensor, grad_BCHW: Tensor, size: float | Tensor) -> Tensor:
        """adv plus the steepest-ascent step of length `size` (one, or one per image) in this norm; not projected."""

    def project(self, adv_BCHW: Tensor) -> Tensor:
        """The point of the region for adv_BCHW (the nearest for linf and l1), up to rounding."""

    def settle(self, adv_BCHW: Tensor) -> Tensor:
        """A projected point, moved by the ulps that rounding may have carried it out of the ball."""


def _round_inward(bound64: Tensor, x: Tensor, *, up: bool) -> Tensor:
    """`bound64` in x's type, rounded towards x: x + eps rounded up would leave the ball by half a ulp."""
    bound = bound64.to(x.dtype)
    outside = bound.double() < bound64 if up else bound.double() > bound64
    return torch.where(outside, torch.nextafter(bound, x), bound)


def shrink(adv_BCHW: Tensor, x_BCHW: Tensor, eps: float, p: int) -> Tensor:
    """Scale adv - x in float64 to an lp length of at most eps, and round every pixel towards the clean one.

    No pixel's part of the norm can grow by this rounding; a point inside stays where it is.
    """
    x64 = x_BCHW.double()
    delta64 = adv_BCHW.double() - x64
    norm_B = delta64.flatten(1).norm(p, dim=1)
    scale_B = (eps / norm_B.clamp_(min=torch.finfo(torch.float64).tiny)).clamp_(max=1)
    target64 = (x64 + delta64 * per_image(scale_B, delta64)).clamp_(0, 1)
    adv = target64.to(x_BCHW.dtype)
    outside = (adv.double() - x64).abs() > (target64 - x64).abs()
    return torch.where(outside, torch.nextafter(adv, x_BCHW), adv)


class LinfRegion:
    """max |adv - x| <= eps. The bounds are formed in float64 and rounded inward, so membership is exact."""

    def __init__(self, x_BCHW: Tensor, eps: float) -> None:
        x64 = x_BCHW.double()
        self.x, self.eps = x_BCHW, eps
        self.low = _round_inward((x64 - eps).clamp_(min=0), x_BCHW, up=True)
        self.high = _round_inward((x64 + eps).clamp_(max=1), x_BCHW, up=False)

    def random(self, stream: int, first_row: int) -> Tensor:
        """Uniform in the cube (Madry et al., ICLR 2018), then cut with the box."""
        u = rng.uniform(stream, self.x.shape, first_row=first_row, device=self.x.device, dtype=self.x.dtype)
        return self.project(self.x + u.mul_(2).sub_(1).mul_(self.eps))

    def step(self, adv_BCHW: Tensor, grad_BCHW: Tensor, size: float | Tensor) -> Tensor:
        if isinstance(size, Tensor):
            return torch.addcmul(adv_BCHW, grad_BCHW.sign(), per_image(size, grad_BCHW))
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
        direction = rng.normal(stream, shape, first_row=first_row, device=device, dtype=dtype)
        radius = rng.key(stream, "radius")
        u_B = rng.uniform(radius, shape[:1], first_row=first_row, device=device, dtype=dtype)
        radius_B = self.eps * u_B ** (1 / shape[1:].numel())
        return self.project(self.x + direction * per_image(radius_B / l2_norm(direction), direction))

    def step(self, adv_BCHW: Tensor, grad_BCHW: Tensor, size: float | Tensor) -> Tensor:
        # A zero gradient gives a zero step, not NaN.
        norm_B = l2_norm(grad_BCHW).clamp_(min=torch.finfo(grad_BCHW.dtype).tiny)
        return torch.addcmul(adv_BCHW, grad_BCHW, per_image(size / norm_B, grad_BCHW))

    def project(self, adv_BCHW: Tensor) -> Tensor:
        delta = adv_BCHW - self.x
        norm_B = l2_norm(delta)
        scale_B = torch.where(norm_B > self.eps, self.eps / norm_B, torch.ones_like(norm_B))
        return torch.addcmul(self.x, delta, per_image(scale_B, delta)).clamp_(0, 1)

    def settle(self, adv_BCHW: Tensor) -> Tensor:
        return shrink(adv_BCHW, self.x, self.eps, 2)
