"""The settings of the training attack."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mat_dist.config.fields import Integer, Number, Section


class AttackConfig(Section):
    """How a peer makes its adversarial examples in training."""

    method: Literal["pgd", "apgd", "n_fgsm", "free"] = Field(
        "pgd", description="pgd: equal steps, the last point counts; apgd: Auto-PGD sets its own steps, the best point "
                           "counts; n_fgsm: one step from noise of 2 eps, not cut to the ball (linf, steps: 1); free: "
                           "one step a replay along the image gradient that learning gives (steps: 1, train.replays)")
    steps: Integer = Field(10, ge=1, le=1000, description="gradient steps; 1 with a uniform start is FGSM-RS")
    step_size: Number | None = Field(None, gt=0, le=1e5, description="length of a step; default 2.5 eps / steps, for "
                                                                     "one step 1.25 eps, n_fgsm and free eps; apgd: "
                                                                     "of the first step, 2 eps, for l1 eps")
    l1_share: Number | None = Field(None, gt=0, le=1, description="share of an image's values that an l1 step moves; "
                                                                  "default 1 %; apgd: in its first steps, 5 %")
    eps_warmup_epochs: Number = Field(0.0, ge=0, description="epochs in which radius and steps grow linearly from 0 "
                                                             "(DAJAT: all of them); attacks run eagerly until then")
    steps_warmup_epochs: Number = Field(0.0, ge=0, description="epochs in which the number of steps grows from 1, "
                                                               "their length being that of all steps; attacks run "
                                                               "eagerly until then")
    split_batch: bool = Field(False, description="each of the P peers crafts AEs of 1/P of a batch, and all learn the "
                                                "batch that they have made together: fewer passes for less accuracy")
    start: Literal["uniform", "gaussian", "zero", "previous"] | None = Field(
        None, description="start noise; gaussian is TRADES' 0.001 normal; previous: the image's perturbation of the "
                          "epoch before (ATTA; kept in memory, 2 bytes a value); default: the preset's (uniform)")
    reset_epochs: Integer = Field(0, ge=0, description="start previous: forget all perturbations every so many epochs "
                                                       "(ATTA: 10); 0: never")
    loss: Literal["ce", "kl_clean", "kl_teacher", "margin"] | None = Field(
        None, description="what the attack raises: cross-entropy, KL to the own clean prediction (TRADES) or to the "
                          "teachers' (RSLAD), or the CW margin; default: the preset's (ce)")
