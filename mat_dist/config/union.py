"""The section `union`: one peer against several threats. Formulas: docs/method.md."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mat_dist.config.fields import Number, Section


class UnionConfig(Section):
    """How one peer trains against several threats at once."""

    strategy: Literal["avg", "max", "random", "eat", "msd", "ramp"] | None = Field(
        None, description="learn from all threats evenly; from each image's worst one; from one drawn per step (SAT); "
                          "from linf or l1, the less robust one more often (E-AT); from the steepest over the threats "
                          "in each attack step (MSD); max with paired logits (RAMP). A generalist with specialists "
                          "learns so from their AEs (random and eat from one specialist's per step, unless it has "
                          "threats of its own), else from AEs of its own")
    threats: str | None = Field(None, description="norm:eps of each, such as linf:8/255,l2:1/2,l1:12, for AEs of its "
                                                  "own; the first one is the peer's threat")
    ramp_weight: Number = Field(5.0, ge=0, description="weight of RAMP's pairing against the hard labels on AEs "
                                                       "(Jiang and Singh, NeurIPS 2024: 5 from scratch)")
    projection_beta: Number = Field(0.0, ge=0, lt=1, description="weight of RAMP's other half, the gradient on clean "
                                                                 "images as far as each layer's own points the same "
                                                                 "way (published: 0.5); 0 is off")
