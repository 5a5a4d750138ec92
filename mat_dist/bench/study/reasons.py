"""What the peers of a run do with each other's AEs: how strong those are, and what there is to learn from whom.

Measured on the validation split (and own AEs on training images too) with one attack for all rows, PGD on
cross-entropy with as many steps as in training; never on the test split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist.attacks.norms import Threat
from mat_dist.checkpoints.load import candidates
from mat_dist.config.schema import Config
from mat_dist.core.losses import kl_per_image
from mat_dist.data import ImageSet
from mat_dist.evaluation.attacks import AttackPlan, craft
from mat_dist.evaluation.chunks import chosen_images, pixels, strict_arithmetic

MEASURES = ("right", "confidence", "teacher_confidence", "agreement", "teacher_right", "some_teacher_right", "kl")


def opinions(logits_PBK: Tensor, y_B: Tensor) -> dict[str, Tensor]:
    """What P >= 2 peers say about the same images, summed over the images -> each of MEASURES as (P,), for a student.

    `right`: labelled correctly; `confidence`: probability of the true class. Over the P - 1 others, as teachers, the
    mean of: `teacher_confidence`, their probability of the true class; `agreement`, with the student's label;
    `teacher_right`, where the student is wrong; `kl`, KL(teacher || student) in nats. `some_teacher_right`: at least
    one other is right where the student is wrong.
    """
    peers, batch = logits_PBK.shape[:2]
    log_PBK = logits_PBK.double().log_softmax(-1)
    label_PB = logits_PBK.argmax(-1)
    right_PB = label_PB == y_B
    true_PB = log_PBK.gather(-1, y_B.expand(peers, batch)[..., None])[..., 0].exp()
    wrong_PB, correct_B = ~right_PB, right_PB.sum(0)
    alike_PB = torch.stack([(label_PB == one_B).sum(0) - 1 for one_B in label_PB])
    kl_PB = torch.stack([torch.stack([kl_per_image(other_BK, own_BK) for other_BK in log_PBK]).sum(0)
                         for own_BK in log_PBK])
    others = peers - 1
    found = {"right": right_PB, "confidence": true_PB, "teacher_confidence": (true_PB.sum(0) - true_PB) / others,
             "agreement": alike_PB / others, "teacher_right": wrong_PB * correct_B / others,
             "some_teacher_right": wrong_PB & (correct_B > 0), "kl": kl_PB / others}
    return {name: found[name].double().sum(-1) for name in MEASURES}


@dataclass(frozen=True)
class Cohort:
    """The peers of a run.

    Attributes:
        models: in eval mode, over images in [0, 1].
        threats: what each one's AEs are made for.
        plans: how they are made.
        config: for the seed, the chunks and the precision.
    """

    models: Sequence[nn.Module]
    threats: Sequence[Threat]
    plans: Sequence[AttackPlan]
    config: Config
    device: torch.device

    @classmethod
    def of(cls, models: Sequence[nn.Module], config: Config, device: torch.device) -> Cohort:
        """With the training's threats and numbers of steps."""
        return cls(models, [Threat(spec.threat.norm, spec.threat.eps) for spec in config.peers],
                   [AttackPlan(steps=spec.attack.steps) for spec in config.peers], config, device)

    def attack(self, source: int, x_BCHW: Tensor, y_B: Tensor, chunk: int) -> Tensor:
        """The AEs of one peer."""
        return craft(self.models[source], x_BCHW, y_B, self.threats[source], self.plans[source],
                     seed=self.config.run.seed, chunk=chunk)

    @torch.no_grad()
    def logits(self, x_BCHW: Tensor) -> Tensor:
        """Of all peers -> (P, B, K)."""
        return torch.stack([model(x_BCHW) for model in self.models])

    def measure(self, data: ImageSet, size: int, *, own_alone: bool = False) -> dict[str, Any]:
        """The mean of each of MEASURES on `size` images of a split, as lists [student][source], clean images last.

        Args:
            own_alone: measure `right` alone, [student][own AEs, clean images].
        """
        samples = chosen_images(len(data), size, self.config.run.seed)
        peers, step = len(self.models), self.config.eval.chunk
        names = ("right",) if own_alone else MEASURES
        sums = {name: torch.zeros(peers, 2 if own_alone else peers + 1, dtype=torch.float64) for name in names}
        with strict_arithmetic():
            for chunk, first in enumerate(range(0, len(samples), step)):
                x_BCHW, y_B = pixels(data, samples[first:first + step], self.device, self.config)
                for source in range(peers + 1):
                    adv = x_BCHW if source == peers else self.attack(source, x_BCHW, y_B, chunk)
                    if not own_alone:
                        for name, value_P in opinions(self.logits(adv), y_B).items():
                            sums[name][:, source] += value_P.cpu()
                    elif source == peers:
                        sums["right"][:, 1] += (self.logits(adv).argmax(-1) == y_B).sum(-1).cpu()
                    else:
                        with torch.no_grad():
                            sums["right"][source, 0] += (self.models[source](adv).argmax(-1) == y_B).sum().cpu()
        return {"images": len(samples), **{name: [[round(value / len(samples), 6) for value in row]
                                                  for row in table.tolist()] for name, table in sums.items()}}


def measured(models: Sequence[nn.Module], config: Config, validation: ImageSet, training: ImageSet, size: int,
             device: torch.device) -> dict[str, Any]:
    """All that `mat_dist.bench reasons` finds out, as JSON values; at most `size` images of each split."""
    cohort = Cohort.of(models, config, device)
    names = [str(spec.name) for spec in config.peers]
    return {"peers": names, "students": [names.index(name) for name in candidates(config.peers)],
            "attack": [{"threat": threat.label, "steps": plan.steps, "step_size": plan.size(threat)}
                       for threat, plan in zip(cohort.threats, cohort.plans, strict=True)],
            "validation": cohort.measure(validation, size),
            "training": cohort.measure(training, size, own_alone=True)}
