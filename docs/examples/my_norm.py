"""A norm of your own: python -m mat_dist.train --plugin docs/examples/my_norm.py threat=first_channel threat.eps=0.1"""

import torch

from mat_dist.attacks import Linf, register_norm


@register_norm("first_channel")
class FirstChannel(Linf):
    """linf on the first channel; the others stay as they are."""

    def __init__(self, x_BCHW, eps, share=None):
        super().__init__(x_BCHW, eps)  # sets the bounds `low` and `high` of every value
        self.low[:, 1:] = self.high[:, 1:] = x_BCHW[:, 1:]

    @staticmethod
    def length(change_BCHW):
        """How long each change is -> (B,): infinite where a value moved that must stay."""
        stays_B = (change_BCHW[:, 1:] == 0).flatten(1).all(1)
        return torch.where(stays_B, change_BCHW[:, 0].flatten(1).abs().amax(1), torch.inf)

    def step(self, adv_BCHW, grad_BCHW, size, top=None):
        """One step of length `size` along the steepest ascent."""
        first = torch.zeros_like(grad_BCHW)
        first[:, 0] = grad_BCHW[:, 0]
        return super().step(adv_BCHW, first, size)
