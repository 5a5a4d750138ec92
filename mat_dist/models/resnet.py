"""ResNet-18 (He et al., CVPR 2016), and its pre-activation form (ECCV 2016) with the Wide ResNets (BMVC 2016)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mat_dist.config.schema import ModelConfig
from mat_dist.models.blocks import GlobalPool, conv3x3, conv_norm_act, initialise, make_activation, make_norm, scaled
from mat_dist.models.registry import register_model

SMALL_IMAGE = 64  # pixels a side up to which the CIFAR form of a network is used


class BasicBlock(nn.Module):
    """conv, norm, act, conv, norm, plus the shortcut, act. (B, inputs, H, W) -> (B, outputs, H/stride, W/stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int, config: ModelConfig) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv3x3(inputs, outputs, stride), make_norm(config.norm, outputs)
        self.act1 = make_activation(config.activation)
        self.conv2, self.norm2 = conv3x3(outputs, outputs), make_norm(config.norm, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                                          make_norm(config.norm, outputs))
        self.act2 = make_activation(config.activation)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW = self.act1(self.norm1(self.conv1(x_BCHW)))
        out_BCHW = self.norm2(self.conv2(out_BCHW))
        return self.act2(out_BCHW + self.shortcut(x_BCHW))


class PreActBlock(nn.Module):
    """norm, act, conv, norm, act, conv, plus the shortcut; one that changes the shape starts after the first act."""

    def __init__(self, inputs: int, outputs: int, stride: int, config: ModelConfig) -> None:
        super().__init__()
        self.norm1, self.act1 = make_norm(config.norm, inputs), make_activation(config.activation)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.norm2, self.act2 = make_norm(config.norm, outputs), make_activation(config.activation)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        active_BCHW = self.act1(self.norm1(x_BCHW))
        skip_BCHW = x_BCHW if self.shortcut is None else self.shortcut(active_BCHW)
        return self.conv2(self.act2(self.norm2(self.conv1(active_BCHW)))) + skip_BCHW


def _stages(block: type[BasicBlock] | type[PreActBlock], inputs: int, channels: Sequence[int], blocks: int,
            config: ModelConfig) -> nn.Sequential:
    """`blocks` blocks per entry of `channels`; every stage but the first halves the map."""
    layers: list[nn.Module] = []
    for index, outputs in enumerate(channels):
        for n in range(blocks):
            layers.append(block(inputs, outputs, 2 if index > 0 and n == 0 else 1, config))
            inputs = outputs
    return nn.Sequential(*layers)


@register_model("resnet18")
def resnet18(config: ModelConfig, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """ResNet-18. Up to 64x64 pixels the CIFAR stem (3x3, stride 1); above, ImageNet's (7x7, stride 2, max-pool).

    11,173,962 parameters on 3x32x32 with 10 classes, 11,689,512 on 3x224x224 with 1000.
    """
    widths = [scaled(c, config.width) for c in (64, 128, 256, 512)]
    if max(shape[1:]) <= SMALL_IMAGE:
        stem = conv_norm_act(shape[0], widths[0], 1, config)
    else:
        stem = nn.Sequential(nn.Conv2d(shape[0], widths[0], 7, 2, 3, bias=False), make_norm(config.norm, widths[0]),
                             make_activation(config.activation), nn.MaxPool2d(3, 2, 1))
    return initialise(nn.Sequential(stem, _stages(BasicBlock, widths[0], widths, 2, config), GlobalPool(),
                                    nn.Linear(widths[-1], classes)))


def _pre_activation(stem: int, widths: Sequence[int], blocks: int, config: ModelConfig, shape: tuple[int, int, int],
                    classes: int) -> nn.Module:
    """3x3 stem, pre-activation stages, norm, activation, mean, linear layer."""
    stem, widths = scaled(stem, config.width), [scaled(c, config.width) for c in widths]
    return initialise(nn.Sequential(
        conv3x3(shape[0], stem),
        _stages(PreActBlock, stem, widths, blocks, config),
        nn.Sequential(make_norm(config.norm, widths[-1]), make_activation(config.activation)),
        GlobalPool(),
        nn.Linear(widths[-1], classes),
    ))


@register_model("preact_resnet18")
def preact_resnet18(config: ModelConfig, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Pre-activation ResNet-18, CIFAR stem, last norm layer: 11,172,170 parameters on 3x32x32 with 10 classes."""
    return _pre_activation(64, (64, 128, 256, 512), 2, config, shape, classes)


@register_model("wrn_28_10")
def wrn_28_10(config: ModelConfig, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Wide ResNet of depth 28, widening factor 10, no dropout: 36,479,194 parameters on 3x32x32 with 10 classes."""
    return _pre_activation(16, (160, 320, 640), 4, config, shape, classes)


@register_model("wrn_34_10")
def wrn_34_10(config: ModelConfig, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Wide ResNet of depth 34, widening factor 10, no dropout: 46,160,474 parameters on 3x32x32 with 10 classes."""
    return _pre_activation(16, (160, 320, 640), 5, config, shape, classes)
