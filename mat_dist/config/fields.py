"""What all sections of the configuration are made of: their base class, numbers that accept fractions, threats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict
from pydantic_core import core_schema

from mat_dist.config.norms import known_norms


def parse_number(value: Any) -> Any:
    """Read "8/255"; pydantic reads numbers and texts such as "1e-3", but takes truth values for numbers."""
    if isinstance(value, bool):
        raise ValueError("a truth value")
    try:
        return float(Fraction(value.strip())) if isinstance(value, str) and "/" in value else value
    except (ZeroDivisionError, OverflowError):  # overflow: a fraction of thousands of digits
        raise ValueError("no number") from None


def parse_integer(value: Any) -> Any:
    """Refuse truth values."""
    return value if isinstance(value, str) else parse_number(value)


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
