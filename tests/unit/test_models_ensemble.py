"""The ensemble of peers against hand-computed numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mat_dist.errors import ConfigError
from mat_dist.models import Ensemble


class Fixed(nn.Module):
    """The same logits for every image, plus the image's mean."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float32))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.logits + x_BCHW.mean((1, 2, 3), keepdim=False)[:, None] * torch.tensor([1.0, 0.0])


X = torch.zeros(3, 1, 2, 2)


def test_the_prob_rule_is_the_log_of_the_mean_probability() -> None:
    # softmax(0, log 3) = (1/4, 3/4), softmax(log 4, 0) = (4/5, 1/5): mean (21/40, 19/40)
    logits = Ensemble([Fixed(0, math.log(3)), Fixed(math.log(4), 0)], "prob")(X)
    torch.testing.assert_close(logits, torch.tensor([[21 / 40, 19 / 40]]).log().expand(3, 2))


def test_the_logit_rule_is_the_mean_of_the_logits() -> None:
    logits = Ensemble([Fixed(1, 2), Fixed(3, -6), Fixed(2, 1)], "logit")(X)
    assert torch.equal(logits, torch.tensor([[2.0, -1.0]]).expand(3, 2))


def test_confident_members_keep_finite_logits_and_gradients() -> None:
    x = X.clone().requires_grad_(True)
    logits = Ensemble([Fixed(500, -500), Fixed(400, -400)])(x)
    assert logits[:, 1].tolist() == pytest.approx([-800 - math.log(2)] * 3)
    gradient, = torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), x)
    assert gradient.abs().min() > 0


def test_the_members_are_the_given_modules_in_order() -> None:
    first, second = Fixed(1, 2), Fixed(3, 4)
    ensemble = Ensemble([first, second])
    assert ensemble.members[0] is first and ensemble.members[1] is second
    assert [p.tolist() for p in ensemble.parameters()] == [[1, 2], [3, 4]]


def test_an_ensemble_of_one_predicts_as_its_member() -> None:
    torch.testing.assert_close(Ensemble([Fixed(1, 3)])(X).softmax(1), torch.tensor([1.0, 3.0]).softmax(0).expand(3, 2))


def test_a_vote_counts_members_and_breaks_ties_by_mean_probability() -> None:
    sure, unsure = Fixed(9, 0), Fixed(0, 1)
    assert Ensemble([sure, unsure, unsure], "vote")(X).argmax(1).tolist() == [1, 1, 1]  # the mean says 0
    assert Ensemble([sure, unsure, unsure])(X).argmax(1).tolist() == [0, 0, 0]
    assert Ensemble([unsure, sure], "vote")(X).argmax(1).tolist() == [0, 0, 0]
    assert not Ensemble([sure, unsure], "vote")(X.clone().requires_grad_()).requires_grad


def test_unknown_rules_and_empty_ensembles_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown ensemble rule 'mean' \(eval.ensemble\): choose one of prob, logit"):
        Ensemble([Fixed(0, 0)], "mean")
    with pytest.raises(ConfigError, match="without members"):
        Ensemble([])
