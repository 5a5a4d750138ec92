"""What a method may add to a peer: a hook with a verb for each moment of a step. By default a verb does nothing.

The order in a step, for each micro-batch: `craft`, or else `choose`, `start` and `attacked`; `climb` and, after
replicas have averaged what it gave, `before_forward`; `inputs`, `count` (averaged likewise), `loss`, `after_backward`.
Then, once: `gradients` (averaged with the peer's own), `after_reduce`, `proposed` (gathered from replicas), `commit` or
`abort`. Nothing of torch is imported here: methods are read for `--help` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from mat_dist.attacks.norms import Region
    from mat_dist.attacks.training_attack import Found, TrainingAttack
    from mat_dist.core.graph import PeerGraph, View
    from mat_dist.core.peer import Peer
    from mat_dist.core.step import Batch
    from mat_dist.data.augment import AugmentedView

Views = Mapping["View", "Tensor"]  # the images of each view (B, C, H, W), or a model's logits on them (B, K)


class Hook:
    """A method's part of one peer.

    Args:
        peer: complete but for its hooks.

    Attributes:
        name: of the method; its state is stored under it.
        averages: it says how the averaged weights follow (`kept_share`).
        repeats: from `craft` to `proposed` it asks torch for the same operations on the same tensors in every step for
            which `choose` gives the same, so that a step with it can be captured.
    """

    name = ""
    averages = False
    repeats = False

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    # ---- before the forwards

    def begin(self, step: int, shown: Callable[[int], AugmentedView] | None) -> None:
        """Before each step. `shown`: step -> the images of which this rank's rows of the batch are views, if known."""

    def choose(self, step: int) -> int:
        """Position of the threat that the peer's first view is made for."""
        return 0

    def craft(self, attack: TrainingAttack, part: Batch, guide_BK: Tensor | None) -> Tensor | None:
        """The peer's first view (B, C, H, W), in place of its attack; None: the attack makes it. `guide_BK`:
        log-probabilities of teachers on the clean images, where its attack asks for them."""
        return None

    def start(self, start_BCHW: Tensor, region: Region, first_row: int) -> Tensor:
        """Where the attack on rows of the batch from `first_row` on begins, in the region; as it is by default."""
        return start_BCHW

    def attacked(self, part: Batch, threat: int, found: Found) -> None:
        """The first view is made, for the threat at this position."""

    def climb(self, part: Batch, views: Views) -> Sequence[Tensor]:
        """Tensors that replicas average before `before_forward`; none, or as many on all of them."""
        return ()

    def before_forward(self, averaged: Sequence[Tensor]) -> None:
        """What `climb` gave is averaged, and the peer begins to learn."""

    def inputs(self, views: Views) -> Views:
        """The views as this peer's model gets them."""
        return views

    # ---- the loss

    def couples(self, row: PeerGraph) -> Sequence[View]:
        """The views, of `row.learned`, whose logits `loss` needs together; none where it adds nothing."""
        return ()

    def count(self, row: PeerGraph, logits: Callable[[View], Tensor], y_B: Tensor) -> Tensor | None:
        """A number (scalar) that the loss divides by and that replicas average; `logits` are constants."""
        return None

    def loss(self, row: PeerGraph, logits: Views, y_B: Tensor, count: Tensor | None) -> Tensor:
        """A term of the loss from the logits on `couples` -> scalar."""
        raise AssertionError("a hook that couples views has a loss")

    # ---- after the backward pass

    def after_backward(self, part: Batch, views: Views) -> None:
        """Gradients of a micro-batch are added; `views` are those of `inputs`."""

    def gradients(self) -> Sequence[Tensor]:
        """Gradients of its own, which replicas average with the peer's."""
        return ()

    def after_reduce(self) -> None:
        """All gradients are averaged; they are clipped next."""

    def proposed(self) -> Sequence[Tensor]:
        """Rows (B, ...) of which `commit` gets those of all replicas; as many tensors on each of them."""
        return ()

    def commit(self, step: int, shared: Sequence[Tensor]) -> None:
        """The step is committed, the update follows. `shared`: what was `proposed`, the rows of all replicas."""

    def abort(self) -> None:
        """The step is refused: be as before it."""

    # ---- around training

    def kept_share(self, step: int) -> float:
        """How much of the averaged weights stays at the update of a step, where `averages` is set."""
        return 1.0

    def before_save(self, done: int, batches: Iterator[Tensor]) -> None:
        """A checkpoint after `done` steps follows. `batches`: images of the first epoch's whole batches, in order."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
