"""Arithmetic behind the numbers on the console: rates, remaining time, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def images_per_second(images: int, seconds: float) -> float | None:
    """Clean images per second of wall time, counted once for the whole cohort; None where no time has passed."""
    return images / seconds if seconds > 0 else None


def eta_seconds(step: int, total_steps: int, first_step: int, elapsed_s: float) -> float | None:
    """Seconds left after `step` of `total_steps`, at the mean speed since `first_step`.

    Args:
        step: steps done so far, earlier attempts included.
        first_step: steps that were done when this attempt began; they took none of `elapsed_s`.
        elapsed_s: wall seconds of this attempt. Evaluations and checkpoints count, as they will come again.

    Returns:
        None while this attempt has done no step.
    """
    done = step - first_step
    if done <= 0:
        return None
    return max(total_steps - step, 0) * elapsed_s / done


def duration(seconds: float | None) -> str:
    """`0:00:42`, `27:46:40`; `-:--:--` where unknown. Rounded to whole seconds."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def rate(images_per_s: float | None) -> str:
    """`3,210`, or `8.25` below 100 images/s; `-` where unknown."""
    if images_per_s is None or not math.isfinite(images_per_s):
        return "-"
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage without the sign; `-` where it was not measured."""
    return "-" if share is None else f"{100 * share:.{digits}f}"


def number(value: float | None) -> str:
    """A loss with three decimals, three significant digits in scientific notation from 1000; `-` where unknown."""
    if value is None:
        return "-"
    return f"{value:.3f}" if not math.isfinite(value) or abs(value) < 1000 else f"{value:.2e}"


def losses(values: Sequence[float | None]) -> str:
    """The losses of all peers on one line; of many peers the smallest, mean and largest."""
    return _line(values, number)


def percents(values: Sequence[float | None]) -> str:
    """The shares of all peers on one line, as percentages; of many peers the smallest, mean and largest."""
    return _line(values, percent)


def _line(values: Sequence[float | None], form: Callable[[float | None], str], shown: int = 8) -> str:
    if len(values) <= shown:
        return " ".join(form(value) for value in values)
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < len(values):
        return f"not finite or unknown for {len(values) - len(known)} of {len(values)} peers"
    mean = math.fsum(known) / len(known)
    return f"{form(min(known))}..{form(max(known))} (mean {form(mean)} of {len(known)} peers)"
