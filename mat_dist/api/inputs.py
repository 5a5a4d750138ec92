"""What programs hand over, checked: images, labels, a model, threats and attacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mat_dist import rng
from mat_dist.attacks.norms import Threat
from mat_dist.config.load import setting_words
from mat_dist.config.schema import Config
from mat_dist.data.load import check_labels, check_range
from mat_dist.errors import ConfigError, DataError, EnvironmentFault
from mat_dist.evaluation.settings import FileOptions, Request, one_peer, parse
from mat_dist.models.modes import frozen, spared_buffers
from mat_dist.models.registry import Normalize, check_moments

TRIED = 8  # images that a model is shown before it is attacked
OF_RUNS = ("targets", "weights", "checkpoint", "save", "entry", "clean", "confirmed", "normalise", "out", "sources")
Threats = str | Threat | Sequence[str | Threat]


def asked(threats: Threats, attacks: str | Sequence[str], precision: torch.dtype,
          settings: Mapping[str, Any], needless: Sequence[str] = ()) -> tuple[Request, Config, FileOptions]:
    """The settings as the command reads them for a file of weights, whose place the model takes. Raises ConfigError,
    also for those that would have no effect."""
    for key in settings.keys() & {*OF_RUNS, *needless}:
        raise ConfigError(f"{key} has no effect here", key, "leave it out")
    own = {"threats": _listed(threats), "attacks": _listed(attacks),
           **{key: value for key, value in settings.items() if value is not None}}
    found = parse(["model.pt", *setting_words(own)])
    assert found.importing is not None
    words = [*found.settings, *found.importing.settings, *(["step.precision=fp64"] * (precision == torch.float64))]
    return found.request, one_peer(*words), found.importing.options


def _listed(values: Any) -> str:
    """One or several names or threats as on the command line."""
    several = values if isinstance(values, (list, tuple)) else [values]
    return ",".join(f"{one.norm}:{one.eps!r}" if isinstance(one, Threat) else str(one) for one in several)


def checked_images(images: Any, where: str = "images") -> Tensor:
    """Float images (B, C, H, W) in [0, 1]. Raises DataError for anything else."""
    if not isinstance(images, Tensor) or images.ndim != 4 or 0 in images.shape or images.is_meta or images.is_sparse:
        found = f"{images.device}, shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise DataError(f"images are of {found}", where, "give a dense tensor (B, C, H, W) with at least one image")
    if images.dtype not in (torch.float32, torch.float64):
        how = "images.float()" if images.is_floating_point() else "images.float() / 255 for bytes"
        raise DataError(f"images are {images.dtype}", where, f"give float32 or float64 in [0, 1]: {how}")
    images = images.detach()
    check_range(images, where, "give images in [0, 1]; a model for normalised ones takes mean=, std= beside it")
    return images.clamp(0, 1)


def checked_labels(labels: Any, count: int, classes: int, where: str = "labels") -> Tensor:
    """Labels 0 to classes - 1 as int64 (B,). Raises DataError for anything else."""
    try:
        labels_B = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"labels are no numbers: {error}", where, "give one class per image, int64 (B,)") from error
    if labels_B.is_floating_point():
        labels_B = labels_B.double()  # numpy has no bfloat16
    if labels_B.ndim != 1 or labels_B.dtype == torch.bool:
        raise DataError(f"labels are {labels_B.dtype} of shape {tuple(labels_B.shape)}", where,
                        "give one class per image, int64 (B,); of one-hot rows y.argmax(1)")
    return check_labels(labels_B.numpy(), count, classes, where)[0]


@contextmanager
def borrowed(model: nn.Module, options: FileOptions, channels: int) -> Iterator[nn.Module]:
    """The model over images in [0, 1], in eval mode. Afterwards it is as it was: the mode of each module, gradients and
    who needs them, buffers; and so are the global generators, which it may draw from. Raises ConfigError."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model is {type(model).__name__}", "model", "give a torch.nn.Module")
    device, dtype = home(model)
    normalise = []
    if options.mean is not None and options.std is not None:
        check_moments(channels, options.mean, options.std)
        normalise = [Normalize(options.mean, options.std).to(device, dtype)]
    with torch.inference_mode(False), torch.enable_grad(), frozen(model), spared_buffers(model), rng.keyed_rng(0):
        yield nn.Sequential(*normalise, model).eval() if normalise else model


def home(model: nn.Module) -> tuple[torch.device | None, torch.dtype]:
    """Where a model's weights are, None without any, and their type. Raises EnvironmentFault."""
    values = [value for value in chain(model.parameters(), model.buffers()) if not is_lazy(value)]
    devices = {value.device for value in values}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise EnvironmentFault(f"the model's weights are on {', '.join(sorted(map(str, devices)))}", "model",
                               "put all of it on one device, with model.to(device)")
    if any(value.is_inference() for value in values):
        raise ConfigError("the model was made in inference mode, where nothing has a gradient", "model",
                          "make it, or load its weights, outside of torch.inference_mode()")
    floats = [value.dtype for value in values if value.is_floating_point()]
    return next(iter(devices), None), floats[0] if floats else torch.float32
