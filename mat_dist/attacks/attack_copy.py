"""A copy of a model for attacks: the same function in eval mode, cheaper.

In eval mode batch norm is a fixed affine map per channel, so it folds into the convolution before it (0.8 of the
attack's time for a small CNN in fp32); in bf16 the weights are cast once per attack instead of once per pass. The
copy owns the folded and cast weights, in buffers that are allocated once; everything else it shares with the model.
"""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mat_dist.models.modes import frozen

TOLERANCE = 1e-3  # of the largest logit: rounding is a thousand times less, a wrong copy far more


class AttackCopy:
    """What an attack calls instead of `model`, which the caller keeps frozen meanwhile (`modes.frozen`).

    Args:
        model: images -> logits. Its weights are read at every `refresh`.
        sample: a few images, to see which batch norms follow a convolution, and that the copy computes what the
            model computes.
        dtype: type of the copied weights of convolutions and linear layers, to be used under autocast; None: as in
            the model.

    Attributes:
        reason: why the model itself is attacked; empty where a copy is, or where a copy would gain nothing.
    """

    def __init__(self, model: nn.Module, sample: Tensor, dtype: torch.dtype | None = None) -> None:
        self._called, self._layers, self.reason = model, [], ""
        with frozen(model), torch.autocast(sample.device.type, enabled=False):
            try:
                logits_BK, norms = _recorded(model, sample)
                called, layers = _copied(model, norms, casts=dtype is not None)
                for layer in layers:
                    layer.refresh()
                error_BK, largest = (called(sample) - logits_BK).abs(), logits_BK.abs().max()
                if not error_BK.max() <= TOLERANCE * largest.clamp(min=1):  # NaN is wrong too
                    raise ValueError("the copy gives other logits")
            except Exception as error:  # a model may refuse to be copied with anything; it always works itself
                self.reason = f"{type(error).__name__}: {error}".splitlines()[0]
                return
        if layers:
            self._called, self._layers = called, layers
            for layer in layers:
                layer.own.to(dtype)

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self._called(x_BCHW)
        return logits_BK

    def refresh(self) -> None:
        """Take over the model's present weights and running statistics."""
        for layer in self._layers:
            layer.refresh()


@dataclass(frozen=True)
class _Layer:
    """A copied layer and where its values come from: the layer, and the batch norm after it."""

    own: nn.Conv2d | nn.Linear
    source: nn.Conv2d | nn.Linear
    norm: _BatchNorm | None

    @torch.no_grad()
    def refresh(self) -> None:
        weight, bias = self.source.weight, self.source.bias
        norm = self.norm
        if norm is not None:
            assert norm.running_mean is not None and norm.running_var is not None
            scale = torch.rsqrt(norm.running_var + norm.eps)
            shift = -norm.running_mean if bias is None else bias - norm.running_mean
            if norm.affine:
                scale = scale * norm.weight
            weight, bias = weight * scale[:, None, None, None], shift * scale
            if norm.affine:
                bias = bias + norm.bias
        self.own.weight.copy_(weight)
        if bias is not None and self.own.bias is not None:
            self.own.bias.copy_(bias)


def _recorded(model: nn.Module, sample: Tensor) -> tuple[Tensor, dict[nn.Module, _BatchNorm]]:
    """One pass of a model -> logits (B, K), and by convolution the batch norm that alone reads its output; each of them
    is called once. torch.fx would tell the same, but while it traces it changes nn.Module for all threads."""
    calls: list[tuple[nn.Module, Any, Any]] = []  # module, its first input, its output
    with ExitStack() as hooks, torch.enable_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | _BatchNorm):
                hooks.enter_context(module.register_forward_hook(
                    lambda m, given, out: calls.append((m, given[0], out))))
        logits_BK = model(sample.detach().requires_grad_())
    times, readers = Counter(module for module, _, _ in calls), _readers(logits_BK)
    made = {id(out): module for module, _, out in calls if type(module) is nn.Conv2d}
    found: dict[nn.Module, _BatchNorm] = {}
    for norm, given, _ in calls:
        conv = made.get(id(given))
        if (isinstance(norm, _BatchNorm) and norm.running_mean is not None and conv is not None
                and times[norm] == times[conv] == 1 and readers[given.grad_fn] == 1):
            found[conv] = norm
    return logits_BK, found


def _readers(result: Tensor) -> Counter[Any]:
    """How many operations of the graph behind `result` read the output of each operation."""
    found: Counter[Any] = Counter()
    queue, seen = [result.grad_fn], {result.grad_fn}
    while queue:
        for reads, _ in queue.pop().next_functions:  # type: ignore[union-attr]  # sample requires a gradient
            if reads is not None:
                found[reads] += 1
                if reads not in seen:
                    seen.add(reads)
                    queue.append(reads)
    return found


def _copied(model: nn.Module, norms: dict[nn.Module, _BatchNorm], *, casts: bool) -> tuple[nn.Module, list[_Layer]]:
    """A model with the same tensors, but own ones in the layers that gain by it -> it, and these layers."""
    tensors = chain(model.parameters(), model.buffers())
    called, layers = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval(), []
    names = {module: name for name, module in model.named_modules()}
    for source, name in names.items():
        norm = norms.get(source)
        # Hooks: weight normalisation and the like make the weight anew in every pass.
        if (type(source) not in (nn.Conv2d, nn.Linear) or source._forward_pre_hooks or source._forward_hooks
                or (norm is None and not casts)):
            continue
        assert isinstance(source, nn.Conv2d | nn.Linear)
        own = called.get_submodule(name)
        assert isinstance(own, nn.Conv2d | nn.Linear)
        own.weight = nn.Parameter(torch.empty_like(source.weight), requires_grad=False)
        if norm is not None or source.bias is not None:
            own.bias = nn.Parameter(source.weight.new_empty(len(source.weight)), requires_grad=False)
        if norm is not None:
            called.set_submodule(names[norm], nn.Identity())
        layers.append(_Layer(own, source, norm))
    return called, layers
