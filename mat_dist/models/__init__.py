"""Classifiers over images in [0, 1]: built-in networks, torchvision, timm, plug-ins, ensembles of peers."""

from mat_dist.models import networks, robustbench  # noqa: F401  they register them
from mat_dist.models.ensemble import Ensemble
from mat_dist.models.registry import Normalize, build_model, model_names, parameter_count, register_model

__all__ = ["Ensemble", "Normalize", "build_model", "model_names", "parameter_count", "register_model"]
