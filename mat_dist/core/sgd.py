"""SGD with momentum: torch's own update function under a class as small as training needs.

torch.optim.SGD would do, but its base class imports the compiler (torch._dynamo) when it is made: 1.6 seconds of
CPU time per rank, three of the fifteen seconds that four ranks on two cores need to their first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd


class SGD:
    """As `torch.optim.SGD(groups, lr, momentum, weight_decay, nesterov)`; state dicts of the two fit each other.

    Args:
        groups: dicts with `params`, and `weight_decay` where it differs.
        lr, momentum, weight_decay, nesterov: as torch's.

    Attributes:
        param_groups: one dict per group; `lr` may be changed between steps.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], *, lr: float, momentum: float, weight_decay: float,
                 nesterov: bool) -> None:
        common = {"lr": lr, "momentum": momentum, "dampening": 0, "weight_decay": weight_decay, "nesterov": nesterov}
        self.param_groups: list[dict[str, Any]] = [{**common, **group, "params": list(group["params"])}
                                                   for group in groups]
        self._momentum: dict[nn.Parameter, Tensor] = {}

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            buffers = [self._momentum.get(p) for p in moved]
            sgd(moved, [p.grad for p in moved], buffers, foreach=True, has_sparse_grad=False, maximize=False,
                **{name: group[name] for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov")})
            if group["momentum"]:
                self._momentum.update((p, b) for p, b in zip(moved, buffers, strict=True) if b is not None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        assert set_to_none, "gradients are dropped, never set to 0"
        for parameter in self._parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Momentum buffers by number of the parameter, and the groups' settings, as torch's optimizers lay them out."""
        number = {p: n for n, p in enumerate(self._parameters)}
        return {"state": {number[p]: {"momentum_buffer": buffer} for p, buffer in self._momentum.items()},
                "param_groups": [{**group, "params": [number[p] for p in group["params"]]}
                                 for group in self.param_groups]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over momentum and learning rates of a state of the same parameters.

        Raises:
            ValueError: groups of other sizes.
        """
        told = [len(group["params"]) for group in state["param_groups"]]
        if told != [len(group["params"]) for group in self.param_groups]:
            raise ValueError(f"a state of parameter groups of {told} parameters")
        for group, saved in zip(self.param_groups, state["param_groups"], strict=True):
            group.update({name: saved[name] for name in group if name != "params"})
        parameters = self._parameters
        self._momentum = {parameters[int(n)]: one["momentum_buffer"].to(parameters[int(n)], copy=True)
                          for n, one in state["state"].items() if one.get("momentum_buffer") is not None}


@torch.no_grad()
def average(ema: dict[str, Tensor], state: dict[str, Tensor], decay: float) -> None:
    """ema <- decay ema + (1 - decay) state for floating tensors (BN statistics too); integers are copied."""
    floating = [k for k, v in ema.items() if v.is_floating_point()]
    torch._foreach_lerp_([ema[k] for k in floating], [state[k] for k in floating], 1 - decay)
    for k, v in ema.items():
        if not v.is_floating_point():
            v.copy_(state[k])
