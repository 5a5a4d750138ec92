"""The settings of the mutual loss, and the same with nothing left open."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from pydantic import Field

from mat_dist.config.fields import Number, Section
from mat_dist.config.methods import Registered, presets


class LossConfig(Section):
    """The mutual loss of one peer; empty coefficients take the preset's value. Formula: docs/method.md."""

    preset: Annotated[str, Registered(presets)] = Field("mat", description="named set of coefficients")
    hard_weight: Number | None = Field(None, ge=0, description="weight of cross-entropy on AEs; default 1 - kd_weight")
    hard_own: Number | None = Field(None, ge=0, le=1, description="share of hard_weight on own AEs (w_own), the rest "
                                                                  "is spread over peers' AEs")
    clean_weight: Number | None = Field(None, ge=0, description="weight of cross-entropy on clean images (c_clean)")
    kd_weight: Number | None = Field(None, ge=0, le=1, description="weight of distillation from peers on AEs (alpha)")
    kd_own: Number | None = Field(None, ge=0, le=1, description="share of kd_weight on own AEs, the rest is spread "
                                                                "over peers' AEs; default an even share (with "
                                                                "teacher_set owner: 0)")
    kd_clean: Number | None = Field(None, ge=0, le=1, description="weight of distillation on clean images (RSLAD)")
    kd_loss: Literal["kl", "mse"] | None = Field(
        None, description="divergence of softened predictions, or mean squared difference of logits (LBGAT)")
    kd_where: Literal["all", "teacher_right", "student_wrong"] | None = Field(
        None, description="images on which a teacher is listened to: all; those that it labels correctly; of these "
                          "those that the student gets wrong")
    temperature: Number | None = Field(None, gt=0, le=1000, description="softmax temperature of distillation and of "
                                                                        "pair_kl (T); both count T squared times")
    teacher_input: Literal["same_ae", "own_ae", "clean"] | None = Field(
        None, description="what a teacher looks at: what the student sees, the teacher's own AE, or the clean image")
    teacher_set: Literal["all", "owner", "expert", "frozen"] | None = Field(
        None, description="all other peers; only the peer that made the AE; only peers whose own threat has the norm "
                          "that the AE was made for; or only peers that do not train")
    pair_kl: Number | None = Field(None, ge=0, description="weight of KL(clean prediction || own-AE prediction) "
                                                           "(TRADES: beta)")
    pair_mse: Number | None = Field(None, ge=0, description="weight of the mean squared difference between clean and "
                                                            "own-AE logits (ALP)")
    label_smoothing: Number | None = Field(None, ge=0, lt=1, description="label smoothing of the cross-entropies on "
                                                                         "AEs and clean images")
    warmup_epochs: Number | None = Field(None, ge=0, description="epochs in which the peer learns alone: no "
                                                                 "distillation, hard labels on own AEs")

    @property
    def learns_aes(self) -> bool:
        """Whether a complete loss has a term on AEs; LBGAT's net of clean images has none."""
        return bool(self.hard_weight or self.kd_weight or self.pair_kl or self.pair_mse)


@dataclass(frozen=True)
class LossWeights:
    """The loss of one peer with no coefficient left open; the fields are those of `LossConfig`."""

    hard_weight: float
    hard_own: float
    clean_weight: float
    kd_weight: float
    kd_own: float
    kd_clean: float
    kd_loss: str
    kd_where: str
    temperature: float
    teacher_input: str
    teacher_set: str
    pair_kl: float
    pair_mse: float
    label_smoothing: float
    warmup_epochs: float

    @classmethod
    def of(cls, loss: LossConfig) -> LossWeights:
        """From a complete section (`config.presets.fill_loss`). Raises ValueError naming the fields that are empty."""
        values = {field.name: getattr(loss, field.name) for field in fields(cls)}
        empty = [f"loss.{name}" for name, value in values.items() if value is None]
        if empty:
            raise ValueError(f"empty: {', '.join(empty)}; fill_loss takes them from the preset")
        return cls(**values)

    def alone(self) -> LossWeights:
        """While the peer warms up: all weight of labels and teachers is on the labels of own AEs."""
        hard = self.hard_weight + self.kd_weight + self.kd_clean if self.hard_weight else 0.0
        return replace(self, hard_weight=hard, hard_own=1.0, kd_weight=0.0, kd_clean=0.0)
