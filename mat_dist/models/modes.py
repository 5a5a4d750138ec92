"""Scopes that change how a model runs and restore exactly what they found, and views of its norm layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_STEP_MOMENTUM = "step_momentum"  # attribute of a batch-norm layer: its momentum for one forward per step


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
    """Train mode inside: batch norm uses the batch's statistics, running buffers and counters are not touched;
    afterwards all is as it was."""
    with _kept(model.modules(), "training"), _kept(_batch_norms(model), "track_running_stats"):
        model.train()
        for layer in _batch_norms(model):
            layer.track_running_stats = False
        yield


def set_bn_forwards(model: nn.Module, count: int) -> None:
    """Let `count` forwards move the running statistics as much as one forward does.

    Each batch-norm layer's momentum becomes 1 - (1 - m)^(1/count), with m its momentum at the first call, so calls
    may follow each other with any counts. Layers with momentum None (cumulative average) need no change.

    Args:
        count: forwards per training step, at least 1.
    """
    assert count >= 1, count
    for layer in _batch_norms(model):
        if not hasattr(layer, _STEP_MOMENTUM):
            setattr(layer, _STEP_MOMENTUM, layer.momentum)
        momentum = getattr(layer, _STEP_MOMENTUM)
        if momentum is not None:
            # count 1 gives m itself: 1 - (1 - m) would differ in the last bit.
            layer.momentum = momentum if count == 1 else 1 - (1 - momentum) ** (1 / count)


def bn_buffers(model: nn.Module) -> list[Tensor]:
    """Live running mean, running variance (float) and batch counter (int64) of each batch norm, in module order."""
    buffers = [b for m in _batch_norms(model) for b in (m.running_mean, m.running_var, m.num_batches_tracked)]
    return [b for b in buffers if b is not None]


def split_norm_bias(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """All parameters as (decayed, spared): spared from weight decay are biases and the weights of norm layers, which
    have at most one dimension."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (spared if parameter.ndim <= 1 or name.endswith("bias") else decayed).append(parameter)
    return decayed, spared


def draws_in_forward(model: nn.Module) -> bool:
    """Whether a model uses torch's global generator in training: dropout, stochastic depth, drop path."""
    def draws(module: nn.Module) -> bool:
        kind = type(module).__name__.lower()
        return isinstance(module, nn.modules.dropout._DropoutNd) or "stochasticdepth" in kind or "droppath" in kind

    return any(map(draws, model.modules()))
