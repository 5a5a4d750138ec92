"""The attack of training: PGD or APGD on a copy of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mat_dist.attacks.apgd import APGD_SHARE, apgd
from mat_dist.attacks.attack_copy import AttackCopy
from mat_dist.attacks.compiled import compiled
from mat_dist.attacks.memory import release
from mat_dist.attacks.norms import Region, Threat
from mat_dist.attacks.pgd import Model, n_fgsm, pgd
from mat_dist.config.presets import step_size
from mat_dist.config.schema import AttackConfig, StepConfig
from mat_dist.models.modes import frozen
from mat_dist.rng import Key

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
GAIN = 1024.0


class Found(NamedTuple):
    """AEs (B, C, H, W) in [0, 1], detached, and, where it is asked for, whether each image was classified correctly at
    every point of its attack, the start and the result included (bool (B,))."""

    adv_BCHW: Tensor
    held_B: Tensor | None = None


class Plan(NamedTuple):
    """One batch's attack."""

    threat: int  # its position
    stream: Key  # of the start noise
    first_row: int  # row of the global batch at which the batch starts
    # (first point, by the settings; its region; row of the global batch) -> the point to begin at; one after another
    starts: Sequence[Callable[[Tensor, Region, int], Tensor]] = ()
    guide_BK: Tensor | None = None  # a teacher's logits of the clean images, where the loss needs them


