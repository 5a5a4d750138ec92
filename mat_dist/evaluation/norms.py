"""All that an evaluation knows of single norms: radii by name, AutoAttack, steps, sizes. Imports no torch.

Standard radii are those of RobustBench and AutoAttack (Croce and Hein, ICML 2020), for l1 of E-AT (Croce and Hein,
ICML 2022); for MNIST of MSD (Maini et al., ICML 2020); ImageNet's are E-AT's; SVHN's l2 is that of HAT (Rade and
Moosavi-Dezfooli, ICLR 2022), and nobody's l1 is a standard there. Fashion-MNIST is attacked with MNIST's.

Unions, on CIFAR-10:
    eat     (8/255, 0.5, 12): E-AT; also RAMP (Jiang and Singh, NeurIPS 2024). The one that most tables use.
    msd     (0.03, 0.5, 12): MSD, and robust_union's networks.
    mng     (8/255, 128/255, 2000/255): MNG (Madaan et al., ICML 2021); its l1 radius is 7.84, not 12.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mat_dist.errors import ConfigError

Radii = Mapping[str, float]

_CIFAR: Radii = MappingProxyType({"linf": 8 / 255, "l2": 0.5, "l1": 12.0})
_MNIST: Radii = MappingProxyType({"linf": 0.3, "l2": 2.0, "l1": 10.0})
DATA_SETS: Mapping[str, Radii] = MappingProxyType({
    "cifar10": _CIFAR, "cifar100": _CIFAR, "svhn": MappingProxyType({"linf": 8 / 255, "l2": 128 / 255}),
    "mnist": _MNIST, "fashion_mnist": _MNIST,
    "imagenet": MappingProxyType({"linf": 4 / 255, "l2": 2.0, "l1": 255.0}),
})
UNIONS: Mapping[str, Radii] = MappingProxyType({
    "eat": _CIFAR,
    "msd": MappingProxyType({"linf": 0.03, "l2": 0.5, "l1": 12.0}),
    "mng": MappingProxyType({"linf": 8 / 255, "l2": 128 / 255, "l1": 2000 / 255}),
})
STANDARD, UNION = "standard", "union"
AUTOATTACK_NORMS = MappingProxyType({"linf": "Linf", "l2": "L2", "l1": "L1"})  # as pyautoattack calls them
MOST_EPS = MappingProxyType({"linf": 1.0})  # a larger one is meant for bytes


def adaptive(norm: str) -> bool:
    """Whether PGD of an evaluation is APGD: in l1 plain sparse PGD breaks fewer images than random search does."""
    return norm == "l1"


def length(norm: str, values: int) -> float:
    """The length of a change of 1 in each of `values` pixels."""
    return {"linf": 1.0, "l2": math.sqrt(values), "l1": float(values)}[norm]


def union(name: str) -> Radii:
    """The radii of a union, norm -> eps. Raises ConfigError for an unknown name."""
    if name not in UNIONS:
        raise ConfigError(f"there is no union {name[:80]!r}", "threats", f"choose from {', '.join(UNIONS)}")
    return UNIONS[name]


def standard(data: str, norms: Sequence[str]) -> Radii:
    """The standard radii of a data set for some norms. Raises ConfigError where there is none."""
    known = DATA_SETS.get(data)
    if known is None:
        raise ConfigError(f"there is no standard radius for the data set {data[:80]!r}", "threats",
                          f"write norm:eps, or norm:DATA with one of {', '.join(DATA_SETS)}")
    missing = [norm for norm in norms if norm not in known]
    if missing:
        raise ConfigError(f"there is no standard radius in {missing[0][:80]} for {data}", "threats",
                          f"write norm:eps; {data} has {', '.join(known)}")
    return {norm: known[norm] for norm in norms}
