"""Attacks that start from the image's perturbation of the epoch before (ATTA; Zheng et al., "Efficient adversarial
training with transferable adversarial examples", CVPR 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import Field

from mat_dist.config.fields import Integer, Section
from mat_dist.config.methods import Method, register_method
from mat_dist.config.rules import entries
from mat_dist.config.schema import Config, PeerConfig
from mat_dist.errors import ConfigError
from mat_dist.methods import PerturbationHook, perturbation_buffer

if TYPE_CHECKING:
    from torch import Tensor

    from mat_dist.attacks.norms import Region
    from mat_dist.attacks.training_attack import Found
    from mat_dist.core.peer import Peer
    from mat_dist.core.step import Batch
    from mat_dist.data.augment import AugmentedView


class WarmStartConfig(Section):
    """Start from the perturbation of the epoch before; kept in memory, 2 bytes a value."""

    reset_epochs: Integer = Field(0, ge=0, description="forget all perturbations every so many epochs (ATTA: 10); 0: "
                                                       "never")


class WarmStart(PerturbationHook):
    """Remembers the perturbation of every training image."""

    name = "warm_start"

    def __init__(self, peer: Peer) -> None:
        super().__init__(peer)
        self.buffer = perturbation_buffer.PerturbationBuffer(next(peer.model.parameters()).device)

    def begin(self, step: int, shown: Callable[[int], AugmentedView] | None) -> None:
        settings: WarmStartConfig = self.peer.spec.methods["warm_start"]  # type: ignore[assignment]
        if shown is not None:
            every = settings.reset_epochs * self.peer.steps_per_epoch
            self.buffer.begin(shown(step), self.peer.rows.start, forget=every > 0 and step % every == 0)

    def start(self, start_BCHW: Tensor, region: Region, first_row: int) -> Tensor:
        known = self.buffer.at(first_row, start_BCHW)
        return start_BCHW if known is None else known.start(start_BCHW, region)

    def attacked(self, part: Batch, threat: int, found: Found) -> None:
        self.buffer.propose(part.first_row, found.adv_BCHW - part.x_BCHW)


def kept_bytes(config: Config, spec: PeerConfig, images: int, shape: tuple[int, ...]) -> int:
    """What the perturbations of `images` training images of `shape` (C, H, W) take in one peer."""
    channels, height, width = shape
    pad = 2 * config.data.augment.pad
    return images * channels * (height + pad) * (width + pad) * perturbation_buffer.STORED.itemsize


def perturbations_can_be_kept(config: Config) -> list[ConfigError]:
    """A perturbation is kept per real image and threat, in a frame that crops by padding and mirroring can be undone
    in."""
    augment, found = config.data.augment, []
    lost = [f"data.augment.{name}" for name, on in (
        ("random_resized_crop", augment.random_resized_crop), ("idbh", augment.idbh != "off"),
        ("cutmix", augment.cutmix)) if on]
    lost += ["data.generated"] * bool(config.data.generated)
    for key, peer in entries(config):
        if "warm_start" not in peer.methods:
            continue
        where = f"{key}.methods.warm_start"
        if peer.attack.method not in ("pgd", "apgd") or peer.union.strategy is not None:
            found.append(ConfigError(f"perturbations are kept for one threat and start PGD or APGD, and the peer has "
                                     f"attack.method {peer.attack.method} and union.strategy {peer.union.strategy}",
                                     where, "leave methods.warm_start out"))
        if lost:
            found.append(ConfigError(f"a perturbation cannot be carried through {lost[0]}", where,
                                     f"switch {', '.join(lost)} off (pad and flip can stay)"))
    return found


register_method(Method(
    "warm_start", "attacks that start from the perturbation of the epoch before (ATTA)", section=WarmStartConfig,
    hook=WarmStart, kept_bytes=kept_bytes,
    rules=((perturbations_can_be_kept, frozenset({"methods", "attack", "union", "data"})),)))
