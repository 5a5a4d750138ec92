"""What all sections of the configuration are made of: their base class, numbers that accept fractions, norms, threats.

The geometry of a norm is a class in attacks/norms.py; `register_norm` there adds a norm of the user's own to both.

Standard radii are those of RobustBench and AutoAttack (Croce and Hein, ICML 2020), for l1 of E-AT (Croce and Hein,
ICML 2022); for MNIST of MSD (Maini et al., ICML 2020); ImageNet's are E-AT's; SVHN's l2 is that of HAT (Rade and
Moosavi-Dezfooli, ICLR 2022), and nobody's l1 is a standard there. Fashion-MNIST is attacked with MNIST's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict
from pydantic_core import core_schema

from mat_dist.errors import ConfigError


def parse_number(value: Any) -> Any:
    """Accept 0.5, "8/255", "1e-3"; leave anything else to pydantic's own message."""
    if isinstance(value, bool):
        raise ValueError("expected a number, found a truth value")
    if isinstance(value, str):
        try:
            return float(Fraction(value.strip())) if "/" in value else float(value)
        except (ValueError, ZeroDivisionError, OverflowError):  # overflow: a fraction of thousands of digits
            raise ValueError('expected a number such as 0.1, 1e-3 or "8/255"') from None
    return value


def parse_integer(value: Any) -> Any:
    """Accept 10 and "10", refuse 2.5 and truth values."""
    if isinstance(value, bool):
        raise ValueError("expected a whole number, found a truth value")
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            raise ValueError("expected a whole number") from None
    return value


def check_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments: numbers, truth values, text, null, or lists of these."""
    for name, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            finite = not isinstance(one, float) or math.isfinite(one)
            if not name.isidentifier() or not finite or not isinstance(one, (bool, int, float, str, type(None))):
                raise ValueError(f"{name} is neither a finite number, true, false, text nor a list of these")
    return values


Number = Annotated[float, BeforeValidator(parse_number)]
Integer = Annotated[int, BeforeValidator(parse_integer)]
Arguments = Annotated[dict[str, Any], AfterValidator(check_arguments)]


@dataclass(frozen=True)
class Written:
    """Marks a setting of text that `read` understands; it raises ValueError where it does not. `like`: an example."""

    read: Callable[[str], Any]
    like: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        self.read(value)
        return value


class Section(BaseModel):
    """A group of settings: immutable, no unknown keys, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class NormInfo:
    """What is known of a norm beside its geometry. The defaults fit a norm of which nothing is published.

    Attributes:
        largest: the radius from which on the ball holds every image: a larger one is a mistake.
        apgd_step: default length of APGD's first step, in radii.
        autoattack: what AutoAttack calls the norm; None where it does not have it.
        radii: standard radii for images in [0, 1], by data set.
    """

    largest: float = math.inf
    apgd_step: float = 2.0
    autoattack: str | None = None
    radii: Mapping[str, float] = field(default_factory=dict)


_NORMS = {
    "linf": NormInfo(largest=1.0, autoattack="Linf", radii={
        "cifar10": 8 / 255, "cifar100": 8 / 255, "svhn": 8 / 255, "mnist": 0.3, "fashion_mnist": 0.3,
        "imagenet": 4 / 255}),
    "l2": NormInfo(autoattack="L2", radii={
        "cifar10": 0.5, "cifar100": 0.5, "svhn": 128 / 255, "mnist": 2.0, "fashion_mnist": 2.0, "imagenet": 2.0}),
    # The diameter of the ball is the first step of APGD (ICML 2020), in l1 the radius (Croce and Hein, ICML 2021).
    "l1": NormInfo(apgd_step=1.0, autoattack="L1", radii={
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


SMALLEST_EPS, LARGEST_EPS = 1e-6, 1e4


def parse_threats(text: str) -> list[tuple[str, float]]:
    """Norms and radii of "linf:8/255,l2:1/2,l1:12". Raises ValueError, naming the part that cannot be read."""
    found = []
    for part in text.split(","):
        norm, colon, eps = (piece.strip() for piece in part.partition(":"))
        try:
            value = float(Fraction(eps))
        except (ValueError, ZeroDivisionError, OverflowError):
            value = 0.0
        if norm not in known_norms() or not colon or not SMALLEST_EPS <= value <= LARGEST_EPS:
            raise ValueError(f"{ascii(part.strip())[1:-1][:80]!r} is not a threat")
        found.append((norm, value))
    return found


def real_images(batch_size: int, generated_share: float) -> int:
    """Images of a batch that are not generated."""
    return batch_size - round(generated_share * batch_size)
