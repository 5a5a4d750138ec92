"""Free adversarial training (Free-AT; Shafahi et al., NeurIPS 2019): each batch is used several times, and each time
the gradient of learning also moves the AEs, which cost no passes of their own."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING

from mat_dist.config.methods import Method, register_method
from mat_dist.config.rules import entries
from mat_dist.config.schema import Config
from mat_dist.core.hooks import Views
from mat_dist.errors import ConfigError
from mat_dist.methods import PerturbationHook, augment, perturbation_buffer, torch

if TYPE_CHECKING:
    from torch import Tensor

    from mat_dist.attacks.training_attack import TrainingAttack
    from mat_dist.core.peer import Peer
    from mat_dist.core.step import Batch


class FreePerturbation(PerturbationHook):
    """A perturbation for each row of the batch, kept as it is from step to step."""

    name = "free_at"

    def __init__(self, peer: Peer) -> None:
        super().__init__(peer)
        self.device = next(peer.model.parameters()).device
        self.buffer = perturbation_buffer.PerturbationBuffer(self.device, dtype=None)

    def begin(self, step: int, shown_at: Callable[[int], augment.AugmentedView] | None) -> None:
        rows = torch.arange(self.peer.rows.start, self.peer.rows.stop, device=self.device)
        self.buffer.begin(augment.AugmentedView.plain(rows, self.peer.batch_size), self.peer.rows.start, forget=False)

    def craft(self, attack: TrainingAttack, part: Batch, guide_BK: Tensor | None) -> Tensor | None:
        known = self.buffer.at(part.first_row, part.x_BCHW)
        return part.x_BCHW if known is None else known.start(part.x_BCHW, attack.region(part.x_BCHW))

    def inputs(self, views: Views) -> Views:
        """The own AEs as a leaf, whose gradient `after_backward` reads."""
        own = self.peer.row.mine[0]
        return {**views, own: views[own].detach().requires_grad_()}

    def after_backward(self, part: Batch, views: Views) -> None:
        """One step up the gradient that learning gave: there the next AEs begin."""
        own, attack = views[self.peer.row.mine[0]], self.peer.attack_of_training
        if own.grad is None:
            return
        assert attack.settings.step_size is not None
        region = attack.region(part.x_BCHW)
        moved = region.step(own.detach(), own.grad, attack.settings.step_size)
        self.buffer.propose(part.first_row, region.inside(moved) - part.x_BCHW)


def free_attacks_fit(config: Config) -> list[ConfigError]:
    """It steps along the image gradient of learning: the peer has to learn hard labels on its own AEs, and all peers
    see a batch equally often."""
    found, free = [], [peer.attack.method == "free" for peer in config.peers]
    if any(free) != (config.train.replays > 1):
        found.append(ConfigError(
            f"train.replays {config.train.replays} with attack.method {config.peers[0].attack.method}",
            "train.replays", "write 8 (Free-AT on CIFAR-10) with attack.method: free, and 1 with others"))
    for (key, peer), one in zip(entries(config), free, strict=True) if any(free) else ():
        labels = bool(peer.loss.hard_weight and peer.loss.hard_own)
        for bad, what, where, how in (
                (not one, f"attack.method {peer.attack.method}", "attack.method", "attack.method: free for all peers"),
                (peer.attack.steps != 1, f"attack.steps {peer.attack.steps}", "attack.steps", "attack.steps: 1"),
                (peer.attack.start != "zero", f"attack.start {peer.attack.start}", "attack.start", "start: zero"),
                (peer.attack.loss != "ce", f"attack.loss {peer.attack.loss}", "attack.loss", "attack.loss: ce"),
                (peer.union.strategy is not None, f"union.strategy {peer.union.strategy}", "union.strategy",
                 "attack.method: pgd"),
                (peer.frozen, "a peer that does not learn", "frozen", "frozen: false"),
                (not labels, f"preset {peer.loss.preset}, which has no hard labels on own AEs", "loss.preset",
                 "loss.preset: at")):
            if bad and (one or where == "attack.method"):
                found.append(ConfigError(f"attack.method free beside {what}", f"{key}.{where}", f"write {how}"))
    return found


register_method(Method(
    "free_at", "batches that are used several times, whose AEs cost nothing (Free-AT)",
    attack_methods={"free": "one step a replay along the image gradient that learning gives"},
    attack_defaults={"free": {"loss": "ce", "start": "zero"}}, hook=FreePerturbation,
    attack_passes=lambda spec, steps: (Fraction(0), Fraction(0)),
    when=lambda spec: spec.attack.method == "free",
    rules=((free_attacks_fit, frozenset({"attack", "union", "peers", "loss", "train"})),)))
