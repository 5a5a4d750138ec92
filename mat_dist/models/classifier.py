"""What a peer's classifier must fit, and the classifier with its initial weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mat_dist import rng
from mat_dist.config.schema import PeerConfig, StepConfig
from mat_dist.models.registry import build_model

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}  # of images, AEs and losses


@dataclass(frozen=True)
class Images:
    """What the models must fit: image shape (C, H, W), number of classes, channel mean and deviation."""

    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Images:
        """From what a checkpoint's manifest tells."""
        return cls(tuple(told["shape"]), told["classes"], tuple(told["mean"]), tuple(told["std"]))


def make_model(spec: PeerConfig, images: Images, *, seed: int, step: StepConfig, device: torch.device) -> nn.Module:
    """A peer's model with its keyed initial weights, in the precision and layout of the run."""
    with rng.keyed_rng(rng.key(seed, "init", spec.stream or 0)):
        model = build_model(spec.model, shape=images.shape, classes=images.classes, mean=images.mean, std=images.std)
    return model.to(device=device, dtype=DTYPES[step.precision]).to(memory_format=torch.channels_last)
