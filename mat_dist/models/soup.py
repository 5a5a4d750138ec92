"""The model whose weights are the mean of the peers'."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from mat_dist.errors import ConfigError


@torch.no_grad()
def soup(models: Sequence[nn.Module]) -> nn.Module:
    """A copy of the first model with the uniform mean of all weights and floating buffers (model soup: Wortsman et al.,
    ICML 2022), batch-norm statistics included; its integers are the first one's.

    Args:
        models: at least one, of one architecture.

    Raises:
        ConfigError: they have different weights.
    """
    states = [model.state_dict() for model in models]
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        raise ConfigError("the peers have different models, whose weights have no mean", "ensemble:weights",
                          "choose ensemble:prob, or give all peers one model")
    made = copy.deepcopy(models[0])
    for name, value in made.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.stack([state[name].double() for state in states]).mean(0))
    return made
