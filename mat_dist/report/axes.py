"""Axes of a chart: ticks at round numbers, and from values to places."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def round_step(span: float, count: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that divides `span` into at most `count` parts."""
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next((factor * power for factor in (1, 2, 5) if factor * power >= rough * (1 - 1e-9)), 10 * power)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    step = round_step(high - low, count)
    first = math.ceil(low / step - 1e-9)
    return [0.0 if n == 0 else n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number with at most four significant digits, without needless zeros: 0.05, 12, 2.5e-05."""
    return f"{value:.4g}"


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on pixels from `start` to `end`; `log`: in powers, for values above 0."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    marks: tuple[float, ...] = ()

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float, *, limits: tuple[float, float] | None = None,
               log: bool = False, marks: Sequence[float] = ()) -> Axis:
        """An axis that holds all values (rounded outward to ticks), or just `limits`."""
        known = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [0.1 if log else 0, 1]
        low, high = limits or (min(known), max(known))
        if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
            low, high = (low / 2, high * 2) if log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        if limits is None and not log and not marks:
            step = round_step(high - low, 5)
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        if not marks:
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) if log else ()
            marks = [10.0**n for n in powers if low <= 10.0**n <= high] if log else ticks(low, high)
        return cls(low, high, start, end, log, tuple(marks))

    def place(self, value: float) -> float:
        """The pixel of a value."""
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)
