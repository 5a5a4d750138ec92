"""Two small convolutional networks: one that trains in seconds on a CPU, one for benchmarks."""

from __future__ import annotations

from torch import nn

from mat_dist.config.schema import ModelConfig
from mat_dist.models.blocks import conv_norm_act, initialise, make_activation, scaled
from mat_dist.models.registry import register_model


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
