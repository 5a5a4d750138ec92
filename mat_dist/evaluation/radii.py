"""Radii by name: the standard ones of a data set, and three conventions for the union of norms. Imports no torch.

Unions, on CIFAR-10:
    eat     (8/255, 0.5, 12): E-AT; also RAMP (Jiang and Singh, NeurIPS 2024). The one that most tables use.
    msd     (0.03, 0.5, 12): MSD, and robust_union's networks.
    mng     (8/255, 128/255, 2000/255): MNG (Madaan et al., ICML 2021); its l1 radius is 7.84, not 12.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mat_dist.config.fields import known_norms
from mat_dist.errors import ConfigError

Radii = Mapping[str, float]

UNIONS: Mapping[str, Radii] = MappingProxyType({
    "eat": MappingProxyType({"linf": 8 / 255, "l2": 0.5, "l1": 12.0}),
    "msd": MappingProxyType({"linf": 0.03, "l2": 0.5, "l1": 12.0}),
    "mng": MappingProxyType({"linf": 8 / 255, "l2": 128 / 255, "l1": 2000 / 255}),
})
STANDARD, UNION = "standard", "union"


def union(name: str) -> Radii:
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


def standard(data: str, norms: Sequence[str]) -> Radii:
    """The standard radii of a data set for some norms. Raises ConfigError where there is none."""
    known = data_sets().get(data)
    if known is None:
        raise ConfigError(f"there is no standard radius for the data set {data[:80]!r}", "threats",
                          f"write norm:eps, or norm:DATA with one of {', '.join(data_sets())}")
    missing = [norm for norm in norms if norm not in known]
    if missing:
        raise ConfigError(f"there is no standard radius in {missing[0][:80]} for {data}", "threats",
                          f"write norm:eps; {data} has {', '.join(known)}")
    return {norm: known[norm] for norm in norms}
