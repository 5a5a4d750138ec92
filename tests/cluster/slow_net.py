"""The network tiny_cnn with a pause of $PAUSE seconds before each forward pass of training.

A plug-in for runs that must last until a signal comes, without keeping the CPUs busy; the weights do not change.
"""

from __future__ import annotations

import os
import time
from typing import Any

from torch import nn

from mat_dist.models import register_model
from mat_dist.models.networks import tiny_cnn

PAUSE = float(os.environ.get("PAUSE", "0"))


@register_model("slow_net")
def slow_net(config: Any, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """tiny_cnn that takes its time."""
    def wait(module: nn.Module, inputs: Any) -> None:
        if module.training:
            time.sleep(PAUSE)

    net = tiny_cnn(config, shape, classes)
    net.register_forward_pre_hook(wait)
    return net
