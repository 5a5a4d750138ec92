"""The module that averages peers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_dist.errors import ConfigError

RULES = ("prob", "logit", "vote")


class Ensemble(nn.Module):
    """P classifiers as one: images (B, C, H, W) in [0, 1] -> logits (B, K).

    Rule `prob`: log of the mean probability, logsumexp_p(log_softmax(z_p)) - log P; a mean of probabilities itself
    would be taken for softmax output by AutoAttack's checks and lose its small gradients. Rule `logit`: mean of the
    logits. Rule `vote`: the class that most members choose, between equals the one with the larger mean probability;
    the numbers returned are votes plus mean probability, and have no gradient. The members are the modules themselves,
    not copies.

    Args:
        models: the members, at least one, in peer order (the sum's order).
        rule: "prob", "logit" or "vote".

    Raises ConfigError: no member, or an unknown rule.
    """

    def __init__(self, models: Sequence[nn.Module], rule: str = "prob") -> None:
        super().__init__()
        if not models:
            raise ConfigError("an ensemble without members", "Ensemble", "give at least one model")
        if rule not in RULES:
            raise ConfigError(f"unknown ensemble rule {rule!r}", "eval.ensemble", f"choose one of {', '.join(RULES)}")
        self.members = nn.ModuleList(models)
        self.rule = rule

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits_PBK = torch.stack([member(x_BCHW) for member in self.members])
        if self.rule == "logit":
            return logits_PBK.mean(0)
        if self.rule == "vote":
            with torch.no_grad():
                votes_BK = F.one_hot(logits_PBK.argmax(-1), logits_PBK.shape[-1]).sum(0)
                return votes_BK + logits_PBK.softmax(-1).mean(0)
        return logits_PBK.log_softmax(-1).logsumexp(0) - math.log(len(self.members))

    def extra_repr(self) -> str:
        return f"rule={self.rule}"
