"""Pure losses on logits: no model, no rank, no configuration object.

Means are over the batch; divergences are in nats, summed over classes (`batchmean`). Repositories that
average KL over classes too (PeerAiD, ARD, RSLAD) state weights that are K times smaller in this convention.
Teachers' logits are constants: they arrive detached.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor


def likeliest(y_B: Tensor) -> Tensor:
    """One class of each image (B,): its label, or the one with the largest share of mixed labels (B, K)."""
    return y_B if y_B.ndim == 1 else y_B.argmax(-1)


def cross_entropy(logits_BK: Tensor, y_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy with label smoothing in [0, 1) (Szegedy et al., CVPR 2016) -> scalar.

    Args:
        y_B: labels, or mixed ones (B, K) that sum to 1 (CutMix).
    """
    return F.cross_entropy(logits_BK, y_B, label_smoothing=label_smoothing)


def kl_divergence(target_log_BK: Tensor, log_BK: Tensor) -> Tensor:
    """KL(target || prediction) of log-probabilities, mean over the batch -> scalar >= 0."""
    return F.kl_div(log_BK, target_log_BK, reduction="batchmean", log_target=True)


def kl_per_image(target_log_BK: Tensor, log_BK: Tensor) -> Tensor:
    """KL(target || prediction) of log-probabilities -> (B,)."""
    return F.kl_div(log_BK, target_log_BK, reduction="none", log_target=True).sum(-1)


