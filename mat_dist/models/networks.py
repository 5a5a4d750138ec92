"""The built-in networks: two small ones, ResNets (He et al., CVPR 2016), their pre-activation form (ECCV 2016) with the
Wide ResNets (BMVC 2016), and MobileNetV2 (Sandler et al., CVPR 2018) from torchvision."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from mat_dist.config.schema import ModelConfig
from mat_dist.errors import ConfigError
from mat_dist.models.blocks import GlobalPool, conv3x3, conv_norm_act, initialise, make_activation, make_norm, scaled
from mat_dist.models.library import no_in_place, replace_relus
from mat_dist.models.registry import Builder, Shape, register_family, register_model

SMALL_IMAGE = 64  # pixels a side up to which the CIFAR form of a network is used
# Expansion, channels, blocks, stride of each stage (the paper's table 2); for small images the first two reductions
# (stem and second stage) are left out, as in the CIFAR versions of the network.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

_BLOCKS = {"18": (2, 2, 2, 2), "34": (3, 4, 6, 3), "50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}
# Behind the name of a pre-activation network: no norm layer behind the last block; shortcuts that start before the
# first norm of their block; DeepMind's form, with SiLU and padding behind alone where the stride is 2.
_FORMS = r"((?:\+(?:bare|early|dm))*)"


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
        self.shortcut = _projection(inputs, outputs, stride, config)
        self.act2 = make_activation(config.activation)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW = self.act1(self.norm1(self.conv1(x_BCHW)))
        out_BCHW = self.norm2(self.conv2(out_BCHW))
        return self.act2(out_BCHW + self.shortcut(x_BCHW))


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 to four times the channels; else like BasicBlock."""

    def __init__(self, inputs: int, outputs: int, stride: int, config: ModelConfig) -> None:
        super().__init__()
        inner = outputs // 4
        self.conv1, self.norm1 = nn.Conv2d(inputs, inner, 1, bias=False), make_norm(config.norm, inner)
        self.conv2, self.norm2 = conv3x3(inner, inner, stride), make_norm(config.norm, inner)
        self.conv3, self.norm3 = nn.Conv2d(inner, outputs, 1, bias=False), make_norm(config.norm, outputs)
        self.shortcut = _projection(inputs, outputs, stride, config)
        self.act1, self.act2, self.act3 = (make_activation(config.activation) for _ in range(3))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW = self.act1(self.norm1(self.conv1(x_BCHW)))
        out_BCHW = self.act2(self.norm2(self.conv2(out_BCHW)))
        return self.act3(self.norm3(self.conv3(out_BCHW)) + self.shortcut(x_BCHW))


def _projection(inputs: int, outputs: int, stride: int, config: ModelConfig) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), make_norm(config.norm, outputs))


