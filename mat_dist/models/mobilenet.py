"""MobileNetV2 (Sandler et al., CVPR 2018), from torchvision, with strides for small images."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, cast

from torch import nn

from mat_dist.config.schema import ModelConfig
from mat_dist.models.blocks import conv3x3, initialise, make_norm
from mat_dist.models.registry import register_model
from mat_dist.models.resnet import SMALL_IMAGE
from mat_dist.models.rewrite import no_in_place, replace_relus

# Expansion, channels, blocks, stride of each stage (the paper's table 2); for small images the first two reductions
# (stem and second stage) are left out, as in the CIFAR versions of the network.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


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
