"""mat_dist: distributed mutual adversarial training (MAT) of several classifiers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

__version__ = "0.2.0"


def load(run: str | Path, peer: str | int = "best", **choices: Any) -> nn.Module:
    """A trained classifier of a run, images in [0, 1] -> logits. Arguments: `mat_dist.checkpoints.load.load`."""
    from mat_dist.checkpoints.load import load as load_model  # torch is imported only where a model is wanted

    return load_model(run, peer, **choices)
