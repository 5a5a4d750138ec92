"""Networks of torchvision and timm, adapted to the images, the classes and our settings, and the weights with which
these libraries publish them, by their own loaders.

The libraries are imported on first use: torchvision takes about a second, timm is optional.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from mat_dist import rng
from mat_dist.config.schema import ModelConfig
from mat_dist.errors import ConfigError, EnvironmentFault, optional
from mat_dist.models.blocks import make_activation, norm_groups
from mat_dist.models.modes import frozen

Shape = tuple[int, int, int]
Loaded = tuple[dict[str, Tensor], Any, Any]  # with mean and deviation of each channel
PREFIXES = ("torchvision/", "timm/")
_AUXILIARY = ("googlenet", "inception_v3")  # with auxiliary heads they return a tuple in train mode
RELUS = (nn.ReLU, nn.ReLU6)
_RELU_OPERATORS = frozenset({"relu", "relu_", "hardtanh", "hardtanh_"})  # relu6 is hardtanh from 0 to 6


class RepeatChannels(nn.Module):
    """Shows a grey image to a network that takes three channels: (B, 1, H, W) -> (B, 3, H, W)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.expand(-1, 3, -1, -1)


def library_builder(name: str) -> Callable[[ModelConfig, Shape, int], nn.Module]:
    """The builder of a name that starts with one of PREFIXES; no pretrained weights.

    width is refused. In-place operations are turned off. activation replaces each ReLU and ReLU6 (other activations
    stay), norm=group each BatchNorm2d; a network on which the setting would have no effect, or only in part, is
    refused.
    """
    library, bare_name = name.split("/", 1)
    create = _torchvision if library == "torchvision" else _timm

    def build(config: ModelConfig, shape: Shape, classes: int) -> nn.Module:
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


def in_libraries(name: str) -> list[str]:
    """A name without its library, as `model.name` of the libraries that are installed."""
    found = []
    for prefix, module in zip(PREFIXES, ("torchvision.models", "timm"), strict=True):
        with suppress(ImportError):
            library: Any = importlib.import_module(module)
            known = library.list_models(module=library) if module == "torchvision.models" else library.list_models()
            found += [prefix + name.lower()] if name.lower() in known else []
    return found


def _torchvision(name: str, shape: Shape, classes: int) -> nn.Module:
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


def _timm(name: str, shape: Shape, classes: int) -> nn.Module:
    timm = optional("timm", f"model.name=timm/{name}", "pip install timm, or choose another model")
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
    if not any(isinstance(module, _BatchNorm) for module in net.modules()):
        raise ConfigError("the network has no batch norm", f"model.name={name}", "leave model.norm empty")
    if norm == "group":
        _replace(net, (nn.BatchNorm2d,), lambda old: nn.GroupNorm(norm_groups(old.num_features), old.num_features,
                                                                  eps=old.eps, affine=old.affine))
        if any(isinstance(module, _BatchNorm) for module in net.modules()):
            raise ConfigError("some batch norms of the network are of a type of their own", f"model.name={name}",
                              "leave model.norm empty or choose another network")


def _set_activation(net: nn.Module, activation: str, name: str, shape: Shape) -> None:
    if not replace_relus(net, activation):
        raise ConfigError("the network has no ReLU modules", f"model.name={name}", "leave model.activation empty")
    if activation == "relu":
        return
    with frozen(net), torch.no_grad(), _Operators() as seen:
        net(torch.full((1, *shape), 0.5))
    if not _RELU_OPERATORS.isdisjoint(seen.names):
        raise ConfigError("the network calls ReLU as a function, so it cannot be replaced", f"model.name={name}",
                          "leave model.activation empty or choose another network")


def no_in_place(net: nn.Module) -> None:
    """Turn in-place activations and dropout off: an attack may use the overwritten tensor a second time."""
    for module in net.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]  # a plain attribute


