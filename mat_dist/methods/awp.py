"""Adversarial weight perturbation (AWP; Wu, Xia and Wang, NeurIPS 2020): learn at weights that one step up the own loss
has moved, and move them back bit by bit.

Each weight tensor of more than one dimension moves by gamma times its norm along its gradient, as the authors' code
does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from mat_dist.config.fields import Number, Section
from mat_dist.config.methods import Method, register_method
from mat_dist.config.rules import entries, learns_alone
from mat_dist.config.schema import Config
from mat_dist.core.hooks import Hook, Views
from mat_dist.errors import ConfigError
from mat_dist.methods import modes, objective, torch, training_attack

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mat_dist.core.peer import Peer
    from mat_dist.core.step import Batch

DRAW = -2  # keys what the forwards of the step up draw


class AwpConfig(Section):
    """Adversarial weight perturbation."""

    gamma: Number = Field(0.005, gt=0, le=1, description="length of the step relative to the weights' norm (published: "
                                                         "0.01, with TRADES 0.005)")


class WeightPerturbation(Hook):
    """One step up the peer's own loss in the space of weights, and back."""

    name = "awp"
    repeats = True

    def __init__(self, peer: Peer) -> None:
        super().__init__(peer)
        self.settings: AwpConfig = peer.spec.methods["awp"]  # type: ignore[assignment]
        self._before: list[tuple[nn.Parameter, Tensor]] = []

    def climb(self, part: Batch, views: Views) -> Sequence[Tensor]:
        """Gradients of the loss that the peer would have without the others, if any; batch-norm statistics stay."""
        if not self.peer.row.alone:
            return ()
        peer = self.peer
        with torch.enable_grad(), peer.training(part.draw(DRAW)), modes.batch_stats_only(peer.model):
            model = training_attack.amplified(peer.logits, peer.step.precision)
            loss = objective.own_loss(peer.row, {view: model(views[view]) for view in peer.row.alone}, part.y_B,
                                      peer.hooks)
        return list(torch.autograd.grad(loss, self._moved()))

    def before_forward(self, averaged: Sequence[Tensor]) -> None:
        """Move the weights along the averaged gradients."""
        if not averaged:
            return
        moved = self._moved()
        self._before = [(p, p.detach().clone()) for p in moved]
        with torch.no_grad():
            for p, g in zip(moved, averaged, strict=True):
                p.add_(g * (self.settings.gamma * p.norm() / (g.norm() + torch.finfo(g.dtype).tiny)))

    def after_backward(self, part: Batch, views: Views) -> None:
        self.abort()

    def abort(self) -> None:
        """Give the weights back."""
        with torch.no_grad():
            for parameter, before in self._before:
                parameter.copy_(before)
        self._before = []

    def _moved(self) -> list[nn.Parameter]:
        return [p for p in self.peer.model.parameters() if p.requires_grad and p.ndim > 1]


def weights_climb_an_own_loss(config: Config) -> list[ConfigError]:
    """The weights are moved before anything arrives from other peers."""
    return [ConfigError(f"adversarial weight perturbation climbs the loss on own AEs and clean images, and that of "
                        f"preset {peer.loss.preset} has none here", f"{key}.methods.awp.gamma",
                        "leave methods.awp out, or give hard_weight (with hard_own) or clean_weight a weight")
            for key, peer in entries(config) if "awp" in peer.methods and not peer.frozen and not learns_alone(peer)]


register_method(Method("awp", "adversarial weight perturbation (AWP)", section=AwpConfig, hook=WeightPerturbation,
                       climbs=True, learning=lambda spec, row: len(row.alone),
                       rules=((weights_climb_an_own_loss, frozenset({"methods", "loss"})),)))
