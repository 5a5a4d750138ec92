"""What a run notes of its steps: pure functions from results to records.

`telemetry` writes and shows them. Losses and accuracies are lists with an entry per peer; seconds are wall time.
"""

from __future__ import annotations

from typing import Any

from mat_dist.core.step import Outcome
from mat_dist.runs.metrics import images_per_second


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
