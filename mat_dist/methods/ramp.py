"""RAMP (Jiang and Singh, "RAMP: boosting adversarial robustness against multiple lp perturbations", NeurIPS 2024): the
worst AE of each image, with the logits on the AEs of two norms paired; and gradient projection: what natural training
would do, as far as adversarial training agrees (equations 4 to 7; there the updates of whole epochs are combined, here
the gradients of a step, as in its definition 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from mat_dist.config.fields import Number, Section
from mat_dist.config.methods import Method, Strategy, register_method
from mat_dist.core.hooks import Hook, Views
from mat_dist.methods import losses, modes, torch

if TYPE_CHECKING:
    from torch import Tensor

    from mat_dist.core.graph import PeerGraph, View
    from mat_dist.core.peer import Peer
    from mat_dist.core.step import Batch

DRAW = -3  # keys what the forward on clean images draws


class RampConfig(Section):
    """The two halves of RAMP; with union.strategy: ramp."""

    weight: Number = Field(5.0, ge=0, description="weight of the pairing against the hard labels on AEs (published: 5 "
                                                  "from scratch)")
    projection: Number = Field(0.0, ge=0, lt=1, description="weight of the gradient on clean images as far as each "
                                                            "layer's own points the same way (published: 0.5)")


def pairing(first_BK: Tensor, second_BK: Tensor, y_B: Tensor, right: Tensor | None = None) -> Tensor:
    """KL(prediction on the AE of one norm || on that of another), mean over images right on the first -> scalar, 0
    where no image is right.

    Args:
        right: how many images the sum is divided by, where the batch is a part of a larger one; a scalar > 0.
    """
    right_B = first_BK.argmax(-1) == y_B
    each_B = losses.kl_per_image(first_BK.log_softmax(-1), second_BK.log_softmax(-1))
    return (each_B * right_B).sum() / (right_B.sum().clamp(min=1) if right is None else right)


def project(adversarial: Sequence[Tensor], natural: Sequence[Tensor], beta: float) -> None:
    """(1 - beta) g_a + beta max(0, cos(g_a, g_n)) g_n takes the place of each g_a, tensor by tensor.

    Single numbers are left alone, as in the authors' code. A gradient of zero has no direction: its cosine is 0.

    Args:
        adversarial: gradient of the training loss for each parameter; changed in place.
        natural: gradient of the loss on clean images.
        beta: weight of the natural part, in [0, 1).
    """
    with torch.no_grad():
        for g_a, g_n in zip(adversarial, natural, strict=True):
            if g_a.ndim == 0:
                continue
            length = g_a.norm() * g_n.norm()
            cosine = (g_a * g_n).sum() / length.clamp(min=torch.finfo(length.dtype).tiny)
            g_a.mul_(1 - beta).add_(g_n * (beta * cosine.clamp(min=0)))


class Ramp(Hook):
    """Pairs the logits of two norms, and projects the gradient."""

    name = "ramp"
    repeats = True

    def __init__(self, peer: Peer) -> None:
        super().__init__(peer)
        self.settings: RampConfig = peer.spec.methods.get("ramp", RampConfig())  # type: ignore[assignment]
        self._natural: list[Tensor] = []

    def couples(self, row: PeerGraph) -> Sequence[View]:
        """The two views that are paired: linf and l1 where both are there, else the first and the last threat."""
        if len(row.rivals) < 2:
            return ()
        norms = {row.threat_of(view).norm: view for view in reversed(row.rivals)}
        pair = (norms["linf"], norms["l1"]) if {"linf", "l1"} <= set(norms) else (row.rivals[0], row.rivals[-1])
        return pair

    def count(self, row: PeerGraph, logits: Callable[[View], Tensor], y_B: Tensor) -> Tensor | None:
        pair = self.couples(row)
        return (logits(pair[0]).argmax(-1) == y_B).sum().double() if pair else None

    def loss(self, row: PeerGraph, logits: Views, y_B: Tensor, count: Tensor | None) -> Tensor:
        first, second = self.couples(row)
        # Times the weight of the worst cross-entropy: the paper's ratio between the two.
        weight = sum(row.hard[view] for view in row.rivals) * self.settings.weight
        # The mean over replicas is below 1 where few are right, and 0 where none is: so is the sum.
        right = None if count is None else count.clamp(min=2.0**-20)
        return weight * pairing(logits[first], logits[second], y_B, right)

    def after_backward(self, part: Batch, views: Views) -> None:
        """Add this micro-batch's gradient of the loss on clean images; batch-norm statistics stay."""
        peer = self.peer
        if not self.settings.projection or peer.spec.frozen:
            return
        with torch.enable_grad(), peer.training(part.draw(DRAW)), modes.batch_stats_only(peer.model):
            smoothing = peer.spec.loss.label_smoothing or 0.0
            loss = 1 / part.parts * losses.cross_entropy(peer.logits(part.x_BCHW), part.y_B, smoothing)
        trainable = [p for p in peer.model.parameters() if p.requires_grad]
        found = list(torch.autograd.grad(peer.scale.up(loss), trainable, allow_unused=True, materialize_grads=True))
        peer.scale.down(found)
        self._natural = [a + b for a, b in zip(self._natural, found, strict=True)] if self._natural else found

    def gradients(self) -> Sequence[Tensor]:
        return self._natural

    def after_reduce(self) -> None:
        if self._natural:
            project(self.peer.gradients(), self._natural, self.settings.projection)
        self.abort()

    def abort(self) -> None:
        self._natural = []


register_method(Method(
    "ramp", "paired logits and projected gradients for unions (RAMP)", section=RampConfig, hook=Ramp, counts=True,
    learning=lambda spec, row: int(getattr(spec.methods.get("ramp"), "projection", 0.0) > 0 and not spec.frozen),
    when=lambda spec: spec.union.strategy == "ramp",
    strategies={"ramp": Strategy("max with paired logits (RAMP)", each=True, worst=True)},
    one_label=(lambda peer: peer.union.strategy == "ramp", "union.strategy", "strategy: max")))
