"""The guard of a step: no local statement and no exchange stands outside it.

Local work runs through `run` and `each`: the first failure is kept, nothing runs after it, and the next exchange tells
it to all ranks. Every exchange is a header, the collective, and two laps of the clock in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any, TypeVar

from torch import Tensor

from mat_dist.distributed.agreement import Agreement
from mat_dist.distributed.groups import Mesh
from mat_dist.errors import MatError, told_error

T = TypeVar("T")


Lane = Callable[[int], AbstractContextManager[Any]]


def one_lane(count: int) -> AbstractContextManager[Lane]:
    """The peers of a rank work one after another."""
    return nullcontext(lambda number: nullcontext())


class Clock:
    """Host seconds by phase; `wait` is what headers cost, most of it waiting for the slowest rank."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, phase: str) -> None:
        """Charge the time since the last lap to `phase`."""
        now = perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


class Guard(Agreement):
    """An agreement that also keeps the time.

    Args:
        clock: takes the times of the phases; the benchmark hands in one that waits for the device.
        failure: what the guard before this one could not tell any more.

    Attributes:
        meet: (guard, point, what this rank sends, checksum) -> what all have sent; a capture puts its own in place of
            `exchange`.
        lanes: (number of peers) -> a scope that gives each of them one for its work, so that a GPU may do all at once.
    """

    def __init__(self, mesh: Mesh, where: str, step: int, clock: Clock | None = None,
                 failure: MatError | None = None) -> None:
        super().__init__(mesh, where, step)
        self.failure = failure
        self.meet: Callable[[Guard, str, Tensor, Callable[[], int]], Tensor] = Guard.exchange
        self.lanes: Callable[[int], AbstractContextManager[Lane]] = one_lane
        self.clock = clock or Clock()

    def each(self, phase: str, work: Callable[..., T], *columns: Iterable[Any]) -> list[T]:
        """`work` for each peer of the first column, with its entries of the others; messages name the peer."""
        rows, found = list(zip(*columns, strict=True)), []
        with self.lanes(len(rows)) as lane:
            for number, row in enumerate(rows):
                with lane(number):
                    found.append(self.run(f"{phase} of {row[0].name}", work, *row))
        self.clock.lap(phase)
        return found

    def all_gather(self, point: str, make: Callable[[], Tensor], checksum: Callable[[], int] = int) -> Tensor:
        """What `make` gives here (W, ...) -> that of all ranks of the peer axis (ranks * W, ...), without gradient.

        Where W is 0, alike on all ranks, nothing travels but the header.
        """
        return self.meet(self, point, self.run(point, make), checksum)

    def exchange(self, point: str, local: Tensor, checksum: Callable[[], int] = int) -> Tensor:
        """The header, and the gathering of `all_gather`."""
        self._header(point, local, self.run("checksum", checksum) or 0)
        gathered = self.mesh.gather_peers(local) if len(local) else local
        self.clock.lap("exchange")
        return gathered

    def average(self, point: str, make: Callable[[], Sequence[Tensor]], needed: bool = True) -> None:
        """Replace the tensors that `make` gives by their mean over the replicas, in place.

        Args:
            needed: alike on all ranks; where it is False, or there is one replica, nothing happens.
        """
        if not needed or self.mesh.placement.replicas == 1:
            return
        tensors = self.run(point, make)
        self._header(point)  # a replica that failed must not be missing in the all-reduce
        self.mesh.average_replicas(tensors)
        self.clock.lap("exchange")

    def kept(self) -> MatError | None:
        """The failure in the words for all ranks, for another guard to tell."""
        if (described := self._described()) is None:
            return None
        found = told_error(described)
        found.__cause__ = self.failure
        return found

    def _header(self, point: str, payload: Tensor | None = None, checksum: int = 0) -> None:
        self.header(point, payload, checksum)
        self.clock.lap("wait")
