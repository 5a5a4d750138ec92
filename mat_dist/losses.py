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


def cross_entropy(logits_BK: Tensor, y_B: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy with label smoothing in [0, 1) (Szegedy et al., CVPR 2016) -> scalar."""
    return F.cross_entropy(logits_BK, y_B, label_smoothing=label_smoothing)


def kl_divergence(target_log_BK: Tensor, log_BK: Tensor) -> Tensor:
    """KL(target || prediction) of log-probabilities, mean over the batch -> scalar >= 0."""
    return F.kl_div(log_BK, target_log_BK, reduction="batchmean", log_target=True)


def trades_term(clean_BK: Tensor, adv_BK: Tensor) -> Tensor:
    """KL(clean prediction || adversarial prediction), gradient through both (Zhang et al., ICML 2019)."""
    return kl_divergence(clean_BK.log_softmax(-1), adv_BK.log_softmax(-1))


def logit_pairing(clean_BK: Tensor, adv_BK: Tensor) -> Tensor:
    """Mean squared difference of clean and adversarial logits (ALP, Kannan et al., 2018)."""
    return F.mse_loss(adv_BK, clean_BK)


def distillation(student_BK: Tensor, teachers_BK: Sequence[Tensor], *, temperature: float = 1.0, t2_scale: bool = True,
                 agg: str = "mean_kl") -> Tensor:
    """Divergence of the teachers' softened predictions from the student's -> scalar.

    Args:
        teachers_BK: logits of each teacher, in peer order; summed in that order.
        temperature: T > 0 of both softmaxes (Hinton et al., 2015).
        t2_scale: multiply by T squared, which keeps the gradient's size.
        agg: `mean_kl` (Deep Mutual Learning for more than two nets), `mean_prob` (divergence from the mean
            probability) or `mean_logit`.
    """
    log_student = (student_BK / temperature).log_softmax(-1)
    if agg == "mean_kl":
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
    """Share of images whose largest logit is the true class -> scalar in [0, 1]."""
    return (logits_BK.argmax(-1) == y_B).to(torch.float32).mean()
