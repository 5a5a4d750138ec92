"""Which AEs a peer makes in training: of which threat, and what happens when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist.attacks.union import EatChoice, random_norm
from mat_dist.config.schema import PeerConfig, StepConfig
from mat_dist.crafting import TrainingAttack
from mat_dist.plan import Member

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
        self._growing_epochs, self.steps_per_epoch = spec.attack.eps_warmup_epochs, 1
        self._halves = False  # the attack ran out of memory once
        # E-AT trains against linf and l1, from which l2 follows.
        self._drawn = tuple(n for n, threat in enumerate(self.threats) if threat.norm != "l2")
        self._eat = EatChoice.of(len(self._drawn)) if self._strategy == "eat" else None
        self.counted = self._nothing()
        self._attack = TrainingAttack(model, self.threats, spec.attack, step,
                                      lambda text: notes.append(f"{name}: {text}"), counts=self._eat is not None)

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
        return self._in_halves(chosen, x_BCHW, y_B, step, first_row, teacher_BK)

    def others(self, x_BCHW: Tensor, y_B: Tensor, step: int, first_row: int) -> list[Tensor]:
        """AEs of a batch against each threat of the union but the first, in order."""
        return [self._in_halves(number, x_BCHW, y_B, step, first_row) for number in range(1, len(self.threats))]

    def craft(self, threat: int, x_BCHW: Tensor, y_B: Tensor, step: int, first_row: int,
              teacher_BK: Tensor | None = None) -> Tensor:
        """AEs of a batch, or a part of one, against one threat of the union by position, or against ALL at once."""
        growing = self._growing_epochs * self.steps_per_epoch
        scale = min(1.0, (step + 1) / growing) if growing else 1.0
        if threat == ALL:
            return self._attack.steepest(x_BCHW, y_B, stream=self._stream("attack", step), first_row=first_row,
                                         scale=scale)
        stream = self._stream("attack", step) if threat == 0 else self._stream("attack", step, threat)
        adv = self._attack(x_BCHW, y_B, stream=stream, first_row=first_row, threat=threat, teacher_BK=teacher_BK,
                           scale=scale)
        if self._attack.held_B is not None:
            self.counted[threat][0] += int(self._attack.held_B.sum())
            self.counted[threat][1] += len(y_B)
        return adv

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
        """Count what the attacks of a committed step have seen."""
        if self._eat is not None:
            for place, threat in enumerate(self._drawn):
                self._eat.update(place, *self.counted[threat])
        self.counted = self._nothing()

    def forget(self) -> None:
        """Drop the counts of a refused step."""
        self.counted = self._nothing()

    def _nothing(self) -> list[list[int]]:
        return [] if self._eat is None else [[0, 0] for _ in self.threats]

    def state(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {} if self._eat is None else {"eat": self._eat.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        if self._eat is not None:
            self._eat.load(state["eat"])


def free_memory() -> None:
    """Give cached blocks back after running out of memory; the failed work must hold no reference any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
