"""`model=robustbench/ENTRY`: the architecture and the normalisation of an entry of RobustBench's model zoo.

ResNets, pre-activation ResNets and Wide ResNets are networks of ours; any other comes from the package `robustbench`,
where it is installed. The data set is told by the number of classes.
"""

from __future__ import annotations

import importlib
from importlib import resources
from typing import Any

import torch
from torch import nn

from mat_dist.config.schema import ModelConfig
from mat_dist.errors import ConfigError, EnvironmentFault, nearest
from mat_dist.models.library import no_in_place
from mat_dist.models.registry import Builder, Shape, find_builder, register_family

DATA = {10: "cifar10", 100: "cifar100", 1000: "imagenet"}
Moments = list[tuple[float, ...]]  # mean and deviation of each channel
RAW: Moments = [(0.0,) * 3, (1.0,) * 3]


def entries(classes: int) -> dict[str, tuple[str, Moments]]:
    """Model of ours and normalisation of each entry of RobustBench for so many classes that is built in."""
    moments, found = dict[str, Moments](), dict[str, tuple[str, Moments]]()
    for line in resources.files(__package__).joinpath("robustbench.txt").read_text().splitlines():
        first, *words = line.split()
        if first == str(classes):
            found |= {name: (words[0], moments[words[1]]) for name in words[2:]}
        elif first != "#" and not first.isdigit():
            moments[first] = [tuple(map(float, word.split(","))) for word in words]
    return found


@register_family(r"robustbench/(?:(Linf|L2|corruptions)/)?([\w-]+)")
def robustbench(threat: str | None, entry: str) -> Builder:
    """The network of an entry, of the threat model that is named or the first that has it."""
    def build(config: ModelConfig, shape: Shape, classes: int) -> nn.Module:
        if shape[0] != 3:
            raise ConfigError(f"the images have {shape[0]} channels", f"model.name={config.name}",
                              "networks of RobustBench take 3; choose a built-in network")
        ours, moments = as_ours(config, classes)
        net = _of_the_package(threat, entry, config, classes) if ours == config else find_builder(ours.name)(
            ours, shape, classes)
        net.normalisation = moments  # type: ignore[assignment]  # a plain attribute
        return net

    return build


def as_ours(config: ModelConfig, classes: int) -> tuple[ModelConfig, Moments]:
    """The network of ours that an entry is, with its normalisation; any other network as it is, without one. For other
    numbers of classes the first data set counts that has the entry."""
    name = config.name.removeprefix("robustbench/")
    known = entries(classes) or {**entries(1000), **entries(100), **entries(10)}
    found = known.get(name, known.get(name.rpartition("/")[2])) if name != config.name else None
    if found is None:
        return config, RAW
    model, _, factor = found[0].partition("*")
    return config.model_copy(update={"name": model, "width": config.width * int(factor or 1)}), found[1]


def _of_the_package(threat: str | None, entry: str, config: ModelConfig, classes: int) -> nn.Module:
    """The original module, which normalises by itself."""
    where, listed = f"model.name={config.name}", entries(classes)
    near = nearest(entry, listed, alike=0.7)
    hint = f"did you mean robustbench/{near}? " if near else ""
    if not listed:
        raise ConfigError(f"the data have {classes} classes, those of RobustBench 10, 100 or 1000", where,
                          "choose one of the entries that are built in (docs/models.md), which take any number")
    try:
        zoo: Any = importlib.import_module("robustbench.model_zoo").model_dicts
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise EnvironmentFault(f"none of RobustBench's networks for {classes} classes that are built in, and its "
                               f"package cannot be imported: {error}", where, f"{hint}Else pip install robustbench"
                               ) from error
    models = {(kind.value, name): one["model"] for data, kinds in zoo.items() if data.value == DATA[classes]
              for kind, entries in kinds.items() for name, one in entries.items()}
    key = next((one for one in models if one[1] == entry and threat in (None, one[0])), None)
    if key is None or (config.width, config.activation, config.norm) != (1, None, None):
        raise ConfigError(f"RobustBench has no such network for {classes} classes" if key is None else
                          "width, activation or norm for a network of the package robustbench", where,
                          f"{hint}See the list of its model zoo" if key is None else "leave them out")
    name = f"{entry}_{DATA[classes]}_{key[0]}".lower().replace("-", "_")
    try:  # what is registered in timm would be built with pretrained weights
        net: nn.Module = timm.create_model(name, num_classes=classes) if timm.is_model(name) else models[key]()
    except Exception as error:  # of a code that is not ours, which may also look for a GPU or for files
        raise ConfigError(f"the package robustbench cannot build it: {type(error).__name__}: {error}", where,
                          "choose another network") from error
    no_in_place(net)
    return net.to(torch.get_default_device())
