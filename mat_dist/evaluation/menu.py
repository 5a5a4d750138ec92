"""The attacks that can be asked for by name: how each is made and what it needs. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal


@dataclass(frozen=True)
class Kind:
    """One attack.

    Attributes:
        maker: `pgd`, `noise` and `search` are ours (mat_dist/attacks/), `package` is pyautoattack.
        meaning: in a few words.
        plan: of PGD, what differs from `AttackPlan` with the request's steps, restarts and step size.
        white_box: it follows gradients, so that nothing else should break more.
        fewest_classes: with fewer it cannot be made: the DLR loss divides by the gap to the third largest logit, its
            targeted form by the fourth's.
    """

    maker: Literal["pgd", "noise", "search", "package"]
    meaning: str
    plan: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    white_box: bool = True
    fewest_classes: int = 2


# From the clean image a second start would repeat the first.
_FROM_CLEAN = {"start": "zero", "restarts": 1}

MENU: Mapping[str, Kind] = MappingProxyType({
    "uniform": Kind("noise", "uniform noise in the ball", white_box=False),
    "gaussian": Kind("noise", "Gaussian noise cut to the ball", white_box=False),
    # 2.5 eps, which the projection cuts to eps: the corner of the ball that FGSM takes.
    "fgsm": Kind("pgd", "one step to the edge of the ball", {**_FROM_CLEAN, "steps": 1, "step_size": None}),
    # Dong et al., CVPR 2018: decay 1.0, steps of eps / steps from the clean image.
    "mifgsm": Kind("pgd", "FGSM in steps with momentum", {**_FROM_CLEAN, "momentum": 1.0, "reach": 1.0}),
    "pgd": Kind("pgd", "PGD on the cross-entropy"),
    "cw": Kind("pgd", "PGD on the margin", {"loss": "margin"}),
    "targeted": Kind("pgd", "PGD towards the most likely wrong classes", {"loss": "ce_targeted"}),
    "search": Kind("search", "random search with square patches", white_box=False),
    "apgd-ce": Kind("package", "Auto-PGD on the cross-entropy"),
    "apgd-dlr": Kind("package", "Auto-PGD on the DLR loss", fewest_classes=3),
    "apgd-t": Kind("package", "Auto-PGD on the targeted DLR loss", fewest_classes=4),
    "fab": Kind("package", "FAB, the smallest perturbation"),
    "fab-t": Kind("package", "FAB towards single classes"),
    "square": Kind("package", "Square, without gradients", white_box=False),
    "autoattack": Kind("package", "several of the six above, see version"),
})
AUTOATTACK, SQUARE, SEARCH, TARGETED = "autoattack", "square", "search", "targeted"
PARTS = tuple(name for name, kind in MENU.items() if kind.maker == "package" and name != AUTOATTACK)  # of AutoAttack


def made_by(names: Iterable[str], *makers: str) -> list[str]:
    """Those of `names` that one of the makers makes, in order."""
    return [name for name in names if MENU[name].maker in makers]


def stand_in(names: Iterable[str]) -> str | None:
    """The gradient-free attack that a target without gradient gets where the request names none; None where it does.

    Square where pyautoattack is asked for anything, else our own search.
    """
    names = list(names)
    if SQUARE in names or SEARCH in names:
        return None
    return SQUARE if made_by(names, "package") else SEARCH
