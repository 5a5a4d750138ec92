"""Weights with which torchvision and timm publish their networks, by their own loaders."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.errors import ConfigError, EnvironmentFault

Shape = tuple[int, int, int]
Loaded = tuple[dict[str, Tensor], Any, Any]  # with mean and deviation of each channel


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
