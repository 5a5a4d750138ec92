"""Agreement between ranks: headers before every exchange, and the commit vote before every update.

A rank that fails inside a local phase does not leave: it arrives at the next header with a code, so that all ranks stop
on the same step and print the same text. Headers also compare what gloo would accept in silence: another step, shape,
type or batch on one rank.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor

from mat_dist import rng
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.processes import known_error
from mat_dist.errors import MatError, NonFinite, PeerFailed, described, told_error

T = TypeVar("T")
MAX_TEXT = 2000  # characters of a foreign error message that are passed on
STEP_NUMBER = "the step number"
STAGES = ("adversarial example", "logit", "loss", "gradient")


@dataclass(frozen=True)
class Verdict:
    """A vote that committed a step: whether some rank must stop, whether all have written their checkpoint files."""

    stop: bool
    ready: bool


class Agreement:
    """This rank's side of one unit of common work (a training step, loading, an evaluation).

    Args:
        mesh: the ranks that must agree.
        where: how messages name the work, e.g. "step 12".
        number: a number that all ranks must share here, e.g. the step.
    """

    def __init__(self, mesh: Mesh, where: str, number: int = 0) -> None:
        self.mesh, self.where, self.number = mesh, where, number
        if mesh.beat is not None:
            mesh.beat.work = where
        self.failure: Exception | None = None
        self._phase = ""

    def run(self, phase: str, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """The result of a local phase; an error is kept for the next header.

        After a failure nothing runs and the result is meaningless: the next `header` or `vote` raises on all
        ranks. Inside `work` stands no collective but `Mesh.gather_statistics`, which an error here ends at once.
        """
        if self.failure is None:
            self._phase = phase
            try:
                return work(*args, **kwargs)
            except Exception as error:  # whatever it is, it must reach the header
                self.failure = known_error(error) or error
                self.mesh.tell_replicas(self._described())
        return cast(T, None)

    def header(self, point: str, payload: Tensor | None = None, checksum: int = 0) -> None:
        """Meet all ranks before an exchange.

        Args:
            point: name of the exchange; all ranks must be at the same one.
            payload: what will be exchanged; shape and type must be equal everywhere.
            checksum: of this rank's batch; compared among ranks that share a batch.

        Raises the first failure of any rank, or PeerFailed for a mismatch, with the same text on all ranks.
        """
        form = f"{tuple(payload.shape)} {payload.dtype}" if payload is not None else "nothing"
        rows = self._gather(point, [checksum, *(zlib.crc32(text.encode()) for text in (point, form))])
        self._compare([row[1] for row in rows], "the exchange that comes next")
        if len({row[2] for row in rows}) > 1:
            self._compare(self.mesh.gather_json(form), "the shape or type of the data to exchange")
        self._compare_batches(rows)

    def vote(self, bits: Sequence[int], *, stop: bool = False, ready: bool = True, checksum: int = 0) -> Verdict:
        """Decide together whether this step is committed.

        Args:
            bits: for each local peer in turn, whether its AEs, logits, loss and gradient are finite; of a rank that
                failed they do not count.
            stop: a signal asked this rank to stop after the step.
            ready: this rank has written its part of a checkpoint.
            checksum: as in `header`, for batches whose checksum lay on the device until now.

        Raises the first failure of any rank, or NonFinite naming the peers where it began.
        """
        local = self.mesh.placement.peers_per_rank
        rows = self._gather("vote", [checksum, int(stop), int(ready), *(bits or [0] * 4 * local)])
        self._compare_batches(rows)
        for stage, name in enumerate(STAGES):
            guilty = sorted({rank % self.mesh.placement.peer_ranks * local + i for rank, row in enumerate(rows)
                             for i in range(local) if not row[3 + 4 * i + stage]})
            if guilty:
                listed = ", ".join(map(str, guilty))
                found = NonFinite(f"peer {listed} produced a non-finite {name}; no peer was updated", self.where,
                                  "lower optim.lr, set optim.clip_norm, or check the data; the newest checkpoint is "
                                  "intact")
                found.peers, found.stage = tuple(guilty), name
                raise found
        return Verdict(stop=any(row[1] for row in rows), ready=all(row[2] for row in rows))

    def sync(self, point: str) -> None:
        """End a phase of unknown length together: raise if any rank failed in it. Waits as long as all ranks live."""
        self.mesh.meet(f"{self.where}, {point}")
        self.header(point)

    # ---------------------------------------------------------------- inside

    def _gather(self, point: str, numbers: list[int]) -> list[list[int]]:
        """The numbers of all ranks, by rank, where none has failed and all are at one step."""
        self.mesh.where = f"{self.where}, {point}"
        rows = self.mesh.gather_world([int(self.failure is not None), self.number, *numbers])
        if any(row[0] for row in rows):
            self._raise_together()
        self._compare([row[1] for row in rows], STEP_NUMBER)
        return [row[2:] for row in rows]

    def _compare_batches(self, rows: list[list[int]]) -> None:
        for ranks in self.mesh.placement.peer_axis():
            self._compare([rows[r][0] for r in ranks], "the batch (checksum of pixels and labels)", ranks)

    def _raise_together(self) -> NoReturn:
        """All ranks raise the failure of the lowest failing rank."""
        everyone = self.mesh.gather_json(self._described())
        failed = [rank for rank, told in enumerate(everyone) if told is not None]
        first = everyone[failed[0]]
        more = f" (ranks {', '.join(map(str, failed))} failed)" if len(failed) > 1 else ""
        raise told_error({**first, "what": first["what"] + more}) from self.failure

    def _described(self) -> dict[str, Any] | None:
        """What the others are told of this rank's failure; None where there is none, or it was told by another rank."""
        if self.failure is None or getattr(self.failure, "told", False):
            return None
        return told_by_rank(self.failure, self.mesh, f"{self.where}, {self._phase}")

    def _compare(self, values: Sequence[Any], what: str, ranks: Sequence[int] | None = None) -> None:
        """Raise PeerFailed unless the values of these ranks (of all) are equal."""
        by_rank = dict(zip(ranks if ranks is not None else range(len(values)), values, strict=True))
        ((common, count),) = Counter(values).most_common(1)
        odd = [rank for rank, value in by_rank.items() if value != common]
        if not odd:
            return
        where = "between ranks" if what == STEP_NUMBER else self.where  # which differs from rank to rank then
        listed = ", ".join(f"rank {rank}: {_short(value)}" for rank, value in by_rank.items())
        # Two ranks, or a tie, cannot tell who is wrong.
        named = f"rank {', '.join(map(str, odd))} differs" if count > len(odd) else "ranks differ"
        raise PeerFailed(f"{named} in {what}: {listed}", where,
                         "start all ranks with the same code, data and configuration")


