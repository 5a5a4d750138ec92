"""Published methods, one file each: presets, strategies, settings, rules, a hook. Without its file a method is gone.

`config.methods` finds the files and imports them, for `--help` too, which must not wait for torch: so they take heavy
modules from here, where they are imported when something of them is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mat_dist.core.hooks import Hook

if TYPE_CHECKING:
    import torch

    import mat_dist.attacks.pgd as pgd
    from mat_dist import rng
    from mat_dist.attacks import norms, perturbation_buffer, training_attack
    from mat_dist.core import losses, objective
    from mat_dist.data import augment
    from mat_dist.models import modes
else:
    class _Lazy:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, item: str) -> Any:
            return getattr(importlib.import_module(self._name), item)

    torch, rng = _Lazy("torch"), _Lazy("mat_dist.rng")
    norms, perturbation_buffer, pgd, training_attack = (
        _Lazy(f"mat_dist.attacks.{name}") for name in ("norms", "perturbation_buffer", "pgd", "training_attack"))
    losses, objective = _Lazy("mat_dist.core.losses"), _Lazy("mat_dist.core.objective")
    augment, modes = _Lazy("mat_dist.data.augment"), _Lazy("mat_dist.models.modes")

__all__ = ["PerturbationHook", "augment", "losses", "modes", "norms", "objective", "perturbation_buffer", "pgd", "rng",
           "torch", "training_attack"]


class PerturbationHook(Hook):
    """A hook whose state is the perturbations of images, which a step proposes and its vote commits."""

    buffer: perturbation_buffer.PerturbationBuffer

    def proposed(self) -> Sequence[torch.Tensor]:
        return self.buffer.proposed()

    def commit(self, step: int, shared: Sequence[torch.Tensor]) -> None:
        self.buffer.commit(shared)

    def abort(self) -> None:
        self.buffer.forget()

    def state_dict(self) -> dict[str, Any]:
        return self.buffer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.buffer.load_state_dict(state)
