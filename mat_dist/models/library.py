"""Networks of torchvision and timm, adapted to the images, the classes and our settings.

The libraries are imported on first use: torchvision takes about a second, timm is optional.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist.config.schema import ModelConfig
from mat_dist.errors import ConfigError, EnvironmentFault
from mat_dist.models.rewrite import applies_relu, has_batch_norm, no_in_place, replace_batch_norms, replace_relus

PREFIXES = ("torchvision/", "timm/")
_AUXILIARY = ("googlenet", "inception_v3")  # with auxiliary heads they return a tuple in train mode


class RepeatChannels(nn.Module):
    """Shows a grey image to a network that takes three channels: (B, 1, H, W) -> (B, 3, H, W)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.expand(-1, 3, -1, -1)


def library_builder(name: str) -> Callable[[ModelConfig, tuple[int, int, int], int], nn.Module]:
    """The builder of a name that starts with one of PREFIXES; no pretrained weights.

    width is refused. In-place operations are turned off. activation replaces each ReLU and ReLU6 (other activations
    stay), norm=group each BatchNorm2d; a network on which the setting would have no effect, or only in part, is
    refused.
    """
    library, bare_name = name.split("/", 1)
    create = _torchvision if library == "torchvision" else _timm

    def build(config: ModelConfig, shape: tuple[int, int, int], classes: int) -> nn.Module:
        if config.width != 1:
            raise ConfigError(f"width {config.width:g} for a network of {library}", f"model.name={name}",
                              "leave width at 1 and choose a wider or narrower network by its name")
        try:
            net = create(bare_name, shape, classes)
            no_in_place(net)
            if config.norm is not None:
                _set_norm(net, config.norm, name)
            if config.activation is not None:
                _set_activation(net, config.activation, name, shape)
        except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
            raise ConfigError(f"cannot be built for images of shape {shape}: {error}", f"model.name={name}",
                              "choose another model, or another image size") from error
        return net

    return build


def _torchvision(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    models: Any = importlib.import_module("torchvision.models")
    known = models.list_models(module=models)  # the classifiers; detection and the like stand in other modules
    if name not in known:
        raise _unknown("torchvision", name, known)
    channels, height, width = shape
    options: dict[str, Any] = {}
    if name in _AUXILIARY:
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": height}
    elif name.startswith("maxvit"):
        options = {"input_size": (height, width)}
    net: nn.Module = models.get_model(name, weights=None, num_classes=classes, **options)
    if channels == 3:
        return net
    if channels == 1:
        return nn.Sequential(RepeatChannels(), net)
    raise ConfigError(f"images have {channels} channels", f"model.name=torchvision/{name}",
                      "networks of torchvision take 3 channels, or 1 that is repeated; choose a built-in network")


def _timm(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise EnvironmentFault(f"timm cannot be imported: {error}", f"model.name=timm/{name}",
                               "pip install timm, or choose another model") from error
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    options: dict[str, Any] = {}
    if timm.get_pretrained_cfg(name).fixed_input_size:  # transformers are built for one image size
        options = {"img_size": shape[1:]}
    net: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=shape[0], **options)
    return net


def _unknown(library: str, name: str, known: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return ConfigError(f"{library} has no classifier {name!r}", "model.name",
                       f"the nearest are {', '.join(near)}" if near else f"see {library}'s list of models")


def _set_norm(net: nn.Module, norm: str, name: str) -> None:
    if not has_batch_norm(net):
        raise ConfigError("the network has no batch norm", f"model.name={name}", "leave model.norm empty")
    if norm == "group":
        replace_batch_norms(net)
        if has_batch_norm(net):
            raise ConfigError("some batch norms of the network are of a type of their own", f"model.name={name}",
                              "leave model.norm empty or choose another network")


def _set_activation(net: nn.Module, activation: str, name: str, shape: tuple[int, int, int]) -> None:
    if not replace_relus(net, activation):
        raise ConfigError("the network has no ReLU modules", f"model.name={name}", "leave model.activation empty")
    if activation != "relu" and applies_relu(net, torch.full((1, *shape), 0.5)):
        raise ConfigError("the network calls ReLU as a function, so it cannot be replaced", f"model.name={name}",
                          "leave model.activation empty or choose another network")
