"""Scopes that change how a model runs and restore exactly what they found, and views of its norm layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

_STEP_MOMENTUM = "step_momentum"  # attribute of a norm layer: its momentum for one forward per step
# They touch no buffer while they do not track, and replicas see to it that theirs are equal.
_OBEDIENT = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Batch-norm layers in module order."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


@contextmanager
def _kept(objects: Iterable[Any], attribute: str) -> Iterator[None]:
    """Give every object its own value of the attribute back at the end, also after an exception."""
    values = [(one, getattr(one, attribute)) for one in objects]
    try:
        yield
    finally:
        for one, value in values:
            setattr(one, attribute, value)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and parameters without gradient inside, as an attack needs it; afterwards all is as it was."""
    with _kept(model.modules(), "training"), _kept(model.parameters(), "requires_grad"):
        model.eval()
        # Set as an attribute: the method refuses parameters of lazy layers that have no shape yet.
        for parameter in model.parameters():
            parameter.requires_grad = False
        yield


@contextmanager
def batch_stats_only(model: nn.Module) -> Iterator[None]:
    """Train mode inside: batch norm uses the batch's statistics, and no buffer of any module is touched; afterwards all
    is as it was."""
    with (_kept(model.modules(), "training"), _kept(_batch_norms(model), "track_running_stats"),
          spared_buffers(model, _OBEDIENT)):
        model.train()
        for layer in _batch_norms(model):
            layer.track_running_stats = False
        yield


@contextmanager
def spared_buffers(model: nn.Module, but: Collection[type] = ()) -> Iterator[None]:
    """Inside, copies stand in the places of all buffers but those of some kinds of modules; afterwards the buffers are
    back, which nothing has touched. Those of a compiled ScriptModule cannot be replaced."""
    places = [(m._buffers, dict(m._buffers)) for m in model.modules()
              if isinstance(m._buffers, dict) and m._buffers and type(m) not in but]
    copies = {buffer: buffer.clone() for _, before in places for buffer in before.values() if buffer is not None}
    try:
        for live, before in places:
            live.update((name, copies[buffer]) for name, buffer in before.items() if buffer is not None)
        yield
    finally:
        _put_back(places)


def _put_back(places: Iterable[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]]) -> None:
    for live, before in places:
        live.clear()
        live.update(before)


def saved_buffers(model: nn.Module) -> Callable[[], None]:
    """What gives a model the buffers of now back: the same tensors with the same values, whatever modules did."""
    places = [(m._buffers, dict(m._buffers)) for m in model.modules() if m._buffers]
    buffers = list({buffer: None for _, before in places for buffer in before.values() if buffer is not None})
    values = [torch.empty_like(buffer) for buffer in buffers]
    copy_all(values, buffers)

    def restore() -> None:
        _put_back(places)
        copy_all(buffers, values)

    return restore


@torch.no_grad()
def copy_all(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Each value into its place: one launch for each type of number, not one for each tensor."""
    for dtype in {place.dtype for place in places}:
        chosen = [(place, value) for place, value in zip(places, values, strict=True) if place.dtype == dtype]
        torch._foreach_copy_([place for place, _ in chosen], [value for _, value in chosen])


def replica_buffers(model: nn.Module) -> list[Tensor]:
    """Live floating buffers that may follow a replica's own rows: all but those of batch norms."""
    return list({buffer: None for m in model.modules() if type(m) not in _OBEDIENT
                 for buffer in m.buffers(recurse=False) if buffer.is_floating_point()})


def set_bn_forwards(model: nn.Module, count: int) -> None:
    """Let `count` forwards move the running statistics as much as one forward does.

    The momentum of each batch or instance norm becomes 1 - (1 - m)^(1/count), with m its momentum at the first call, so
    calls may follow each other with any counts. Layers with momentum None (cumulative average) need no change.

    Args:
        count: forwards per training step, at least 1.
    """
    assert count >= 1, count
    for layer in (module for module in model.modules() if isinstance(module, _NormBase)):
        if not hasattr(layer, _STEP_MOMENTUM):
            setattr(layer, _STEP_MOMENTUM, layer.momentum)
        momentum = getattr(layer, _STEP_MOMENTUM)
        if momentum is not None:
            # count 1 gives m itself: 1 - (1 - m) would differ in the last bit.
            layer.momentum = momentum if count == 1 else 1 - (1 - momentum) ** (1 / count)


def split_norm_bias(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """All parameters as (decayed, spared): spared from weight decay are biases and the weights of norm layers, which
    have at most one dimension."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (spared if parameter.ndim <= 1 or name.endswith("bias") else decayed).append(parameter)
    return decayed, spared

