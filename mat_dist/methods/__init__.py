"""Published methods, one file each: presets, strategies, settings, rules, a hook. Without its file a method is gone.

`config.methods` finds the files and imports them, for `--help` too, which must not wait for torch: so they take heavy
modules with `lazy`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mat_dist.core.hooks import Hook

if TYPE_CHECKING:
    from torch import Tensor

    from mat_dist.attacks.perturbation_buffer import PerturbationBuffer


class lazy:
    """The module of this name, imported when something of it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, item: str) -> Any:
        return getattr(importlib.import_module(self._name), item)


class PerturbationHook(Hook):
    """A hook whose state is the perturbations of images, which a step proposes and its vote commits."""

    buffer: PerturbationBuffer

    def proposed(self) -> Sequence[Tensor]:
        return self.buffer.proposed()

    def commit(self, step: int, shared: Sequence[Tensor]) -> None:
        self.buffer.commit(shared)

    def abort(self) -> None:
        self.buffer.forget()

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.buffer.load_state_dict(state)
