"""Which AEs a peer makes in training: of which threat, and what happens when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist.attacks.norms import Region
from mat_dist.attacks.training_attack import TrainingAttack
from mat_dist.config.schema import PeerConfig, StepConfig
from mat_dist.core.member import Member
from mat_dist.core.schedules import attack_steps_at
from mat_dist.data.shown import AugmentedView
from mat_dist.methods.unions import EatChoice, random_norm
from mat_dist.methods.warm_start import Carried

ALL = -1  # all threats of a union at once


class Crafter:
    """A peer's training attack against its threat, or against those of its union.

    Args:
        name: of the peer, for notes.
        spec: its complete settings.
        model: its live model.
        stream: (purpose, indices ...) -> key of one of the peer's random streams.
        notes: gets a line where memory runs out or an engine cannot run.

    Attributes:
        threats: the union's, or the peer's one.
        carried: what is remembered of the images, or (free) of the rows of the batch; None where attacks start afresh.
        free: the attack has no passes of its own, see `climb`.
        steps_per_epoch: for schedules.
        counted: E-AT's counts of the step under way, images that held and images attacked, by threat; replicas sum
            them before `commit`.
    """

    def __init__(self, name: str, spec: PeerConfig, model: nn.Module, step: StepConfig, stream: Callable[..., int],
                 notes: list[str]) -> None:
        member = Member.of(spec)
        self._name, self._stream, self._notes = name, stream, notes
        self._strategy = member.strategy if member.union else None  # else it concerns AEs of other peers
        self.threats = member.union or (member.threat,)
        self._settings, self.steps_per_epoch = spec.attack, 1
        self.free = spec.attack.method == "free"
        self._halves = False  # the attack ran out of memory once
        # E-AT trains against linf and l1, from which l2 follows.
        self._drawn = tuple(n for n, threat in enumerate(self.threats) if threat.norm != "l2")
        self._eat = EatChoice.of(len(self._drawn)) if self._strategy == "eat" else None
        self.counted = self._nothing()
        self.carried = _carried(spec, next(model.parameters()).device)
        self._attack = TrainingAttack(model, self.threats, spec.attack, step,
                                      lambda text: notes.append(f"{name}: {text}"), counts=self._eat is not None)

    def begin(self, step: int, shown: AugmentedView, first_row: int) -> None:
        """Before each step, where perturbations are carried on: what the rows of the batch from `first_row` on show."""
        epochs = self._settings.reset_epochs
        if self.carried is not None:
            self.carried.begin(shown, first_row, forget=epochs > 0 and step % (epochs * self.steps_per_epoch) == 0)

    def __call__(self, x_BCHW: Tensor, y_B: Tensor, step: int, first_row: int,
                 teacher_BK: Tensor | None = None) -> Tensor:
        """AEs of a batch against the peer's threat, or the one that its strategy chooses -> (B, C, H, W)."""
        if self._strategy == "msd":
            return self._in_halves(ALL, x_BCHW, y_B, step, first_row)
        chosen = 0
        if self._strategy == "random":
            chosen = random_norm(len(self.threats), stream=self._stream("norm", step))
        elif self._eat is not None:
            chosen = self._drawn[self._eat.choose(stream=self._stream("eat", step))]
        adv = self._in_halves(chosen, x_BCHW, y_B, step, first_row, teacher_BK)
        if self.carried is not None and not self.free:
            self.carried.propose(first_row, adv - x_BCHW)
        return adv

    def others(self, x_BCHW: Tensor, y_B: Tensor, step: int, first_row: int) -> list[Tensor]:
        """AEs of a batch against each threat of the union but the first, in order."""
        return [self._in_halves(number, x_BCHW, y_B, step, first_row) for number in range(1, len(self.threats))]

    def craft(self, threat: int, x_BCHW: Tensor, y_B: Tensor, step: int, first_row: int,
              teacher_BK: Tensor | None = None) -> Tensor:
        """AEs of a batch, or a part of one, against one threat of the union by position, or against ALL at once."""
        scale, steps = self._scale(step), self._steps(step)
        prior = None if self.carried is None else self.carried.at(first_row, x_BCHW)
        if self.free:
            return x_BCHW if prior is None else prior.start(x_BCHW, self._region(x_BCHW, scale))
        if threat == ALL:
            return self._attack.steepest(x_BCHW, y_B, stream=self._stream("attack", step), first_row=first_row,
                                         scale=scale, steps=steps)
        stream = self._stream("attack", step) if threat == 0 else self._stream("attack", step, threat)
        adv = self._attack(x_BCHW, y_B, stream=stream, first_row=first_row, threat=threat, teacher_BK=teacher_BK,
                           scale=scale, steps=steps, prior=prior)
        if self._attack.held_B is not None:
            self.counted[threat][0] += int(self._attack.held_B.sum())
            self.counted[threat][1] += len(y_B)
        return adv

    def climb(self, adv_BCHW: Tensor, gradient_BCHW: Tensor, x_BCHW: Tensor, step: int, first_row: int) -> None:
        """With attack.method free: one step up the gradient that learning gave; the next AEs begin there."""
        assert self.carried is not None and self._settings.step_size is not None
        scale = self._scale(step)
        region = self._region(x_BCHW, scale)
        moved = region.step(adv_BCHW.detach(), gradient_BCHW, scale * self._settings.step_size)
        self.carried.propose(first_row, region.settle(region.project(moved)) - x_BCHW)

    def _region(self, x_BCHW: Tensor, scale: float) -> Region:
        return self.threats[0].scaled(scale).region(x_BCHW, self._settings.l1_share)

    def _scale(self, step: int) -> float:
        """The share of the radius that an attack has by now."""
        growing = self._settings.eps_warmup_epochs * self.steps_per_epoch
        return min(1.0, (step + 1) / growing) if growing else 1.0

    def _steps(self, step: int) -> int | None:
        """The number of attack steps while it grows; None afterwards."""
        growing = round(self._settings.steps_warmup_epochs * self.steps_per_epoch)
        return attack_steps_at(step, self._settings.steps, growing) if step < growing else None

    def _in_halves(self, threat: int, x_BCHW: Tensor, y_B: Tensor, step: int, first_row: int,
                   teacher_BK: Tensor | None = None) -> Tensor:
        """`craft`; a batch that does not fit into memory is attacked in halves, from then on.

        No image's AE depends on the others (the loss is a sum, BN in eval mode), so halves give the same AEs but for
        rounding. Raises torch.OutOfMemoryError if halves do not fit either.
        """
        if not self._halves:
            try:
                return self.craft(threat, x_BCHW, y_B, step, first_row, teacher_BK)
            except torch.OutOfMemoryError:
                if len(x_BCHW) < 2:
                    raise
                self._halves = True
                self._notes.append(f"warning: memory ran out in the attack of {self._name}: its batches are attacked "
                                   "in halves from now on; more step.microbatches avoid this")
        free_memory()
        half = len(x_BCHW) // 2
        told = (None, None) if teacher_BK is None else (teacher_BK[:half], teacher_BK[half:])
        return torch.cat([self.craft(threat, x_BCHW[:half], y_B[:half], step, first_row, told[0]),
                          self.craft(threat, x_BCHW[half:], y_B[half:], step, first_row + half, told[1])])

    # ---------------------------------------------------------------- what a step leaves behind

    def commit(self) -> None:
        """Keep what the attacks of a committed step have seen and found."""
        if self.carried is not None:
            self.carried.commit()
        if self._eat is not None:
            for place, threat in enumerate(self._drawn):
                self._eat.update(place, *self.counted[threat])
        self.counted = self._nothing()

    def forget(self) -> None:
        """Drop what belongs to a refused step."""
        self.counted = self._nothing()
        if self.carried is not None:
            self.carried.forget()

    def _nothing(self) -> list[list[int]]:
        return [] if self._eat is None else [[0, 0] for _ in self.threats]

    def state(self) -> dict[str, Any]:
        """Plain numbers and tensors, for a checkpoint."""
        eat = {} if self._eat is None else {"eat": self._eat.state()}
        return eat if self.carried is None else {**eat, "carried": self.carried.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        if self._eat is not None:
            self._eat.load(state["eat"])
        if self.carried is not None:
            self.carried.load(state["carried"])


def _carried(spec: PeerConfig, device: torch.device) -> Carried | None:
    """What a peer's attack remembers, if anything; free perturbations are of one batch, and kept as they are."""
    if spec.attack.method == "free":
        return Carried(device, dtype=None)
    return Carried(device) if spec.attack.start == "previous" else None


def free_memory() -> None:
    """Give cached blocks back after running out of memory; the failed work must hold no reference any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
