"""Scopes that change how a model runs and restore exactly what they found, and views of its norm layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_STEP_MOMENTUM = "step_momentum"  # attribute of a batch-norm layer: its momentum for one forward per step


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Batch-norm layers (SyncBatchNorm too) in module order."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def synchronised(model: nn.Module) -> bool:
    """Whether forwards in train mode are collective calls: with SyncBatchNorm, on replicas on GPUs."""
    return any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its own training flag back at the end."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and parameters without gradient inside, as an attack needs it.

    At the end, also after an exception, every module has its own training flag again and every parameter its own
    requires_grad.
    """
    wants = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with _modes_kept(model):
        try:
            model.eval()
            # Set as an attribute: the method refuses parameters of lazy layers that have no shape yet.
            for parameter, _ in wants:
                parameter.requires_grad = False
            yield
        finally:
            for parameter, requires_grad in wants:
                parameter.requires_grad = requires_grad


@contextmanager
def batch_stats_only(model: nn.Module) -> Iterator[None]:
    """Train mode inside: batch norm uses the batch's statistics, running buffers and counters are not touched.

    At the end, also after an exception, every module's training and track_running_stats are as before.
    """
    tracked = [(layer, layer.track_running_stats) for layer in _batch_norms(model)]
    with _modes_kept(model):
        try:
            model.train()
            for layer, _ in tracked:
                layer.track_running_stats = False
            yield
        finally:
            for layer, tracking in tracked:
                layer.track_running_stats = tracking


def set_bn_forwards(model: nn.Module, count: int) -> None:
    """Let `count` forwards move the running statistics as much as one forward does.

    Each batch-norm layer's momentum becomes 1 - (1 - m)^(1/count), with m its momentum at the first call, so calls
    may follow each other with any counts. Layers with momentum None (cumulative average) need no change. Convert to
    SyncBatchNorm before the first call: the conversion takes over the current momentum only.

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
    """All parameters as (decayed, spared): spared from weight decay are biases and whatever has at most one dimension.

    These are the weights and biases of norm layers and all biases.
    """
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