class TrainingAttack:
    """How one peer makes AEs in training.

    Args:
        model: the peer's live model; an attack leaves it as it was.
        threats: what to attack with; the first is the peer's own, to which the step length belongs.
        tell: gets one line where memory runs out, or a copy cannot be used.

    Attributes:
        captured: the attack is being recorded, which allows no look at a value: the copy is not compared, and errors
            are the caller's.
        counts: also tell which images held.
        copies: no copy of the model was found to be wrong.
        sizes: length of a (first) step for each threat.
    """

    def __init__(self, model: nn.Module, threats: Sequence[Threat], settings: AttackConfig, step: StepConfig,
                 tell: Callable[[str], None]) -> None:
        self._model, self.threats, self.settings, self._step, self._tell = model, threats, settings, step, tell
        self._copy: AttackCopy | None = None  # made by the first attack, which knows the images
        self._called: Model | None = None  # what attacks call; None before the first one
        self.captured = False
        self._halves = False  # the attack ran out of memory once
        self.counts, self.copies = False, True
        self.sizes = [settings.step_size or 0.0] + [
            step_size(settings.method, settings.steps, one.norm, one.eps) for one in threats[1:]]

    def __call__(self, x_BCHW: Tensor, y_B: Tensor, plan: Plan) -> Found:
        """AEs of a clean batch in the layout of the run. Raises torch.OutOfMemoryError if not even halves fit."""
        return self.fitting(lambda rows: self._found(x_BCHW[rows], y_B[rows], plan._replace(
            first_row=plan.first_row + rows.start, guide_BK=None if plan.guide_BK is None else plan.guide_BK[rows])),
            len(x_BCHW))

    def check_soon(self) -> None:
        """Let the next attack compare its copy with the model."""
        if self._copy is not None:
            self._copy.refreshed = 0

    def region(self, x_BCHW: Tensor, threat: int = 0) -> Region:
        """The feasible set of a batch for a threat."""
        share = APGD_SHARE if self.settings.method == "apgd" else None
        return self.threats[threat].region(x_BCHW, share)

    @contextmanager
    def ready(self, x_BCHW: Tensor) -> Iterator[Model]:
        """What an attack calls: the model's copy, up to date; the model is frozen in eval mode meanwhile.

        Train-mode BN would absorb one attack forward per step, and weakens the attack (CE 2.77 against 3.17 on a
        small CNN). No cache of cast weights: frozen ones do not change, and a CUDA graph may not hold it.
        """
        with frozen(self._model), autocast(self._step.precision, x_BCHW.device, cache=False):
            if self._called is None:
                self._prepare(x_BCHW)
            if self._copy is not None:
                self._copy.refresh(None if self.captured else x_BCHW[:2])
                if self._copy.reason:
                    self._tell(f"attacked without folding and casting its weights once: {self._copy.reason}")
                    self._copy, self._called, self.copies = None, self._compiled(self._model), False
            assert self._called is not None
            yield amplified(self._called, self._step.precision)

    def fitting(self, make: Callable[[slice], Found], rows: int) -> Found:
        """`make` for all rows; a batch that does not fit into memory is attacked in halves, from then on.

        No image's AE depends on the others (the loss is a sum, BN in eval mode), so halves give the same AEs but for
        rounding.
        """
        if not self._halves:
            try:
                return make(slice(0, rows))
            except torch.OutOfMemoryError as error:
                if rows < 2 or self.captured:
                    raise
                self._halves = True
                self._tell("memory ran out in the attack: batches are attacked in halves from now on; more "
                           "train.accumulate avoid this")
                release(error)
        one, two = make(slice(0, rows // 2)), make(slice(rows // 2, rows))
        held_B = None if one.held_B is None or two.held_B is None else torch.cat([one.held_B, two.held_B])
        return Found(torch.cat([one.adv_BCHW, two.adv_BCHW]), held_B)

    # ---------------------------------------------------------------- inside

    def _found(self, x_BCHW: Tensor, y_B: Tensor, plan: Plan) -> Found:
        chosen, settings = self.threats[plan.threat], self.settings
        assert settings.start is not None and settings.loss is not None
        if settings.method == "n_fgsm":
            with self.ready(x_BCHW) as model:
                return Found(n_fgsm(model, x_BCHW, y_B, eps=chosen.eps, step_size=self.sizes[plan.threat],
                                    loss=settings.loss, stream=plan.stream, first_row=plan.first_row,
                                    teacher_BK=plan.guide_BK))
        region = self.region(x_BCHW, plan.threat)
        start = region.start(settings.start, stream=plan.stream, first_row=plan.first_row)
        for moved in plan.starts:
            start = moved(start, region, plan.first_row)
        with self.ready(x_BCHW) as model:
            return Found(*self._attack(model, x_BCHW, y_B, start, plan, region))

    def _attack(self, model: Model, x_BCHW: Tensor, y_B: Tensor, start_BCHW: Tensor, plan: Plan,
                region: Region) -> tuple[Tensor, ...]:
        settings, size = self.settings, self.sizes[plan.threat]
        assert settings.loss is not None
        if settings.method == "apgd":
            best = apgd(model, x_BCHW, y_B, region=region, start_BCHW=start_BCHW, loss=settings.loss,
                        steps=settings.steps, step_size=size, teacher_BK=plan.guide_BK)
            return (best.best_BCHW, best.held_B) if self.counts else (best.best_BCHW,)
        right: list[Tensor] | None = [] if self.counts else None
        adv = pgd(model, x_BCHW, y_B, region=region, start_BCHW=start_BCHW, loss=settings.loss,
                  steps=settings.steps, step_size=size, teacher_BK=plan.guide_BK, right=right)
        return (adv, torch.stack(right).all(0)) if right else (adv,)

    def _prepare(self, x_BCHW: Tensor) -> None:
        """Make the copy; the images tell shape and device."""
        self._copy = AttackCopy(self._model, x_BCHW[:2], HALVES.get(self._step.precision))
        self._called = self._compiled(self._copy)

    def _compiled(self, model: Model) -> Model:
        return compiled(model, self._tell) if self._step.engine == "compile" else model


def autocast(precision: str, device: torch.device, *, cache: bool = True) -> AbstractContextManager[Any]:
    """The scope in which models of this precision are called: torch's autocast with bf16 and fp16."""
    if precision not in HALVES:
        return nullcontext()
    return torch.autocast(device.type, dtype=HALVES[precision], cache_enabled=cache)


def amplified(model: Model, precision: str) -> Model:
    """In fp16 a model whose gradients are `GAIN` times as long, so that it has a number for them; for steps along a
    direction."""
    def call(x_BCHW: Tensor) -> Tensor:
        logits_BK = model(x_BCHW)
        if logits_BK.requires_grad:
            logits_BK.register_hook(lambda grad_BK: grad_BK * GAIN)
        return logits_BK

    return call if precision == "fp16" else model