def boosted_cross_entropy(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Cross-entropy plus -log(1 - largest wrong probability), mean over the batch (MART, Wang et al., ICLR 2020).

    The constants 1.0001 and 1e-12, which keep the logarithm finite, are those of the paper's code.
    """
    wrong_B = logits_BK.softmax(-1).scatter(1, y_B[:, None], 0.0).amax(-1)
    return F.cross_entropy(logits_BK, y_B) - (1.0001 - wrong_B + 1e-12).log().mean()


def trades_term(clean_BK: Tensor, adv_BK: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(clean prediction || adversarial prediction), gradient through both (Zhang et al., ICML 2019).

    A temperature T > 0 softens both sides and multiplies by T squared (PeerAiD, Jung et al., CVPR 2024).
    """
    soft = kl_divergence((clean_BK / temperature).log_softmax(-1), (adv_BK / temperature).log_softmax(-1))
    return soft * temperature**2


def mart_term(clean_BK: Tensor, adv_BK: Tensor, y_B: Tensor) -> Tensor:
    """KL(clean || adversarial) times one minus the clean probability of the true class, gradient through all
    (MART, Wang et al., ICLR 2020) -> mean over the batch."""
    clean_log_BK = clean_BK.log_softmax(-1)
    true_B = clean_log_BK.gather(1, y_B[:, None])[:, 0].exp()
    return (kl_per_image(clean_log_BK, adv_BK.log_softmax(-1)) * (1 - true_B)).mean()


def worst_cross_entropy(logits: Sequence[Tensor], y_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean over images of the largest cross-entropy among several AEs of each (`max`, Tramer and Boneh, 2019).

    Args:
        y_B: labels, or mixed ones (B, K).
    """
    each = [F.cross_entropy(one_BK, y_B, label_smoothing=label_smoothing, reduction="none") for one_BK in logits]
    return torch.stack(each).amax(0).mean()


def ramp_term(first_BK: Tensor, second_BK: Tensor, y_B: Tensor, right: Tensor | None = None) -> Tensor:
    """KL(prediction on the AE of one norm || on that of another), mean over images right on the first.

    RAMP (Jiang and Singh, NeurIPS 2024). 0 where no image is right.

    Args:
        right: how many images the sum is divided by, where the batch is a part of a larger one; a scalar > 0.
    """
    right_B = first_BK.argmax(-1) == y_B
    each_B = kl_per_image(first_BK.log_softmax(-1), second_BK.log_softmax(-1))
    return (each_B * right_B).sum() / (right_B.sum().clamp(min=1) if right is None else right)


def logit_pairing(clean_BK: Tensor, adv_BK: Tensor) -> Tensor:
    """Mean squared difference of clean and adversarial logits (ALP, Kannan et al., 2018)."""
    return F.mse_loss(adv_BK, clean_BK)


def trust(teacher_BK: Tensor, student_BK: Tensor, y_B: Tensor, *, gate: float = 0.0, where: str = "all") -> Tensor:
    """How much a student listens to a teacher on each image -> (B,) in [0, 1].

    Args:
        gate: the teacher's probability of the true class to this power (IAD, Zhu et al., ICLR 2022).
        where: `all`; `teacher_right`: 0 where the teacher's label is wrong; `student_wrong`: 0 also where the
            student's is right.
    """
    weight_B = teacher_BK.log_softmax(-1).gather(1, y_B[:, None])[:, 0].mul(gate).exp()
    if where != "all":
        weight_B = weight_B * (teacher_BK.argmax(-1) == y_B)
    if where == "student_wrong":
        weight_B = weight_B * (student_BK.detach().argmax(-1) != y_B)
    return weight_B


def distillation(student_BK: Tensor, teachers_BK: Sequence[Tensor], *, temperature: float = 1.0, t2_scale: bool = True,
                 agg: str = "mean_kl", weights_B: Sequence[Tensor] | None = None) -> Tensor:
    """Divergence of the teachers' softened predictions from the student's -> scalar.

    Args:
        teachers_BK: logits of each teacher, in peer order; summed in that order.
        weights_B: each teacher's weight on each image, for `mean_kl`; default 1.
        temperature: T > 0 of both softmaxes (Hinton et al., 2015).
        t2_scale: multiply by T squared, which keeps the gradient's size.
        agg: `mean_kl` (Deep Mutual Learning for more than two nets), `mean_prob` (divergence from the mean
            probability) or `mean_logit`.
    """
    log_student = (student_BK / temperature).log_softmax(-1)
    if agg == "mean_kl" and weights_B is not None:
        value = _mean([(w_B * kl_per_image((t / temperature).log_softmax(-1), log_student)).mean()
                       for t, w_B in zip(teachers_BK, weights_B, strict=True)])
    elif agg == "mean_kl":
        value = _mean([kl_divergence((t / temperature).log_softmax(-1), log_student) for t in teachers_BK])
    elif agg == "mean_prob":
        # In log space: a probability that underflows to 0 would give 0 * -inf.
        logs = torch.stack([(t / temperature).log_softmax(-1) for t in teachers_BK])
        value = kl_divergence(logs.logsumexp(0) - math.log(len(teachers_BK)), log_student)
    elif agg == "mean_logit":
        value = kl_divergence((_mean(teachers_BK) / temperature).log_softmax(-1), log_student)
    else:
        raise ValueError(f"unknown teacher aggregation {agg!r}")
    return value * temperature**2 if t2_scale else value


def logit_distillation(student_BK: Tensor, teachers_BK: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the student's logits from each teacher's, mean over teachers (LBGAT, ICCV 2021)."""
    return _mean([F.mse_loss(student_BK, t) for t in teachers_BK])


def distillation_from_sum(student_BK: Tensor, others_BK: Tensor, negentropy_B: Tensor, count: int, *,
                          temperature: float = 1.0, t2_scale: bool = True, agg: str = "mean_kl") -> Tensor:
    """`distillation` from what the teachers' probabilities add up to -> scalar.

    sum_i KL(p_i || q) = sum_i sum_k p_i log p_i - sum_k (sum_i p_i) log q, so its gradient needs the sum alone.

    Args:
        others_BK: sum of the teachers' softened probabilities.
        negentropy_B: sum over the teachers of sum_k p log p.
        count: number of teachers.
        agg: `mean_kl` or `mean_prob`; the mean logit cannot be had from probabilities.
    """
    mean_BK = others_BK / count
    own_B = negentropy_B / count if agg == "mean_kl" else torch.special.xlogy(mean_BK, mean_BK).sum(-1)
    value = (own_B - (mean_BK * (student_BK / temperature).log_softmax(-1)).sum(-1)).mean()
    return value * temperature**2 if t2_scale else value


def _mean(terms: Sequence[Tensor]) -> Tensor:
    """Summed one after the other: a stacked sum may round in another order."""
    return reduce(operator.add, terms) / len(terms)


def accuracy(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Share of images whose largest logit is the true class, of mixed labels the likeliest -> scalar in [0, 1]."""
    return (logits_BK.argmax(-1) == likeliest(y_B)).to(torch.float32).mean()