class PreActBlock(nn.Module):
    """norm, act, conv, norm, act, conv, plus the shortcut; one that changes the shape starts after the first act.

    Published codes do it otherwise, which no shape of a weight tells. early: such a shortcut starts before the first
    norm. same: where the stride is 2, the first convolution pads behind alone (TensorFlow's "SAME"). With both, the
    shortcut is 3x3 and pads alike.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, config: ModelConfig, *, early: bool = False,
                 same: bool = False) -> None:
        super().__init__()
        self.early, self.same = early, same
        activation = config.activation or ("silu" if same else None)
        self.norm1, self.act1 = make_norm(config.norm, inputs), make_activation(activation)
        shifted = same and stride == 2
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if shifted else nn.Identity()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 0 if shifted else 1, bias=False)
        self.norm2, self.act2 = make_norm(config.norm, outputs), make_activation(activation)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut: nn.Module | None = None
        if (stride != 1 or inputs != outputs) and early and same:
            self.shortcut = nn.Sequential(self.pad, nn.Conv2d(inputs, outputs, 3, stride, 0 if shifted else 1,
                                                              bias=False))
        elif stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        active_BCHW = self.act1(self.norm1(x_BCHW))
        skip_BCHW = x_BCHW
        if self.shortcut is not None:
            skip_BCHW = self.shortcut(x_BCHW if self.early else active_BCHW)
        return self.conv2(self.act2(self.norm2(self.conv1(self.pad(active_BCHW))))) + skip_BCHW


def _stages(block: Callable[[int, int, int, ModelConfig], nn.Module], inputs: int, channels: Sequence[int],
            blocks: Sequence[int], config: ModelConfig) -> nn.Sequential:
    """Per entry of `channels` so many `blocks`; every stage but the first halves the map."""
    layers: list[nn.Module] = []
    for index, (outputs, count) in enumerate(zip(channels, blocks, strict=True)):
        for n in range(count):
            layers.append(block(inputs, outputs, 2 if index > 0 and n == 0 else 1, config))
            inputs = outputs
    return nn.Sequential(*layers)


@register_family(r"resnet(18|34|50|101|152)", "resnet18", "resnet50")
def resnet(depth: str) -> Builder:
    """ResNets. Up to 64x64 pixels the CIFAR stem (3x3, stride 1); above, ImageNet's (7x7, stride 2, max-pool).

    resnet18: 11,173,962 parameters on 3x32x32 with 10 classes, 11,689,512 on 3x224x224 with 1000.
    """
    block, factor = (BasicBlock, 1) if depth in ("18", "34") else (Bottleneck, 4)

    def build(config: ModelConfig, shape: Shape, classes: int) -> nn.Module:
        widths = [scaled(c, config.width) for c in (64, 128, 256, 512)]
        if max(shape[1:]) <= SMALL_IMAGE:
            stem = conv_norm_act(shape[0], widths[0], 1, config)
        else:
            stem = nn.Sequential(nn.Conv2d(shape[0], widths[0], 7, 2, 3, bias=False),
                                 make_norm(config.norm, widths[0]), make_activation(config.activation),
                                 nn.MaxPool2d(3, 2, 1))
        outputs = [factor * width for width in widths]
        return initialise(nn.Sequential(stem, _stages(block, widths[0], outputs, _BLOCKS[depth], config), GlobalPool(),
                                        nn.Linear(outputs[-1], classes)))

    return build


@register_family(f"preact_resnet(18|34){_FORMS}", "preact_resnet18")
def preact_resnet(depth: str, forms: str) -> Builder:
    """Pre-activation ResNets, CIFAR stem: preact_resnet18 has 11,172,170 parameters on 3x32x32 with 10 classes."""
    return _pre_activation(64, (64, 128, 256, 512), _BLOCKS[depth], _forms(forms, early_with_dm=True))


@register_family(rf"wrn_(\d{{2,3}})_(\d{{1,2}}){_FORMS}", "wrn_28_10", "wrn_34_10")
def wide_resnet(depth: str, factor: str, forms: str) -> Builder:
    """Wide ResNets of a depth and a widening factor, no dropout: wrn_28_10 has 36,479,194 parameters, wrn_34_10
    46,160,474 on 3x32x32 with 10 classes."""
    blocks, rest = divmod(int(depth) - 4, 6)
    if rest or blocks < 1 or factor == "0":
        raise ConfigError(f"there is no Wide ResNet of depth {depth} and factor {factor}", "model.name",
                          "write wrn_DEPTH_FACTOR with a depth of 10, 16, 22, 28, 34, ...")
    return _pre_activation(16, [c * int(factor) for c in (16, 32, 64)], [blocks] * 3,
                           _forms(forms, early_with_dm=False))


def _forms(text: str, *, early_with_dm: bool) -> dict[str, bool]:
    """+bare, +early and +dm behind a name."""
    words = text.split("+")
    dm = "dm" in words
    return {"bare": "bare" in words, "early": "early" in words or (dm and early_with_dm), "same": dm}


def _pre_activation(stem: int, channels: Sequence[int], blocks: Sequence[int], forms: dict[str, bool]) -> Builder:
    """3x3 stem, pre-activation stages, norm, activation, mean, linear layer."""

    def build(config: ModelConfig, shape: Shape, classes: int) -> nn.Module:
        activation = config.activation or ("silu" if forms["same"] else None)
        first, *widths = [scaled(c, config.width) for c in (stem, *channels)]
        block = partial(PreActBlock, early=forms["early"], same=forms["same"])
        last = nn.Sequential(make_norm(config.norm, widths[-1]), make_activation(activation))
        return initialise(nn.Sequential(conv3x3(shape[0], first), _stages(block, first, widths, blocks, config),
                                        nn.Identity() if forms["bare"] else last, GlobalPool(),
                                        nn.Linear(widths[-1], classes)))

    return build


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
