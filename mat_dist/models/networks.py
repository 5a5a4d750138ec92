"""The built-in networks: two small ones, ResNet-18 (He et al., CVPR 2016), its pre-activation form (ECCV 2016) with the
Wide ResNets (BMVC 2016), and MobileNetV2 (Sandler et al., CVPR 2018) from torchvision."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from mat_dist.config.schema import ModelConfig
from mat_dist.models.blocks import GlobalPool, conv3x3, conv_norm_act, initialise, make_activation, make_norm, scaled
from mat_dist.models.library import no_in_place, replace_relus
from mat_dist.models.registry import register_model

SMALL_IMAGE = 64  # pixels a side up to which the CIFAR form of a network is used
# Expansion, channels, blocks, stride of each stage (the paper's table 2); for small images the first two reductions
# (stem and second stage) are left out, as in the CIFAR versions of the network.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _halved(size: int) -> int:
    """Side of the map after a 3x3 convolution of stride 2 with padding 1."""
    return (size + 1) // 2


@register_model("tiny_cnn")
def tiny_cnn(config: ModelConfig, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Three 3x3 convolutions (16, 32, 96 channels, strides 1, 2, 2) and a linear layer on the flattened map.

    For 8x8 to 32x32 images: 36,538 parameters on 1x8x8, 94,426 on 3x32x32 with 10 classes. Of eight designs tried
    with PGD-7 training on 8x8 digits it is the cheapest within noise of the best (docs/models.md).
    """
    channels, height, width = shape
    first, second, third = (scaled(c, config.width) for c in (16, 32, 96))
    cells = _halved(_halved(height)) * _halved(_halved(width))
    return initialise(nn.Sequential(
        conv_norm_act(channels, first, 1, config),
        conv_norm_act(first, second, 2, config),
        conv_norm_act(second, third, 2, config),
        nn.Flatten(),
        nn.Linear(third * cells, classes),
    ))


@register_model("small_cnn")
def small_cnn(config: ModelConfig, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Four 3x3 convolutions (32, 32, 64, 64 channels), mean-pooled to at most 4x4, and two linear layers.

    98,890 parameters and 24.5 million multiply-adds on 3x32x32 with 10 classes: the network of the benchmark.
    """
    channels, height, width = shape
    low, high = scaled(32, config.width), scaled(64, config.width)
    # Windows of ceil(side / 4) cells; ceil mode averages what a last window holds. Adaptive pooling would do the
    # same, but its gradient is not deterministic on a GPU.
    sides = [_halved(height), _halved(width)]
    windows = [-(-side // 4) for side in sides]
    cells = -(-sides[0] // windows[0]) * -(-sides[1] // windows[1])
    return initialise(nn.Sequential(
        conv_norm_act(channels, low, 1, config),
        conv_norm_act(low, low, 1, config),
        conv_norm_act(low, high, 2, config),
        conv_norm_act(high, high, 1, config),
        nn.AvgPool2d((windows[0], windows[1]), ceil_mode=True),
        nn.Flatten(),
        nn.Linear(high * cells, low),
        make_activation(config.activation),
        nn.Linear(low, classes),
    ))


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


@register_model("mobilenet_v2")
def mobilenet_v2(config: ModelConfig, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """MobileNetV2. Up to 64x64 pixels the map is reduced 8 times instead of 32 (stride 1 in stem and second stage).

    2,236,682 parameters with 10 classes, 3,504,872 with 1000, both on 3 channels. The activation is ReLU6 unless set.
    No dropout, as in the CIFAR versions. Initial weights: torchvision's, He for convolutions, normal with deviation
    0.01 for the last layer.
    """
    models: Any = importlib.import_module("torchvision.models")
    small = max(shape[1:]) <= SMALL_IMAGE
    stages = [[t, c, n, 1 if small and c == 24 else s] for t, c, n, s in _STAGES]
    net: Any = models.MobileNetV2(num_classes=classes, width_mult=config.width, inverted_residual_setting=stages,
                                  norm_layer=partial(make_norm, config.norm), dropout=0.0)
    # torchvision's stem is for 3 channels and stride 2.
    stem = net.features[0]
    stem[0] = conv3x3(shape[0], stem[0].out_channels, 1 if small else 2)
    initialise(stem)
    no_in_place(net)
    if config.activation is not None:
        replace_relus(net, config.activation)
    return cast(nn.Module, net)
