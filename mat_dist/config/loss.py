"""The settings of the mutual loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mat_dist.config.fields import Number, Section

PresetName = Literal["mat", "at", "at_wa", "mat_share", "mat_kd", "dml_at", "trades", "mat_trades", "cat", "mart",
                     "ard", "rslad", "lbgat", "peeraid"]


class LossConfig(Section):
    """The mutual loss of one peer; empty coefficients take the preset's value. Formula: docs/method.md."""

    preset: PresetName = Field("mat", description="named set of coefficients")
    hard_weight: Number | None = Field(None, ge=0, description="weight of cross-entropy on AEs; default 1 - kd_weight")
    hard_own: Number | None = Field(None, ge=0, le=1, description="share of hard_weight on own AEs (w_own), the rest "
                                                                  "is spread over peers' AEs")
    hard_loss: Literal["ce", "bce"] | None = Field(None, description="cross-entropy on AEs, or MART's boosted one")
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
    gate: Number | None = Field(None, ge=0, le=100, description="a teacher weighs by its probability of the true class "
                                                                "to this power (IAD: 0.1); 0: all alike")
    attackers: Literal["all", "partner", "one"] | None = Field(
        None, description="whose AEs the peer learns from: all peers'; its own and those of one other, the next one in "
                          "each step; only those of one peer, the next one in each step (the others attack only where "
                          "teacher_input own_ae asks for it)")
    temperature: Number | None = Field(None, gt=0, le=1000, description="softmax temperature of distillation (T)")
    t2_scale: bool | None = Field(None, description="multiply distillation by T squared")
    teacher_input: Literal["same_ae", "own_ae", "clean"] | None = Field(
        None, description="what a teacher looks at: what the student sees, the teacher's own AE, or the clean image")
    teacher_agg: Literal["mean_kl", "mean_prob", "mean_logit"] | None = Field(
        None, description="mean of the divergences, divergence to the mean probability, or to the mean logits")
    teacher_set: Literal["all", "owner", "frozen"] | None = Field(
        None, description="all other peers, only the peer that made the AE, or only peers that do not train")
    trades_beta: Number | None = Field(None, ge=0, description="weight of KL(clean prediction || own-AE prediction)")
    trades_temperature: Number | None = Field(None, gt=0, le=1000, description="softmax temperature of that term")
    mart_beta: Number | None = Field(None, ge=0, description="weight of the same KL, image by image times one minus "
                                                             "the clean probability of the true class (MART)")
    pair_weight: Number | None = Field(None, ge=0, description="weight of the mean squared difference between clean "
                                                               "and own-AE logits (ALP)")
    base_scale: Number | None = Field(None, gt=0, description="factor on all terms but distillation")
    label_smoothing: Number | None = Field(None, ge=0, lt=1, description="label smoothing of the cross-entropies on "
                                                                         "AEs and clean images")
    warmup_epochs: Number | None = Field(None, ge=0, description="epochs in which the peer learns alone: no "
                                                                 "distillation, hard labels on own AEs")

    @property
    def learns_aes(self) -> bool:
        """Whether a complete loss has a term on AEs; LBGAT's net of clean images has none."""
        return bool(self.hard_weight or self.kd_weight or self.trades_beta or self.mart_beta or self.pair_weight)
