"""What a run warns of while it goes on: a slow rank, a loss that jumps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

SLOW = 0.7  # fastest / slowest working time below which a rank counts as slow (the threshold of NVIDIA's NVRx guide)
SPIKE = 10.0  # times the median of a peer's last losses
REMEMBERED, LEAST = 20, 3  # log records that the median is taken over, and how many it needs


def wait_shares(phases: Sequence[dict[str, float]]) -> list[float]:
    """Share of each rank's step that went into waiting for others; the slow rank waits least."""
    return [round(p.get("wait", 0.0) / total, 4) if (total := sum(p.values())) > 0 else 0.0 for p in phases]


class Watch:
    """Turns log records into warnings: one per run for slow ranks, one per jump for losses."""

    def __init__(self, peers: int) -> None:
        self._slow_told = False
        self._jumped: set[int] = set()
        self._losses: list[deque[float]] = [deque(maxlen=REMEMBERED) for _ in range(peers)]

    def slow_rank(self, phases: Sequence[dict[str, float]]) -> str | None:
        """A line about the rank that the others wait for, the first time there is one.

        Args:
            phases: mean seconds per step by phase, for each rank.
        """
        work = [sum(p.values()) - p.get("wait", 0.0) for p in phases]
        if self._slow_told or len(work) < 2 or min(work) >= SLOW * max(work):
            return None
        self._slow_told = True
        slowest = work.index(max(work))
        return (f"warning: rank {slowest} is slow: it works {max(work):.3g} s per step, the fastest {min(work):.3g} s; "
                "the others wait for it (wait_share in metrics.jsonl)")

    def spikes(self, step: int, losses: Sequence[float]) -> list[str]:
        """A line for each peer whose loss is SPIKE times the median of its last log records or more."""
        found = []
        for peer, (loss, before) in enumerate(zip(losses, self._losses, strict=True)):
            usual = median(before) if len(before) >= LEAST else None
            jumped = usual is not None and loss > SPIKE * usual
            if usual is not None and jumped and peer not in self._jumped:
                found.append(f"warning: loss of peer {peer} jumped to {loss:.4g} at step {step}, {loss / usual:.3g} "
                             "times its usual one: if it does not come back, lower optim.lr or set optim.clip_norm")
            if jumped:  # told once, until the loss is back; the usual one does not learn from it
                self._jumped.add(peer)
            else:
                self._jumped.discard(peer)
                before.append(loss)
        return found
