"""What a run notes of its steps and evaluations: pure functions from results to records.

`telemetry` writes and shows them. Losses and accuracies are lists with an entry per peer; seconds are wall time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mat_dist.attacks.norms import Threat
from mat_dist.config.schema import PeerConfig
from mat_dist.core.step import Outcome
from mat_dist.evaluation.during_training import EMA, ENSEMBLE, RAW, AttackPlan, Result, threats_of
from mat_dist.runs.rates import images_per_second
from mat_dist.runs.result_table import Result as TableRow


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


def validation_record(results: Sequence[Result]) -> dict[str, Any]:
    """Accuracies of the peers and the ensemble, with raw and with averaged weights (None where none are kept)."""
    record: dict[str, Any] = {}
    for prefix, weights in (("", RAW), ("ema_", EMA)):
        chosen = [r for r in results if r.weights == weights]
        record[f"{prefix}clean_acc"] = [r.clean for r in chosen if r.target != ENSEMBLE] or None
        record[f"{prefix}robust_acc"] = [r.robust for r in chosen if r.target != ENSEMBLE] or None
        for r in chosen:
            if r.target == ENSEMBLE:
                record[f"{prefix}ensemble"] = {"clean_acc": r.clean, "robust_acc": r.robust}
    return record


def peers_robust(results: Sequence[Result], specs: Sequence[PeerConfig]) -> list[float | None]:
    """Each peer's accuracy against its own threat, with raw weights, in [0, 1]; None for one that does not train."""
    threats, found = threats_of(specs), {r.target: r for r in results if r.weights == RAW}
    return [None if p.frozen else found[str(p.name)].against(threats.index(Threat(p.threat.norm, p.threat.eps)))
            for p in specs]


def table_rows(checkpoint: str, results: Sequence[Result], attack: AttackPlan) -> list[TableRow]:
    """Rows of the final table for one checkpoint (`best` or `last`)."""
    return [TableRow(target=r.target, weights="EMA" if r.weights == EMA else "raw", checkpoint=checkpoint,
                     clean_acc=r.clean, robust_acc=r.robust, pgd_steps=attack.steps, images=len(r.clean_N))
            for r in results]
