"""Interleaved timing: all contestants once per round, so that a slow minute of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from mat_dist.core.step import Clock
from mat_dist.distributed.groups import Mesh

Contestant = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """One run of one contestant, in seconds: CPU time of all threads of this process, and wall time."""

    cpu: float
    wall: float


def interleaved(contestants: Mapping[str, Contestant], rounds: int, mesh: Mesh, *,
                warm_up: int = 1) -> dict[str, list[Timing]]:
    """Run all contestants once per round -> their times, of the rank's own process.

    The order turns from round to round, so that nobody always follows the same one. All ranks begin each
    contestant together.

    Args:
        warm_up: rounds that do not count.
    """
    names = list(contestants)
    times: dict[str, list[Timing]] = {name: [] for name in names}
    for number in range(warm_up + rounds):
        for turn in range(len(names)):
            name = names[(turn + number) % len(names)]
            mesh.barrier()
            found = timed(contestants[name], mesh.device)
            if number >= warm_up:
                times[name].append(found)
    return times


def timed(work: Contestant, device: torch.device) -> Timing:
    """Time one call, to the end of what it left on the device."""
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    synchronise(device)
    return Timing(time.process_time() - cpu, time.perf_counter() - wall)


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of two contestants, round by round: what slows a whole round cancels."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


class PhaseClock(Clock):
    """Names the waits and exchanges of a step after their place, and waits for the device at each lap."""

    PLACES = ("AEs", "logits", "vote")

    def __init__(self, device: torch.device) -> None:
        self._device, self._seen = device, {"wait": 0, "exchange": 0}
        synchronise(device)
        super().__init__()

    def lap(self, phase: str) -> None:
        synchronise(self._device)
        if phase in self._seen:
            place = self.PLACES[min(self._seen[phase], len(self.PLACES) - 1)]
            self._seen[phase] += 1
            phase = place if place == "vote" else f"{place}, {'header' if phase == 'wait' else 'exchange'}"
        super().lap(phase)
