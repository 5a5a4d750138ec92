"""A model of your own: python -m mat_dist.train --plugin docs/examples/my_model.py model=my_model"""

from torch import nn

from mat_dist.models import register_model


@register_model("my_model")
def my_model(config, shape, classes):
    """Three convolutions and a global mean. `shape` is (C, H, W); the net gets normalised images, returns logits."""
    channels, width = shape[0], round(32 * config.width)  # model.width=2 doubles the channels

    def block(inputs, outputs, stride):
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    return nn.Sequential(block(channels, width, 1), block(width, 2 * width, 2), block(2 * width, 4 * width, 2),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))