def told_by_rank(error: Exception, mesh: Mesh, where: str) -> dict[str, Any]:
    """What all ranks are told of an error of this one, which names this rank where its cause is unknown."""
    if isinstance(error, MatError):
        return described(error)
    place = mesh.placement
    where = f"{where}, rank {place.rank}, peer {place.peers_of(place.rank)}"
    text = f"{type(error).__name__}: {error}"[:MAX_TEXT]
    if isinstance(error, torch.OutOfMemoryError):
        how = "use a smaller train.batch_size, more train.accumulate, or step.memory=recompute"
    else:
        how = f"see the traceback in rank_{place.rank}.log"
    return {"code": PeerFailed.code, "what": text, "where": where, "how": how}


def _short(value: Any) -> str:
    """A checksum in hexadecimal digits, anything else as it is."""
    return hex(value & (1 << 64) - 1) if isinstance(value, int) and not 0 <= value <= 1 << 20 else str(value)


def batch_checksum(x_BCHW: Tensor, y_B: Tensor) -> Tensor:
    """A number that changes with any pixel, label or their order -> int64 scalar on x's device.

    CRC-32 on the CPU (1 ms for 128 CIFAR images); on a GPU a place-weighted sum, which needs no transfer.
    """
    if not x_BCHW.is_cuda:
        return torch.tensor(zlib.crc32(y_B.numpy().tobytes(), zlib.crc32(x_BCHW.contiguous().numpy().data)))
    return weighted_checksum(x_BCHW, y_B)


def weighted_checksum(x_BCHW: Tensor, y_B: Tensor) -> Tensor:
    """Bits times numbers that tell their places, summed modulo 2^64 -> int64 scalar on x's device."""
    pixels, labels = (_words(part) for part in (x_BCHW, y_B))
    place = torch.arange(1, 2 * pixels.numel(), 2, device=pixels.device)
    if y_B.ndim == 1:
        kind = torch.arange(1, 2 * labels.numel(), 2, device=labels.device)
    else:  # where two images with one class each change places, the sum of their places stays: hashes of places do not
        kind = rng.bits(0, labels.shape, device=labels.device)
    return (pixels * place).sum() + ((labels + 1) * kind).sum() * 0x9E3779B1


def _words(part: Tensor) -> Tensor:
    """The bits of a tensor as one row of whole numbers."""
    return part.contiguous().view(torch.int64 if part.element_size() == 8 else torch.int32).reshape(-1)
