"""A resolved configuration as YAML, and the differences of two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from mat_dist.config.schema import Config
from mat_dist.config.tree import SHARED, write

# What a resumed run may change: none of it alters the weights that the training gives. `run.threads` and
# `step.memory` keep the result but for rounding; the data are compared by digest, so their paths may change.
_MAY_CHANGE = ("eval.", "log.", "checkpoint.", "comm.", "run.root", "run.name", "run.resume", "run.threads",
               "data.root", "data.download", "data.cache", "data.residency", "step.memory")


def _values(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """Plain values without the shared sections, which have no meaning in a resolved configuration."""
    values = config.model_dump(mode="json") if isinstance(config, Config) else dict(config)
    return {name: value for name, value in values.items() if name not in SHARED}


def dump_config(config: Config, *, with_name: bool = False) -> str:
    """The resolved configuration as YAML; `load_config` of it gives an equal one (all floats exact).

    The shared sections are left out, since each peer is complete, and so is `run.name`, so that running the
    file again begins a new run; `with_name` keeps it.
    """
    values = _values(config)
    if not with_name:
        values["run"].pop("name")
    return write(values)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        children: Any = value.items()
    elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        children = enumerate(value)
    else:
        yield key, list(value) if isinstance(value, tuple) else value
        return
    for name, child in children:
        yield from _flat(child, f"{key}.{name}" if key else str(name))


def _complete(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """`_values`; settings that an older version did not know get their defaults."""
    values = _values(config)
    try:
        return _values(Config.model_validate(values))
    except ValidationError:  # written by a version with other settings: compared as it is
        return values


def _pairs(old: Config | Mapping[str, Any], new: Config | Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    before, after = dict(_flat(_complete(old))), dict(_flat(_complete(new)))
    keys = [*after, *(key for key in before if key not in after)]
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


def _line(key: str, before: Any, after: Any) -> str:
    return f"{key}: {'null' if before is None else before} -> {'null' if after is None else after}"


def config_differences(old: Config | Mapping[str, Any], new: Config | Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for each setting that differs. A configuration may be given as its dumped values."""
    return [_line(*pair) for pair in _pairs(old, new)]


def resume_conflicts(old: Config | Mapping[str, Any], new: Config) -> list[str]:
    """The differences that a resumed run must refuse: all but `_MAY_CHANGE` and a longer training."""
    return [_line(*pair) for pair in _pairs(old, new) if not _longer(*pair) and not pair[0].startswith(_MAY_CHANGE)]


def trains_longer(old: Config, new: Config) -> bool:
    """Whether `new` has more epochs, or its training is cut later."""
    return any(_longer(*pair) for pair in _pairs(old, new))


def _longer(key: str, before: Any, after: Any) -> bool:
    if not isinstance(before, int) or key not in ("train.epochs", "train.max_steps"):
        return False
    return after > before if isinstance(after, int) else key == "train.max_steps"
