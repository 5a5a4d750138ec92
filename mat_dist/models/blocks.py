"""Parts that the built-in networks share: activations, norm layers, convolutions, initial weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mat_dist.config.schema import ModelConfig

# Never in place: an attack differentiates the same activations that a loss has used. Softplus has torch's beta 1.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "softplus": nn.Softplus}


def norm_groups(channels: int) -> int:
    """Groups of a GroupNorm over `channels`: the largest divisor up to 32 that leaves two channels or more per group.

    32 groups: Wu and He, ECCV 2018. One channel per group would be instance norm, which lost 1.5 points of PGD-20
    accuracy on digits (docs/models.md) and turns a 1x1 map into zeros.
    """
    return max(g for g in range(1, max(1, min(32, channels // 2)) + 1) if channels % g == 0)


def make_norm(norm: str | None, channels: int) -> nn.Module:
    """Batch norm (also for None), or group norm."""
    return nn.GroupNorm(norm_groups(channels), channels) if norm == "group" else nn.BatchNorm2d(channels)


def make_activation(activation: str | None) -> nn.Module:
    """The activation of that name; ReLU for None."""
    return ACTIVATIONS[activation or "relu"]()


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, to the nearest multiple of 8, at least 8; unchanged at width 1."""
    return channels if width == 1 else max(8, 8 * round(channels * width / 8))


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias: a norm layer follows it or its block."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def conv_norm_act(inputs: int, outputs: int, stride: int, config: ModelConfig) -> nn.Sequential:
    """3x3 convolution, norm, activation."""
    return nn.Sequential(conv3x3(inputs, outputs, stride), make_norm(config.norm, outputs),
                         make_activation(config.activation))


class GlobalPool(nn.Module):
    """Mean over height and width, (B, C, H, W) -> (B, C). A plain mean is deterministic on every device."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.mean((2, 3))


def initialise(net: nn.Module) -> nn.Module:
    """Draw initial weights from the global generator and return `net`.

    Convolutions: normal with variance 2 / fan_out (He et al., ICCV 2015; fan_out as in torchvision and Wide
    ResNet). Norm layers: weight 1, bias 0. Linear layers keep torch's uniform in +-1/sqrt(fan_in).
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return net
