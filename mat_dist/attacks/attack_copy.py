"""A copy of a model for attacks: the same function in eval mode, cheaper.

In eval mode batch norm is a fixed affine map per channel, so it folds into the convolution before it (0.8 of the
attack's time for a small CNN in fp32); in bf16 the weights are cast once per attack instead of once per pass. The
copy owns the folded and cast weights, in buffers that are allocated once; everything else it shares with the model.

A model may read a convolution's output where nothing shows it, or take another path later. So a copy is compared with
its model under random statistics, since those of fresh batch norms are nearly the identity, and again now and then.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mat_dist import rng
from mat_dist.distributed.arithmetic import strict_arithmetic
from mat_dist.models.modes import copy_all, frozen

TOLERANCE = 1e-3  # of the largest logit: rounding is a thousand times less, a wrong copy far more
WIDE = 8  # channels
CHECKED = 1024  # it is checked at call 1, 2, 4, 8 ... of `refresh`, and every so many calls


class AttackCopy:
    """What an attack calls instead of `model`, which the caller keeps frozen meanwhile (`modes.frozen`).

    Args:
        model: images -> logits. Its weights are read at every `refresh`.
        sample: a few images, to see which batch norms follow a convolution, and that the copy computes what the
            model computes.
        fixed: the model does not change: it is compared as it is, and nobody who uses it meanwhile notices.
        dtype: type of the copied weights of convolutions and linear layers, to be used under autocast; None: as in
            the model.

    Attributes:
        reason: why the model itself is to be attacked; empty while a copy does, or where one would gain nothing.
    """

    def __init__(self, model: nn.Module, sample: Tensor, dtype: torch.dtype | None = None, fixed: bool = False) -> None:
        self._model, self._called, self._layers, self.refreshed, self.reason = model, model, list[_Layer](), 0, ""
        with _exact(model, sample):
            try:
                called, layers = _copied(model, _recorded(model, sample), casts=dtype is not None)
                with nullcontext() if fixed else _other_statistics(model):
                    _compare(model, called, layers, 1 - sample)  # what a module keeps of a forward is copied too
            except Exception as error:  # a model may refuse to be copied with anything; it always works itself
                self.reason = f"{type(error).__name__}: {error}".splitlines()[0]
                return
        if layers:
            self._called, self._layers = called, layers
            for layer in layers:
                layer.own.to(dtype)
            self._take_over()

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        logits_BK: Tensor = self._called(x_BCHW)
        return logits_BK

    @torch.no_grad()
    def _take_over(self) -> None:
        pairs = [(own, value) for layer in self._layers
                 for own, value in zip(layer.places(), layer.folded(), strict=True)
                 if own is not None and value is not None]
        copy_all([own for own, _ in pairs], [value for _, value in pairs])

    def refresh(self, sample: Tensor | None) -> None:
        """Take over the model's present weights and running statistics; now and then check with `sample`, if any."""
        self._take_over()
        if sample is None:
            return
        self.refreshed += 1
        if self._layers and (self.refreshed & (self.refreshed - 1) == 0 or self.refreshed % CHECKED == 0):
            try:
                with _exact(self._model, sample):
                    _compare(self._model, self._called, self._layers, sample)
            except Exception as error:  # as above
                self.reason = f"{type(error).__name__}: {error}".splitlines()[0]


def folded(model: nn.Module, sample: Tensor) -> nn.Module:
    """What attacks call instead of a model whose weights stay as they are: its copy, or itself where a copy gains
    nothing. `sample` as for `AttackCopy`."""
    gains = any(isinstance(module, _BatchNorm) for module in model.modules())
    return AttackCopy(model, sample, fixed=True)._called if gains else model


