"""What torch.hub finds in a clone: `torch.hub.load(FOLDER, "trained", "runs/first", source="local")`, or with the name
OWNER/REPOSITORY of a place on GitHub instead of the folder. mat_dist need not be installed, but what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # every function and class that is here at run time would be listed as a model
    from collections.abc import Sequence
    from typing import Any

    from torch import nn

dependencies = ["torch", "torchvision", "numpy", "rich", "filelock", "safetensors", "pydantic", "ruamel.yaml"]


def trained(run: str, peer: str | int = "best", **words: Any) -> nn.Module:
    """A trained model: float images (B, C, H, W) in [0, 1] -> logits (B, K). Arguments and errors of mat_dist.load."""
    import mat_dist

    return mat_dist.load(run, peer, **words)


def network(name: str = "resnet18", *, classes: int = 10, shape: tuple[int, int, int] = (3, 32, 32),
            mean: Sequence[float] | None = None, std: Sequence[float] | None = None, **settings: Any) -> nn.Module:
    """An untrained one of the networks of mat_dist, for images (C, H, W) = `shape`; `settings` are those of `model`."""
    from mat_dist.config.schema import ModelConfig
    from mat_dist.models import build_model

    channels = shape[0]
    return build_model(ModelConfig(name=name, **settings), shape=shape, classes=classes,
                       mean=mean or (0.0,) * channels, std=std or (1.0,) * channels)
