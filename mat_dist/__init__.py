"""mat_dist: distributed mutual adversarial training (MAT) of several classifiers. Its public names: docs/api.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mat_dist.api.evaluation import Results, attack, evaluate
    from mat_dist.api.losses import register_loss
    from mat_dist.api.run import Run
    from mat_dist.api.training import train
    from mat_dist.attacks import Threat, norms, register_threat
    from mat_dist.checkpoints.load import load
    from mat_dist.config.methods import register_method
    from mat_dist.core import losses
    from mat_dist.data import register_dataset
    from mat_dist.errors import MatError
    from mat_dist.models import register_model
    from mat_dist.tools.export import export

__version__ = "0.2.0"
# Where the names are. They are imported when they are asked for: most need torch, for which `--help` must not wait.
_PLACES = {"MatError": "errors", "Results": "api.evaluation", "Run": "api.run", "Threat": "attacks",
           "attack": "api.evaluation", "evaluate": "evaluate", "export": "tools.export", "load": "checkpoints.load",
           "losses": "core.losses", "norms": "attacks.norms", "register_dataset": "data", "register_loss": "api.losses",
           "register_method": "config.methods", "register_model": "models", "register_threat": "attacks",
           "train": "train"}
__all__ = ["MatError", "Results", "Run", "Threat", "attack", "evaluate", "export", "load", "losses", "norms",
           "register_dataset", "register_loss", "register_method", "register_model", "register_threat", "train"]


def __getattr__(name: str) -> Any:
    """A public name, or the module that has it: `losses`, `norms`, and commands that are functions too."""
    if name not in _PLACES:
        raise AttributeError(f"module 'mat_dist' has no attribute {name!r}")
    module = importlib.import_module(f"mat_dist.{_PLACES[name]}")
    return getattr(module, name) if _PLACES[name] != name and hasattr(module, name) else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
