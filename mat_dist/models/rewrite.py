"""Exchange modules inside a network that is already built, by exact rules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from mat_dist.models.blocks import make_activation, norm_groups
from mat_dist.models.modes import frozen

RELUS = (nn.ReLU, nn.ReLU6)
_RELU_OPERATORS = frozenset({"relu", "relu_", "hardtanh", "hardtanh_"})  # relu6 is hardtanh from 0 to 6


def no_in_place(net: nn.Module) -> None:
    """Turn in-place activations and dropout off: an attack may use the overwritten tensor a second time."""
    for module in net.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]  # a plain attribute


def replace_relus(net: nn.Module, activation: str) -> int:
    """Replace every module of exact type ReLU or ReLU6; other activations stay. Returns how many were found."""
    return _replace(net, RELUS, lambda old: make_activation(activation))


def replace_batch_norms(net: nn.Module) -> int:
    """Replace every module of exact type BatchNorm2d by a GroupNorm of `norm_groups` groups. Returns how many."""
    return _replace(net, (nn.BatchNorm2d,), _as_group_norm)


def has_batch_norm(net: nn.Module) -> bool:
    """Whether any batch norm, of any type, is left."""
    return any(isinstance(module, _BatchNorm) for module in net.modules())


def applies_relu(net: nn.Module, x_BCHW: Tensor) -> bool:
    """Whether a forward pass in eval mode computes a ReLU or ReLU6, also where the code calls the function."""
    with frozen(net), torch.no_grad(), _Operators() as seen:
        net(x_BCHW)
    return not _RELU_OPERATORS.isdisjoint(seen.names)


def _as_group_norm(old: nn.Module) -> nn.Module:
    assert isinstance(old, nn.BatchNorm2d)
    return nn.GroupNorm(norm_groups(old.num_features), old.num_features, eps=old.eps, affine=old.affine)


def _replace(net: nn.Module, kinds: tuple[type[nn.Module], ...], new: Callable[[nn.Module], nn.Module]) -> int:
    """Replace submodules of exactly these types; a module that stands in several places stays one module."""
    done: dict[nn.Module, nn.Module] = {}
    for parent in list(net.modules()):
        for name, child in parent._modules.items():  # named_children leaves repeated modules out
            if child is not None and type(child) in kinds:
                if child not in done:
                    done[child] = new(child)
                parent._modules[name] = done[child]
    return len(done)


class _Operators(TorchDispatchMode):
    """Collects the names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