@dataclass(frozen=True)
class _Layer:
    """A copied layer, its name, and where its values come from: the layer, and the batch norm after it."""

    name: str
    own: nn.Conv2d | nn.Linear
    source: nn.Conv2d | nn.Linear
    norm: _BatchNorm | None

    def places(self) -> tuple[Tensor, Tensor | None]:
        """Where the copy keeps weight and bias."""
        return self.own.weight[:, :self.source.weight.shape[1]], self.own.bias

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, in the model's type."""
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
        return weight, bias


class _WideConv2d(nn.Conv2d):
    """A convolution of images with `WIDE` channels, of which the last ones are zeros, as their weights are: what tensor
    cores want (on an H200 in bf16 21 us instead of 44 for the first layer of ResNet-18 and 128 images)."""

    def __init__(self, source: nn.Conv2d) -> None:
        given: Any = {name: getattr(source, name) for name in (
            "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")}
        super().__init__(WIDE, bias=source.bias is not None, **given)
        self.weight = nn.Parameter(self.widened(source.weight.detach()), requires_grad=False)

    @staticmethod
    def widened(value: Tensor) -> Tensor:
        """A weight, or images, with zeros for the channels that are missing; a bias as it is."""
        return value if value.ndim == 1 else F.pad(value, (0, 0, 0, 0, 0, WIDE - value.shape[1]))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(self.widened(x_BCHW))


@contextmanager
def _exact(model: nn.Module, sample: Tensor) -> Iterator[None]:
    """Eval mode without autocast, and without TF32, whose rounding is near the tolerance."""
    with frozen(model), torch.autocast(sample.device.type, enabled=False), strict_arithmetic():
        yield


@contextmanager
def _other_statistics(model: nn.Module) -> Iterator[None]:
    """Random statistics, weights and biases of all batch norms inside, far from the identity; afterwards as before."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    values = [v for m in norms for v in (m.running_mean, m.running_var, m.weight, m.bias) if v is not None]
    before = [value.clone() for value in values]
    with torch.no_grad():
        try:
            for number, value in enumerate(values):
                value.copy_(rng.uniform(number, value.shape, device=value.device) + 0.5)
            yield
        finally:
            for value, kept in zip(values, before, strict=True):
                value.copy_(kept)


@torch.no_grad()
def _compare(model: nn.Module, called: nn.Module, layers: list[_Layer], sample: Tensor) -> None:
    """Raises ValueError if the copy with the weights of now, uncast, gives other logits than the model."""
    values = {f"{layer.name}.{part}": layer.own.widened(value) if isinstance(layer.own, _WideConv2d) else value
              for layer in layers for part, value in zip(("weight", "bias"), layer.folded(), strict=True)
              if value is not None}
    with rng.keyed_rng(0):  # whatever the model draws, both draw alike
        logits_BK: Tensor = model(sample)
    with rng.keyed_rng(0):
        error_BK = (torch.func.functional_call(called, values, (sample,)) - logits_BK).abs()
    if not error_BK.max() <= TOLERANCE * logits_BK.abs().max().clamp(min=1):  # NaN is wrong too
        raise ValueError("the copy gives other logits")


def _recorded(model: nn.Module, sample: Tensor) -> dict[nn.Module, _BatchNorm]:
    """One pass of a model -> by convolution the batch norm that alone reads its output; each of them is called once.
    torch.fx would tell the same, but while it traces it changes nn.Module for all threads."""
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
    return found


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
        if casts and source.weight.is_cuda and isinstance(source, nn.Conv2d) and source.groups == 1 \
                and source.in_channels < WIDE:
            own = _WideConv2d(source).to(memory_format=torch.channels_last)
            called.set_submodule(name, own)
        else:
            own.weight = nn.Parameter(torch.empty_like(source.weight), requires_grad=False)
        if norm is not None or source.bias is not None:
            own.bias = nn.Parameter(source.weight.new_empty(len(source.weight)), requires_grad=False)
        if norm is not None:
            called.set_submodule(names[norm], nn.Identity())
        layers.append(_Layer(name, own, source, norm))
    return called, layers
