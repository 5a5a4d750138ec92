"""`bench step`: what a step is made of, how far it is from its limit, and what the guards cost."""

from __future__ import annotations

import statistics
from typing import Any

from mat_dist.bench.subject import Limit, Subject
from mat_dist.bench.timing import Contestant, Spread, Timing, interleaved, ratio
from mat_dist.runs.metrics import device_memory


def measure_step(subject: Subject, rounds: int) -> dict[str, Any]:
    """Time the step against its limit and against itself without guards -> figures of this launch.

    Every rank gets the same figures. Times of a round are those of the slowest rank; CPU times are those of all
    ranks together.
    """
    mesh = subject.cohort.mesh
    contestants: dict[str, Contestant] = {"step": subject.step, "unguarded": subject.unguarded_step,
                                          "limit": Limit(subject), "logged": subject.logged_step}
    mine = interleaved(contestants, rounds, mesh)
    times = together(mesh.gather_json({name: [(t.cpu, t.wall) for t in found] for name, found in mine.items()}))
    clocks = mesh.gather_json(subject.clocks[-rounds:])
    parts = {phase: statistics.median(max(rank[n][phase] for rank in clocks) for n in range(rounds))
             for phase in clocks[0][0]}
    batch = subject.config.train.batch_size
    walls = [t.wall for t in times["step"]]
    return {
        "rounds": rounds,
        "step_s": vars(Spread.of(walls)), "step_cpu_s": vars(Spread.of([t.cpu for t in times["step"]])),
        "limit_s": vars(Spread.of([t.wall for t in times["limit"]])),
        "images_per_s": batch / statistics.median(walls),
        "parts_s": parts,
        "of_limit": both(times, "limit", "step"),
        "guards": both(times, "step", "unguarded", minus=1.0),
        "log_step": both(times, "logged", "step", minus=1.0), "log_every": subject.config.log.every,
        "memory": mesh.gather_json(device_memory(mesh.device)),
    }


def together(ranks: list[dict[str, list[tuple[float, float]]]]) -> dict[str, list[Timing]]:
    """The times of all ranks as one: CPU times added, the longest wall time."""
    return {name: [Timing(sum(one[0] for one in turn), max(one[1] for one in turn))
                   for turn in zip(*(rank[name] for rank in ranks), strict=True)] for name in ranks[0]}


def both(times: dict[str, list[Timing]], above: str, below: str, minus: float = 0.0) -> dict[str, dict[str, float]]:
    """Ratio of two contestants by CPU and by wall time, less `minus`."""
    found = {"cpu": ratio([t.cpu for t in times[above]], [t.cpu for t in times[below]]),
             "wall": ratio([t.wall for t in times[above]], [t.wall for t in times[below]])}
    return {kind: {name: value - minus for name, value in vars(spread).items()} for kind, spread in found.items()}
