"""The settings of the training attack and of unions of threats."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mat_dist.config.fields import Integer, Number, Section
from mat_dist.config.methods import Registered, attack_losses, attack_methods, strategies


class AttackConfig(Section):
    """How a peer makes its adversarial examples in training."""

    method: Annotated[str, Registered(attack_methods)] = Field(
        "pgd", description="pgd: equal steps, the last point counts; apgd: Auto-PGD sets its own steps, the best point "
                           "counts; n_fgsm: one step from noise of 2 eps, not cut to the ball (linf, steps: 1); free: "
                           "one step a replay along the image gradient that learning gives (steps: 1, train.replays)")
    steps: Integer = Field(10, ge=1, le=1000, description="gradient steps; 1 with a uniform start is FGSM-RS")
    step_size: Number | None = Field(None, gt=0, le=1e5, description="length of a step; default 2.5 eps / steps, for "
                                                                     "one step 1.25 eps, n_fgsm and free eps; apgd: "
                                                                     "of the first step, 2 eps, for l1 eps")
    start: Literal["uniform", "gaussian", "zero"] | None = Field(
        None, description="start noise; gaussian is TRADES' 0.001 normal; default: the preset's (uniform)")
    loss: Annotated[str, Registered(attack_losses)] | None = Field(
        None, description="what the attack raises: cross-entropy (ce), KL to the own clean prediction (kl_clean, "
                          "TRADES) or to the teachers' (kl_teacher, RSLAD), or the CW margin (margin); default: the "
                          "preset's (ce)")


class UnionConfig(Section):
    """How one peer trains against several threats at once. Formulas: docs/method.md."""

    strategy: Annotated[str, Registered(strategies)] | None = Field(
        None, description="learn from all threats evenly (avg); from each image's worst one (max); from one drawn per "
                          "step (random, SAT); from linf or l1, the less robust one more often (eat, E-AT); from the "
                          "steepest over the threats in each attack step (msd); max with paired logits (ramp). A "
                          "generalist without threats of its own learns so from its specialists' AEs (avg, max, ramp)")
    threats: str | None = Field(None, description="norm:eps of each, such as linf:8/255,l2:1/2,l1:12, for AEs of its "
                                                  "own; the first one is the peer's threat")
