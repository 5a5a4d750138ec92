"""Misclassification-aware adversarial training (MART; Wang et al., ICLR 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from mat_dist.config.fields import Number, Section
from mat_dist.config.methods import Method, Preset, register_method
from mat_dist.core.hooks import Hook, Views
from mat_dist.methods import losses, torch

if TYPE_CHECKING:
    from torch import Tensor

    from mat_dist.core.graph import PeerGraph, View
    from mat_dist.core.peer import Peer


class MartConfig(Section):
    """Boosted cross-entropy on own AEs, and a KL that counts images which are wrong when clean."""

    beta: Number = Field(6.0, ge=0, description="weight of KL(clean || own AE), image by image times one minus the "
                                                "clean probability of the true class (published: 6)")


def boosted_cross_entropy(logits_BK: Tensor, y_B: Tensor) -> Tensor:
    """Cross-entropy plus -log(1 - largest wrong probability), mean over the batch -> scalar.

    The constants 1.0001 and 1e-12, which keep the logarithm finite, are those of the paper's code.
    """
    wrong_B = logits_BK.softmax(-1).scatter(1, y_B[:, None], 0.0).amax(-1)
    return torch.nn.functional.cross_entropy(logits_BK, y_B) - (1.0001 - wrong_B + 1e-12).log().mean()


def weighted_kl(clean_BK: Tensor, adv_BK: Tensor, y_B: Tensor) -> Tensor:
    """KL(clean || adversarial) times one minus the clean probability of the true class, gradient through all -> mean
    over the batch."""
    clean_log_BK = clean_BK.log_softmax(-1)
    true_B = clean_log_BK.gather(1, y_B[:, None])[:, 0].exp()
    return (losses.kl_per_image(clean_log_BK, adv_BK.log_softmax(-1)) * (1 - true_B)).mean()


class Mart(Hook):
    """The two terms; beside distillation the first one has the weight that labels have, 1 - kd_weight."""

    name = "mart"
    repeats = True

    def __init__(self, peer: Peer) -> None:
        super().__init__(peer)
        self.settings: MartConfig = peer.spec.methods["mart"]  # type: ignore[assignment]

    def couples(self, row: PeerGraph) -> Sequence[View]:
        return () if row.me.frozen else (row.mine[0], *(view for view in row.learned if view.maker < 0))

    def loss(self, row: PeerGraph, logits: Views, y_B: Tensor, count: Tensor | None) -> Tensor:
        own, clean = self.couples(row)
        # While the peer warms up, `row.weights` has no teachers, and their weight is on the labels.
        weight = 1 - row.weights.kd_weight + (self.peer.spec.loss.kd_clean or 0.0) - row.weights.kd_clean
        boosted = weight * boosted_cross_entropy(logits[own], y_B)
        return boosted + self.settings.beta * weighted_kl(logits[clean], logits[own], y_B)


register_method(Method(
    "mart", "boosted cross-entropy and a KL on images that are wrong when clean (MART)", section=MartConfig, hook=Mart,
    pairs=True, one_label=(lambda peer: "mart" in peer.methods, "loss.preset", "another preset"),
    presets={"mart": Preset(
        ({"hard_weight": 0.0},), ({"loss": "ce", "start": "gaussian"},), ({"mart": {}},))}))  # start: its code
