"""Norms, one class each, and threats: a norm with a radius.

A norm of your own is a subclass of `Region`, or of one of its subclasses, in a file given with --plugin:

    @register_norm("red")
    class Red(Linf): ...

All places that know norms ask this class and the `NormInfo` of its registration, so nothing else has to be written.
Guarantees of `Region.start` and of an attack's result, tested: every pixel lies in [0, 1] exactly, and the distance to
the clean image, measured in float64, is at most eps (1 + 1e-6).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from mat_dist import rng
from mat_dist.attacks.l1 import project_l1, random_change, sparse_step
from mat_dist.config.norms import NormInfo, add_norm, known_norms
from mat_dist.errors import ConfigError

Top = int | Tensor | None
GAUSSIAN_START_STD = 0.001  # Zhang et al., "TRADES", ICML 2019: 0.001 * randn


def per_image(values_B: Tensor, like_BCHW: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to scale images."""
    return values_B.view(-1, *[1] * (like_BCHW.dim() - 1))


class Region(ABC):
    """One batch's feasible set in a norm: the ball of radius eps round x_BCHW, cut with [0, 1].

    A subclass defines `length`, `random`, `step` and `project`, and changes what else differs.

    Args:
        x_BCHW: clean images in [0, 1]; float32 or float64.
        eps: radius; infinite for the box alone.
        share: of the values of an image, in (0, 1], that a step moves, for a norm with `sparse`; None: its default.

    Attributes:
        name: under which the norm is registered.
        sparse: a step moves `top` values of an image. APGD then adapts their number, as it was published for l1, and
            MSD draws it in each step.
        adaptive: evaluations attack with APGD in place of PGD, where that is too weak.
        noise: standard deviation of normal noise that is about as long as the ball is wide, in units of the change
            that, made to every value, is as long as the ball is wide.
    """

    name: ClassVar[str] = ""
    sparse: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False
    noise: ClassVar[float] = 1.0

    def __init__(self, x_BCHW: Tensor, eps: float, share: float | None = None) -> None:
        self.x, self.eps = x_BCHW, eps

    @staticmethod
    @abstractmethod
    def length(change_BCHW: Tensor) -> Tensor:
        """The norm of each change -> (B,); infinite where a value moved that the norm keeps fixed."""

    @abstractmethod
    def random(self, stream: rng.Key, first_row: int) -> Tensor:
        """A random point of the ball, projected -> (B, C, H, W). `stream` and `first_row` as for `start`."""

    @abstractmethod
    def step(self, adv_BCHW: Tensor, grad_BCHW: Tensor, size: float | Tensor, top: Top = None) -> Tensor:
        """adv plus the steepest-ascent step of a length in this norm; not projected. A zero gradient gives adv.

        Args:
            size: the length, one number or one per image (B,).
            top: with `sparse`, how many values move, one number or one per image; None: by the region's share.
        """

    @abstractmethod
    def project(self, adv_BCHW: Tensor) -> Tensor:
        """The point of the region for adv_BCHW (the nearest for linf and l1), up to rounding."""

    def round_inward(self, adv_BCHW: Tensor) -> Tensor:
        """A projected point, moved by the ulps that rounding may have carried it out of the ball.

        adv - x is scaled in float64 to a length of at most eps, and every pixel is rounded towards the clean one. No
        pixel's part of the norm can grow by this rounding; a point inside stays where it is.
        """
        x64 = self.x.double()
        delta64 = adv_BCHW.double() - x64
        scale_B = (self.eps / self.length(delta64).clamp_(min=torch.finfo(torch.float64).tiny)).clamp_(max=1)
        target64 = (x64 + delta64 * per_image(scale_B, delta64)).clamp_(0, 1)
        adv = target64.to(self.x.dtype)
        outside = (adv.double() - x64).abs() > (target64 - x64).abs()
        return torch.where(outside, torch.nextafter(adv, self.x), adv)

    def inside(self, adv_BCHW: Tensor) -> Tensor:
        """`project`, inside to the last bit."""
        return self.round_inward(self.project(adv_BCHW))

    def start(self, kind: str, *, stream: rng.Key, first_row: int = 0) -> Tensor:
        """The first point of an attack.

        Args:
            kind: `uniform` in the ball, `gaussian` (x + 0.001 normal) or `zero` (x itself).
            stream: key of the noise.
            first_row: row of the global batch at which x_BCHW starts, so that replicas get their slice.
        """
        if kind == "zero":
            return self.x.clone()
        if kind == "uniform":
            return self.round_inward(self.random(stream, first_row))
        if kind == "gaussian":
            noise = rng.normal(stream, self.x.shape, first_row=first_row, device=self.x.device, dtype=self.x.dtype)
            return self.inside(self.x + GAUSSIAN_START_STD * noise)
        raise ConfigError(f"unknown attack start {kind!r}", "attack.start", "use uniform, gaussian or zero")

    @classmethod
    def distance(cls, adv_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        """Distance of two batches in this norm, in float64 -> (B,)."""
        return cls.length(adv_BCHW.double() - x_BCHW.double())

    @classmethod
    def allowed(cls, change_CHW: Tensor) -> Tensor:
        """The part of a change of a black image (values in [0, 1]) that the norm allows at all -> (1, C, H, W)."""
        change = change_CHW[None].double()
        return cls(torch.zeros_like(change), math.inf).project(change)

    @classmethod
    def span(cls, change_CHW: Tensor) -> float:
        """The length of what is `allowed` of a change."""
        return cls.length(cls.allowed(change_CHW)).item()


class Linf(Region):
    """max |adv - x| <= eps. The bounds are formed in float64 and rounded inward, so membership is exact."""

    name, noise = "linf", 0.5

    def __init__(self, x_BCHW: Tensor, eps: float, share: float | None = None) -> None:
        super().__init__(x_BCHW, eps)
        x64 = x_BCHW.double()
        self.low = _towards((x64 - eps).clamp_(min=0), x_BCHW, up=True)
        self.high = _towards((x64 + eps).clamp_(max=1), x_BCHW, up=False)

    @staticmethod
    def length(change_BCHW: Tensor) -> Tensor:
        return change_BCHW.flatten(1).abs().amax(1)

    def random(self, stream: rng.Key, first_row: int) -> Tensor:
        """Uniform in the cube (Madry et al., ICLR 2018), then cut with the box."""
        u = rng.uniform(stream, self.x.shape, first_row=first_row, device=self.x.device, dtype=self.x.dtype)
        return self.project(self.x + u.mul_(2).sub_(1).mul_(self.eps))

    def step(self, adv_BCHW: Tensor, grad_BCHW: Tensor, size: float | Tensor, top: Top = None) -> Tensor:
        if isinstance(size, Tensor):
            return torch.addcmul(adv_BCHW, grad_BCHW.sign(), per_image(size, grad_BCHW))
        return torch.add(adv_BCHW, grad_BCHW.sign(), alpha=size)

    def project(self, adv_BCHW: Tensor) -> Tensor:
        return torch.clamp(adv_BCHW, self.low, self.high)

    def round_inward(self, adv_BCHW: Tensor) -> Tensor:
        return adv_BCHW


def _towards(bound64: Tensor, x: Tensor, *, up: bool) -> Tensor:
    """`bound64` in x's type, rounded towards x: x + eps rounded up would leave the ball by half a ulp."""
    bound = bound64.to(x.dtype)
    outside = bound.double() < bound64 if up else bound.double() > bound64
    return torch.where(outside, torch.nextafter(bound, x), bound)


class L2(Region):
    """||adv - x||_2 <= eps. Scaling to the sphere, then the box, which can only shorten the perturbation."""

    name = "l2"

    @staticmethod
    def length(change_BCHW: Tensor) -> Tensor:
        return change_BCHW.flatten(1).norm(dim=1)

    def random(self, stream: rng.Key, first_row: int) -> Tensor:
        """Uniform in the ball: a normal direction, and a radius eps u^(1/d)."""
        shape, device, dtype = self.x.shape, self.x.device, self.x.dtype
        direction = rng.normal(stream, shape, first_row=first_row, device=device, dtype=dtype)
        u_B = rng.uniform(rng.key(stream, "radius"), shape[:1], first_row=first_row, device=device, dtype=dtype)
        radius_B = self.eps * u_B ** (1 / shape[1:].numel())
        return self.project(self.x + direction * per_image(radius_B / self.length(direction), direction))

    def step(self, adv_BCHW: Tensor, grad_BCHW: Tensor, size: float | Tensor, top: Top = None) -> Tensor:
        info = torch.finfo(grad_BCHW.dtype)
        # Finite also for a zero gradient and steps from 4 on, where size / tiny is infinite in fp32, and 0 * inf not 0.
        scale_B = (size / self.length(grad_BCHW).clamp_(min=info.tiny)).clamp_(max=info.max)
        return torch.addcmul(adv_BCHW, grad_BCHW, per_image(scale_B, grad_BCHW))

    def project(self, adv_BCHW: Tensor) -> Tensor:
        delta = adv_BCHW - self.x
        norm_B = self.length(delta)
        scale_B = torch.where(norm_B > self.eps, self.eps / norm_B, torch.ones_like(norm_B))
        return torch.addcmul(self.x, delta, per_image(scale_B, delta)).clamp_(0, 1)


class L1(Region):
    """||adv - x||_1 <= eps, see attacks/l1.py."""

    name, sparse, adaptive = "l1", True, True
    noise = math.sqrt(math.pi / 2)  # E|N(0, 1)| = sqrt(2 / pi)
    # Of the values move in a step: Tramer and Boneh, NeurIPS 2019 (percentile 99). More of them make plain PGD weak: on
    # CIFAR-10, l1 4, a small CNN withstands PGD-20 on 27.0 % with 0.2 %, 28.5 % with 1 %, 31.0 % with 20 % of them.
    SHARE = 0.01

    def __init__(self, x_BCHW: Tensor, eps: float, share: float | None = None) -> None:
        super().__init__(x_BCHW, eps)
        self.top = max(1, round((self.SHARE if share is None else share) * x_BCHW.shape[1:].numel()))

    @staticmethod
    def length(change_BCHW: Tensor) -> Tensor:
        return change_BCHW.flatten(1).norm(1, dim=1)

    def random(self, stream: rng.Key, first_row: int) -> Tensor:
        """Uniform in the ball, then projected onto the box too."""
        return self.project(self.x + random_change(self.x, self.eps, stream, first_row))

    def step(self, adv_BCHW: Tensor, grad_BCHW: Tensor, size: float | Tensor, top: Top = None) -> Tensor:
        return sparse_step(adv_BCHW, grad_BCHW, size, self.top if top is None else top)

    def project(self, adv_BCHW: Tensor) -> Tensor:
        return project_l1(adv_BCHW, self.x, self.eps)


# ------------------------------------------------------------------------------------------------ names

_REGIONS: dict[str, type[Region]] = {kind.name: kind for kind in (Linf, L2, L1)}
AnyRegion = TypeVar("AnyRegion", bound=type[Region])


def register_norm(name: str, info: NormInfo | None = None) -> Callable[[AnyRegion], AnyRegion]:
    """Decorator that makes a subclass of `Region` known as `threat.norm=<name>`; for files given with --plugin.

    Args:
        name: at most 16 lower-case letters, digits and _.
        info: what settings and evaluations know of the norm; nothing of it is inherited from another norm.

    Raises ConfigError for a name that another norm has, or that is no plain word.
    """
    def register(kind: AnyRegion) -> AnyRegion:
        where = f"{kind.__module__}.{kind.__qualname__}"
        taken = _REGIONS.get(name, kind)
        # The same plug-in may be loaded twice in one process.
        if f"{taken.__module__}.{taken.__qualname__}" != where:
            raise ConfigError(f"norm {name!r} is registered twice", where, "choose another name")
        add_norm(name, info or NormInfo(), where)
        kind.name, _REGIONS[name] = name, kind
        return kind

    return register


register_threat = register_norm  # its name in `mat_dist`


def eps_text(eps: float) -> str:
    """A radius as an exact fraction where it is one of n/255 or a short decimal: 12/255, 1/5, 1/10, 12."""
    levels = round(eps * 255)
    if levels % 17 and math.isclose(levels, eps * 255, rel_tol=1e-12):  # 51/255 is 1/5; 12/255 is not written 4/85
        return f"{levels}/255"
    for limit in (255, 1000):
        fraction = Fraction(eps).limit_denominator(limit)
        if math.isclose(fraction, eps, rel_tol=1e-12):
            return str(fraction)
    return repr(eps)


@dataclass(frozen=True)
class Threat:
    """A norm by its name and a radius eps for images in [0, 1]; 0 at the start of a radius that grows. Raises
    ConfigError for an unknown norm, and for a radius that is none."""

    norm: str
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in _REGIONS:
            raise ConfigError(f"unknown norm {self.norm!r}", "threat.norm",
                              f"use one of {', '.join(_REGIONS)}, or one from --plugin")
        if not 0 <= self.eps < math.inf:
            raise ConfigError(f"a radius cannot be {self.eps}", "threat.eps", "give a number above 0, such as 8/255")

    @property
    def kind(self) -> type[Region]:
        return _REGIONS[self.norm]

    @property
    def info(self) -> NormInfo:
        return known_norms()[self.norm]

    @property
    def label(self) -> str:
        """As people write it: linf 8/255."""
        return f"{self.norm} {eps_text(self.eps)}"

    def scaled(self, factor: float) -> Threat:
        return self if factor == 1 else Threat(self.norm, factor * self.eps)

    def region(self, x_BCHW: Tensor, share: float | None = None) -> Region:
        """The feasible set round x_BCHW (float, in [0, 1]); `share` as for `Region`."""
        return self.kind(x_BCHW, self.eps, share)

    def distance(self, adv_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        """Distance in this norm, in float64 -> (B,)."""
        return self.kind.distance(adv_BCHW, x_BCHW)
