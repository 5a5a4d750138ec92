"""What peers tell each other about an image: all logits, or only the sum of their probabilities.

Letters as in step.py: P peers, L of them on this rank, T slots taught, B images, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mat_dist.core import losses

Position = Mapping[tuple[int, int], int]  # (teacher, slot) -> index on T


@dataclass(frozen=True)
class Terms:
    """How a student distils; see `losses.distillation`."""

    temperature: float
    t2_scale: bool
    agg: str
    loss: str = "kl"
    gate: float = 0.0
    where: str = "all"


class Opinions(Protocol):
    """The teachers' side of distillation."""

    def distillation(self, student_BK: Tensor, lessons: Sequence[tuple[int, int]], terms: Terms,
                     y_B: Tensor) -> Tensor:
        """Divergence of the lessons' opinions from a student's -> scalar.

        Args:
            student_BK: logits with graph.
            lessons: (teacher, slot that it looks at), in peer order.
            y_B: labels.
        """
        ...


@dataclass(frozen=True)
class AllLogits:
    """The logits of every peer, (P, T, B, K)."""

    taught_PTBK: Tensor
    position: Position

    def distillation(self, student_BK: Tensor, lessons: Sequence[tuple[int, int]], terms: Terms,
                     y_B: Tensor) -> Tensor:
        opinions = [self.taught_PTBK[teacher, self.position[teacher, slot]] for teacher, slot in lessons]
        if terms.loss == "mse":
            return losses.logit_distillation(student_BK, opinions)
        weights = None
        if terms.gate or terms.where != "all":
            weights = [losses.trust(t, student_BK, y_B, gate=terms.gate, where=terms.where) for t in opinions]
        return losses.distillation(student_BK, opinions, temperature=terms.temperature, t2_scale=terms.t2_scale,
                                   agg=terms.agg, weights_B=weights)


@dataclass(frozen=True)
class SummedProbabilities:
    """The sum over all peers of their softened probabilities and of sum_k p log p, (T, B, K + 1).

    O(P) numbers for all peers together where all logits are O(P^2). A student takes its own share out again. Sums
    over ranks are in no fixed order, so weights are no longer bitwise equal for every number of ranks.
    """

    told_TBK1: Tensor
    position: Position

    def distillation(self, student_BK: Tensor, lessons: Sequence[tuple[int, int]], terms: Terms,
                     y_B: Tensor) -> Tensor:
        others = self.told_TBK1[self.position[lessons[0]]] - softened(student_BK.detach(), terms.temperature)
        return losses.distillation_from_sum(student_BK, others[:, :-1], others[:, -1], len(lessons),
                                            temperature=terms.temperature, t2_scale=terms.t2_scale, agg=terms.agg)


def softened(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities at a temperature, and sum_k p log p behind them: (..., K) -> (..., K + 1)."""
    log = (logits / temperature).log_softmax(-1)
    p = log.exp()
    return torch.cat([p, (p * log).sum(-1, keepdim=True)], dim=-1)
