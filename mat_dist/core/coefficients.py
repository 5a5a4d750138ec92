"""The weights of one peer's loss, complete."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mat_dist.config.schema import LossConfig


@dataclass(frozen=True)
class Coefficients:
    """The loss of one peer with no coefficient left open; the fields are those of `LossConfig`."""

    preset: str
    hard_weight: float
    hard_own: float
    hard_loss: str
    clean_weight: float
    kd_weight: float
    kd_own: float
    kd_clean: float
    kd_loss: str
    kd_where: str
    attackers: str
    gate: float
    temperature: float
    t2_scale: bool
    teacher_input: str
    teacher_agg: str
    teacher_set: str
    trades_beta: float
    trades_temperature: float
    mart_beta: float
    pair_weight: float
    base_scale: float
    label_smoothing: float
    warmup_epochs: float

    @classmethod
    def of(cls, loss: LossConfig) -> Coefficients:
        """From a complete section (`config.presets.fill_loss`). Raises ValueError naming the fields that are empty."""
        values = {field.name: getattr(loss, field.name) for field in fields(cls)}
        empty = [f"loss.{name}" for name, value in values.items() if value is None]
        if empty:
            raise ValueError(f"empty: {', '.join(empty)}; fill_loss takes them from the preset")
        return cls(**values)
