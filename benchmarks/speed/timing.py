"""Interleaved timing: all contestants once per round, so that a slow minute of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.command import EVERY, Watch
from mat_dist.distributed.groups import Mesh
from mat_dist.errors import StopRequested
from mat_dist.runs.console import duration

Contestant = Callable[[], object]


def warm_up(device: torch.device) -> int:
    """Rounds that do not count: on a GPU steps are recorded, kernels chosen and passes compiled meanwhile."""
    return 5 if device.type == "cuda" else 1



@dataclass(frozen=True)
class Timing:
    """One run of one contestant, in seconds: CPU time of all threads of this process, and wall time."""

    cpu: float
    wall: float


Times = dict[str, list[Timing]]


def interleaved(contestants: Mapping[str, Contestant], rounds: int, mesh: Mesh, watch: Watch | None = None) -> Times:
    """Run all contestants once per round -> their times, of the rank's own process.

    The order turns from round to round, so that nobody always follows the same one. All ranks begin each
    contestant together. Where some rank is asked to stop, what stands are the rounds that were whole: after the
    contestant that runs, or at once where one process is asked again.

    Raises StopRequested, on all ranks, where no round was.
    """
    watch, times = watch or Watch(), {name: list[Timing]() for name in contestants}
    try:
        _take_turns(contestants, rounds, mesh, watch, times)
    except StopRequested:
        if mesh.placement.world > 1:
            raise
    return _whole(times)


def _take_turns(contestants: Mapping[str, Contestant], rounds: int, mesh: Mesh, watch: Watch, times: Times) -> None:
    """Fill `times` until the end, or until some rank was asked to stop."""
    names, began, unmeasured = list(contestants), time.monotonic(), warm_up(mesh.device)
    for number in range(unmeasured + rounds):
        if number == unmeasured and (whole := (time.monotonic() - began) * rounds / unmeasured) >= EVERY:
            watch.say(f"{rounds} rounds of {', '.join(names)} take about {duration(whole)}; Ctrl-C ends them earlier")
        for turn in range(len(names)):
            name = names[(turn + number) % len(names)]
            if any(mesh.gather_json(watch.stopped)):
                return
            left = (time.monotonic() - began) / number * (unmeasured + rounds - number) if number else None
            watch.now(f"{name}, warm-up" if number < unmeasured else
                      f"{name}, round {number - unmeasured + 1} of {rounds}, {duration(left)} left")
            found = timed(contestants[name], mesh.device)
            if number >= unmeasured:
                times[name].append(found)


def _whole(times: Times) -> Times:
    """The rounds in which all contestants ran. Raises StopRequested where there is none."""
    rounds = min(map(len, times.values()))
    if not rounds:
        raise StopRequested("stopped before one round was timed", "benchmark", "give it more time")
    return {name: found[:rounds] for name, found in times.items()}


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


def of_all_ranks(mesh: Mesh, mine: Times) -> Times:
    """The times of all ranks as one."""
    return together(mesh.gather_json({name: [(t.cpu, t.wall) for t in found] for name, found in mine.items()}))


def together(ranks: list[dict[str, list[tuple[float, float]]]]) -> Times:
    """CPU times of (cpu, wall) added over the ranks, and the longest wall time."""
    return {name: [Timing(sum(one[0] for one in turn), max(one[1] for one in turn))
                   for turn in zip(*(rank[name] for rank in ranks), strict=True)] for name in ranks[0]}


# ------------------------------------------------------------------------------------------------ medians


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


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of two contestants, round by round: what slows a whole round cancels."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])


def both(times: Times, above: str, below: str, minus: float = 0.0) -> dict[str, dict[str, float]]:
    """Ratio of two contestants by CPU and by wall time, less `minus`."""
    found = {kind: ratio([getattr(t, kind) for t in times[above]], [getattr(t, kind) for t in times[below]])
             for kind in ("cpu", "wall")}
    return {kind: {name: value - minus for name, value in vars(spread).items()} for kind, spread in found.items()}


def spreads(times: Times, *names: str) -> dict[str, dict[str, float]]:
    """`<name>_s` and `<name>_cpu_s` of contestants, as JSON values."""
    return {f"{name}{key}": vars(Spread.of([getattr(t, kind) for t in times[name]]))
            for key, kind in (("_s", "wall"), ("_cpu_s", "cpu")) for name in names}