def replace_relus(net: nn.Module, activation: str) -> int:
    """Replace every module of exact type ReLU or ReLU6; other activations stay. Returns how many were found."""
    return _replace(net, RELUS, lambda old: make_activation(activation))


def _replace(net: nn.Module, kinds: tuple[type[nn.Module], ...], new: Callable[[Any], nn.Module]) -> int:
    """Replace submodules of exactly these types; a module that stands in several places stays one module."""
    done: dict[nn.Module, nn.Module] = {}
    for parent in list(net.modules()):
        for name, child in parent._modules.items():  # named_children leaves repeated modules out
            if child is not None and type(child) in kinds:
                if child not in done:
                    done[child] = new(child)
                parent._modules[name] = done[child]
    return len(done)


class _Operators(TorchDispatchMode):
    """Collects the names of the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def published_weights(name: str, shape: Shape, fetch: Callable[[str], Path]) -> dict[str, Tensor]:
    """The weights of `model.name` for their own classes and images of `shape`, with their `mean` and `std`.

    Args:
        name: of a network of torchvision or timm, or of one of ours that torchvision has too.
        fetch: address on the Hugging Face hub -> file.

    Raises ConfigError for a network without such weights, EnvironmentFault where they can be neither found nor fetched.
    """
    library, _, bare = name.rpartition("/")
    models: Any = importlib.import_module("timm" if library == "timm" else "torchvision.models")
    known = models.get_pretrained_cfg(bare) if library == "timm" else library in ("", "torchvision") and bare in (
        models.list_models(module=models)) and models.get_model_weights(bare).DEFAULT
    if not known or not (known.url or known.hf_hub_id):
        raise ConfigError("there are no pretrained weights for this network", f"model.name={name}",
                          "choose torchvision/<name> or timm/<name>, or write init_from=FILE or hf:ORG/NAME")
    try:
        with rng.keyed_rng(0):  # their code draws weights first, and overwrites them
            state, mean, std = (_of_timm if library == "timm" else _of_torchvision)(models, bare, known, shape, fetch)
    except OSError as error:
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        raise EnvironmentFault(f"the pretrained weights can be neither found nor fetched: {error}",
                               f"model.name={name}", f"put {known.url} into {cache} (TORCH_HOME)") from error
    except (RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f"its library cannot load its pretrained weights: {' '.join(str(error).split())[:300]}",
                          f"model.name={name}", "choose another network, or another image size") from error
    for word, values in (("mean", mean), ("std", std)):  # of grey images the mean of that of the colours
        state[f"pretrained.{word}"] = torch.tensor(values if shape[0] == len(values) else [sum(values) / len(values)])
    return state


def _of_torchvision(models: Any, name: str, weights: Any, shape: Shape, fetch: Any) -> Loaded:
    net: nn.Module = models.get_model(name, weights=weights)
    state = net.state_dict()
    if name.startswith("vit_"):
        state = models.vision_transformer.interpolate_embeddings(shape[1], net.patch_size, state)
    mean, std = weights.transforms().mean, weights.transforms().std
    if getattr(net, "transform_input", False):  # such networks change ImageNet's normalisation to this one
        mean = std = [0.5] * 3
    # Our networks for grey images have a layer before it, which repeats the channel.
    return {f"{'1.' if shape[0] == 1 else ''}{key}": value for key, value in state.items()}, mean, std


def _of_timm(timm: Any, name: str, config: Any, shape: Shape, fetch: Any) -> Loaded:
    options: dict[str, Any] = {"img_size": shape[1:]} if config.fixed_input_size else {}
    if config.hf_hub_id:
        file = fetch(f"hf:{config.hf_hub_id}" + (f"/{config.hf_hub_filename}" if config.hf_hub_filename else ""))
        options["pretrained_cfg_overlay"] = {"file": str(file), "custom_load": False}
    net = timm.create_model(name, pretrained=True, in_chans=shape[0], **options)
    return net.state_dict(), config.mean, config.std
