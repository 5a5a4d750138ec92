"""`mat_dist.register_loss`: a loss of one's own as a function. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from pydantic import create_model

from mat_dist.config.fields import Section
from mat_dist.config.methods import Method, Preset, register_method
from mat_dist.core.hooks import Hook

AnyLoss = TypeVar("AnyLoss", bound=Callable[..., Any])


def register_loss(name: str) -> Callable[[AnyLoss], AnyLoss]:
    """Decorator that makes a function (logits on own AEs (B, K), on clean images (B, K), labels (B,)) -> scalar known
    as `loss=<name>`, in the place of hard labels; `loss.kd_weight` adds distillation. Raises ConfigError for a name
    that is taken, or no word in lower case."""
    def register(function: AnyLoss) -> AnyLoss:
        class OwnLoss(Hook):
            def couples(self, row: Any) -> Sequence[Any]:
                return () if row.me.frozen else (row.mine[0], *(view for view in row.learned if view.maker < 0))

            def loss(self, row: Any, logits: Any, y_B: Any, count: Any) -> Any:
                return function(*(logits[view] for view in self.couples(row)), y_B)

        OwnLoss.name = name
        section = create_model(function.__qualname__, __base__=Section, __module__=function.__module__)
        register_method(Method(name, f"the loss {name}", section=section, hook=OwnLoss, pairs=True, presets={
            name: Preset(({"hard_weight": 0.0},), methods=({name: {}},))}))
        return function

    return register
