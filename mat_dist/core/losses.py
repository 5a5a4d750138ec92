"""Pure losses on logits: no model, no rank, no configuration object.

Means are over the batch; divergences are in nats, summed over classes (`batchmean`). Code that averages KL over classes
too states weights that are K times smaller in this convention. Teachers' logits are constants: they arrive detached.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from mat_dist.attacks.pgd import likeliest


def cross_entropy(logits_BK: Tensor, y_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy with label smoothing in [0, 1) (Szegedy et al., CVPR 2016) -> scalar.

    Args:
        y_B: labels, or mixed ones (B, K) that sum to 1.
    """
    return F.cross_entropy(logits_BK, y_B, label_smoothing=label_smoothing)


def worst_cross_entropy(logits: Sequence[Tensor], y_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean over images of the largest cross-entropy among several AEs of each (Tramer and Boneh, 2019) -> scalar.

    Args:
        y_B: labels, or mixed ones (B, K).
    """
    each = [F.cross_entropy(one_BK, y_B, label_smoothing=label_smoothing, reduction="none") for one_BK in logits]
    return torch.stack(each).amax(0).mean()


def kl_divergence(target_log_BK: Tensor, log_BK: Tensor) -> Tensor:
    """KL(target || prediction) of log-probabilities, mean over the batch -> scalar >= 0."""
    return F.kl_div(log_BK, target_log_BK, reduction="batchmean", log_target=True)


def kl_per_image(target_log_BK: Tensor, log_BK: Tensor) -> Tensor:
    """KL(target || prediction) of log-probabilities -> (B,)."""
    return F.kl_div(log_BK, target_log_BK, reduction="none", log_target=True).sum(-1)


def softened_kl(clean_BK: Tensor, adv_BK: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(clean prediction || adversarial prediction) at a temperature T > 0, times T squared, gradient through both
    (Zhang et al., ICML 2019, with T = 1) -> scalar."""
    soft = kl_divergence((clean_BK / temperature).log_softmax(-1), (adv_BK / temperature).log_softmax(-1))
    return soft * temperature**2


def logit_distance(clean_BK: Tensor, adv_BK: Tensor) -> Tensor:
    """Mean squared difference of logits, gradient through both (Kannan et al., 2018) -> scalar."""
    return F.mse_loss(adv_BK, clean_BK)


def listened(teacher_BK: Tensor, student_BK: Tensor, y_B: Tensor, where: str) -> Tensor:
    """On which images a student listens to a teacher -> bool (B,).

    Args:
        where: `teacher_right`: where the teacher's label is right; `student_wrong`: of these where the student's is
            wrong.
    """
    right_B = teacher_BK.argmax(-1) == y_B
    return right_B & (student_BK.detach().argmax(-1) != y_B) if where == "student_wrong" else right_B


def distillation(student_BK: Tensor, teachers_BK: Sequence[Tensor], y_B: Tensor, *, kind: str = "kl",
                 where: str = "all", temperature: float = 1.0) -> Tensor:
    """How far a student is from its teachers, mean over teachers -> scalar.

    Args:
        teachers_BK: logits of each teacher, in peer order; summed in that order.
        kind: `kl`: KL(teacher's softened prediction || student's) times T squared; `mse`: mean squared difference of
            the logits.
        where: `all` images, or those of `listened`; for `kl`.
        temperature: T > 0 of both softmaxes (Hinton et al., 2015); T squared keeps the gradient's size.
    """
    if kind == "mse":
        return _mean([F.mse_loss(student_BK, t) for t in teachers_BK])
    log_student = (student_BK / temperature).log_softmax(-1)
    logs = [(t / temperature).log_softmax(-1) for t in teachers_BK]
    if where == "all":
        value = _mean([kl_divergence(log, log_student) for log in logs])
    else:
        value = _mean([(listened(t, student_BK, y_B, where) * kl_per_image(log, log_student)).mean()
                       for t, log in zip(teachers_BK, logs, strict=True)])
    return value * temperature**2


def _mean(terms: Sequence[Tensor]) -> Tensor:
    """Summed one after the other: a stacked sum may round in another order."""
    return reduce(operator.add, terms) / len(terms)


def accuracy(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Share of images whose largest logit is the true class, of mixed labels the likeliest -> scalar in [0, 1]."""
    return (logits_BK.argmax(-1) == likeliest(y_B)).to(torch.float32).mean()
