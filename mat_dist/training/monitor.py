"""What a run notes of its steps, and what it warns of: a slow rank, a loss that jumps, catastrophic overfitting.

Losses and accuracies are lists with an entry per peer; seconds are wall time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from mat_dist.core.step import Outcome
from mat_dist.runs.metrics import images_per_second

SLOW = 0.7  # fastest / slowest working time below which a rank counts as slow (the threshold of NVIDIA's NVRx guide)
SPIKE = 10.0  # times the median of a peer's last losses
# Catastrophic overfitting (Wong, Rice and Kolter, ICLR 2020): right on the own weak training AEs, wrong under PGD. It
# is there within a few hundred steps, so that a probe per epoch finds it.
FOOLED, SURE = 0.1, 0.4
REMEMBERED, LEAST = 20, 3  # log records that the median is taken over, and how many it needs


class Meter:
    """Seconds of the steps since the last log record, by phase; saving and evaluating do not count."""

    def __init__(self) -> None:
        self.steps, self.elapsed = 0, 0.0
        self.seconds: dict[str, float] = {}

    def add(self, seconds: dict[str, float], elapsed: float) -> None:
        """Count one step."""
        self.steps += 1
        self.elapsed += elapsed
        for phase, spent in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent

    def means(self) -> dict[str, float]:
        """Mean seconds per step of each phase."""
        return {phase: round(spent / self.steps, 6) for phase, spent in self.seconds.items()}


def step_record(outcome: Outcome, meter: Meter, batch_size: int) -> dict[str, Any]:
    """Losses, accuracies and speed of a log step; the only place where metrics are read back from the device."""
    assert outcome.loss_P is not None and outcome.transfer_PS is not None
    transfer = outcome.transfer_PS.tolist()
    return {"loss": outcome.loss_P.tolist(), "train_clean_acc": [row[-1] for row in transfer],
            "train_ae_acc": [row[i] for i, row in enumerate(transfer)], "transfer": transfer,
            "images_per_s": images_per_second(meter.steps * batch_size, meter.elapsed),
            "step_s": meter.elapsed / meter.steps}


def wait_shares(phases: Sequence[dict[str, float]]) -> list[float]:
    """Share of each rank's step that went into waiting for others; the slow rank waits least."""
    return [round(p.get("wait", 0.0) / total, 4) if (total := sum(p.values())) > 0 else 0.0 for p in phases]


class Watch:
    """Turns log records into warnings: one per run for slow ranks, one per jump for losses."""

    def __init__(self, peers: int) -> None:
        self._slow_told = False
        self._jumped: set[int] = set()
        self._train_ae: Sequence[float] = ()
        self._overfit: set[int] = set()
        self._losses: list[deque[float]] = [deque(maxlen=REMEMBERED) for _ in range(peers)]

    def lines(self, step: int, record: Mapping[str, Any], phases: Sequence[dict[str, float]]) -> list[str]:
        """What is unusual about a log record (`records.step_record`) and its phases."""
        slow = self.slow_rank(phases)
        self._train_ae = record["train_ae_acc"]
        return [*([slow] if slow else []), *self.spikes(step, record["loss"])]

    def overfitting(self, robust: Sequence[float | None]) -> list[str]:
        """A line for each peer that labels its training AEs well and almost nothing under the evaluator's PGD.

        Args:
            robust: each peer's validation accuracy under PGD, in [0, 1]; None for a peer that does not train.
        """
        found = []
        for peer, (own, held) in enumerate(zip(self._train_ae, robust, strict=False)):
            if held is not None and held < FOOLED and own > SURE and peer not in self._overfit:
                self._overfit.add(peer)
                found.append(f"warning: catastrophic overfitting of peer {peer}: {100 * own:.0f} % right on its own "
                             f"training AEs, {100 * held:.1f} % under PGD: use more attack.steps or a smaller "
                             "attack.step_size")
        return found

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
