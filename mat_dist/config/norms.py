"""The norms that settings may name, and what is known of each without torch. The geometry of a norm is a class in
attacks/norms.py; `register_norm` there adds a norm of the user's own to both.

Standard radii are those of RobustBench and AutoAttack (Croce and Hein, ICML 2020), for l1 of E-AT (Croce and Hein,
ICML 2022); for MNIST of MSD (Maini et al., ICML 2020); ImageNet's are E-AT's; SVHN's l2 is that of HAT (Rade and
Moosavi-Dezfooli, ICLR 2022), and nobody's l1 is a standard there. Fashion-MNIST is attacked with MNIST's.

Unions of norms, on CIFAR-10:
    eat     (8/255, 0.5, 12): E-AT; also RAMP (Jiang and Singh, NeurIPS 2024). The one that most tables use.
    msd     (0.03, 0.5, 12): MSD, and robust_union's networks.
    mng     (8/255, 128/255, 2000/255): MNG (Madaan et al., ICML 2021); its l1 radius is 7.84, not 12.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mat_dist.errors import ConfigError


@dataclass(frozen=True)
class NormInfo:
    """What is known of a norm beside its geometry. The defaults fit a norm of which nothing is published.

    Attributes:
        largest: the radius from which on the ball holds every image: a larger one is a mistake.
        apgd_step: default length of APGD's first step, in radii.
        restarts: default number of an evaluation's random starts.
        autoattack: what AutoAttack calls the norm; None where it does not have it.
        radii: standard radii for images in [0, 1], by data set.
    """

    largest: float = math.inf
    apgd_step: float = 2.0
    restarts: int = 1
    autoattack: str | None = None
    radii: Mapping[str, float] = field(default_factory=dict)


_NORMS = {
    "linf": NormInfo(largest=1.0, autoattack="Linf", radii={
        "cifar10": 8 / 255, "cifar100": 8 / 255, "svhn": 8 / 255, "mnist": 0.3, "fashion_mnist": 0.3,
        "imagenet": 4 / 255}),
    "l2": NormInfo(autoattack="L2", radii={
        "cifar10": 0.5, "cifar100": 0.5, "svhn": 128 / 255, "mnist": 2.0, "fashion_mnist": 2.0, "imagenet": 2.0}),
    # The diameter of the ball is the first step of APGD (ICML 2020), in l1 the radius (Croce and Hein, ICML 2021);
    # AutoAttack starts five times there.
    "l1": NormInfo(apgd_step=1.0, restarts=5, autoattack="L1", radii={
        "cifar10": 12.0, "cifar100": 12.0, "mnist": 10.0, "fashion_mnist": 10.0, "imagenet": 255.0}),
}


def known_norms() -> Mapping[str, NormInfo]:
    """The built-in norms and those that plug-ins have registered, by name."""
    return _NORMS


def add_norm(name: str, info: NormInfo, where: str) -> None:
    """Make a norm known to the settings. Raises ConfigError for a name that is no plain lower-case word."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,15}", name):
        raise ConfigError(f"{ascii(name)[:60]} cannot name a norm", where,
                          "use at most 16 lower-case letters, digits and _, a letter first")
    _NORMS[name] = info


# ------------------------------------------------------------------------------------------------ radii by name

Radii = Mapping[str, float]  # norm -> eps
UNIONS: Mapping[str, Radii] = {
    "eat": {"linf": 8 / 255, "l2": 0.5, "l1": 12.0},
    "msd": {"linf": 0.03, "l2": 0.5, "l1": 12.0},
    "mng": {"linf": 8 / 255, "l2": 128 / 255, "l1": 2000 / 255},
}


def union_radii(name: str) -> Radii:
    """The radii of a union, norm -> eps. Raises ConfigError for an unknown name."""
    if name not in UNIONS:
        raise ConfigError(f"there is no union {name[:80]!r}", "threats", f"choose from {', '.join(UNIONS)}")
    return UNIONS[name]


def data_sets() -> dict[str, Radii]:
    """The standard radii, data set -> norm -> eps."""
    found: dict[str, dict[str, float]] = {}
    for norm, info in known_norms().items():
        for data, eps in info.radii.items():
            found.setdefault(data, {})[norm] = eps
    return dict(found)


def standard_radii(data: str, norms: Sequence[str]) -> Radii:
    """The standard radii of a data set for some norms. Raises ConfigError where there is none."""
    known = data_sets().get(data, {})
    if missing := [norm for norm in norms if norm not in known]:
        raise ConfigError(f"there is no standard radius in {missing[0][:80]} for {data[:80]}", "threats",
                          f"write norm:eps, or norm:DATA with one of {', '.join(data_sets())}")
    return {norm: known[norm] for norm in norms}
