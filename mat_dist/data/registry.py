"""Data sets by name. A plug-in file adds its own with `@register_dataset("name")`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Protocol

from mat_dist.config.schema import DataConfig
from mat_dist.data.images import RawData
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import ConfigError


class Loader(Protocol):
    """A data set: settings, whether this process writes shared files, the stop request of this process -> images."""

    def __call__(self, config: DataConfig, build: bool, stop: StopFlag | None = None) -> RawData: ...


_LOADERS: dict[str, Loader] = {}


def register_dataset(name: str, *, shared: bool = False,
                     stoppable: bool = False) -> Callable[[Callable[..., RawData]], Callable[..., RawData]]:
    """Make a function (DataConfig) -> RawData available as `data.name=<name>`.

    Args:
        name: the name, which no other data set has.
        shared: the function takes a second argument `build` (bool) and writes files that ranks share (a download, a
            cache): a call with build=True may write them, a call with build=False waits until they are there.
        stoppable: the function also takes `stop` (a StopFlag or None) and calls `leave_if`
            (distributed.stopping) now and then; without it a stop request is noticed when the data are there.
    """

    def add(function: Callable[..., RawData]) -> Callable[..., RawData]:
        if name in _LOADERS:
            raise ConfigError(f"the data set {name!r} is registered twice",
                              f"{function.__module__}.{function.__name__}", "give it another name")

        def load(config: DataConfig, build: bool, stop: StopFlag | None = None) -> RawData:
            return function(config, *([build] if shared else []), **({"stop": stop} if stoppable else {}))

        _LOADERS[name] = load
        return function

    return add


def find_dataset(name: str) -> Loader:
    """The function (DataConfig, build, stop) -> RawData of a data set. Raises ConfigError for an unknown name."""
    if name in _LOADERS:
        return _LOADERS[name]
    near = difflib.get_close_matches(name, _LOADERS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"unknown data set {name!r}", "data.name",
                      f"{hint}known: {', '.join(dataset_names())}; a plug-in file can register its own")


def dataset_names() -> tuple[str, ...]:
    """All registered names, sorted."""
    return tuple(sorted(_LOADERS))
