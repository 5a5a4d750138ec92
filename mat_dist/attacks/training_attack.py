"""The attack of training: PGD or APGD on a copy of the weights, run eagerly, compiled, or as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist.attacks.apgd import apgd
from mat_dist.attacks.attack_copy import AttackCopy
from mat_dist.attacks.fgsm import n_fgsm
from mat_dist.attacks.graphed import GraphedAttack
from mat_dist.attacks.norms import Region, Threat
from mat_dist.attacks.pgd import Model, pgd
from mat_dist.config.presets import step_size
from mat_dist.config.schema import AttackConfig, StepConfig
from mat_dist.methods.unions import msd
from mat_dist.methods.warm_start import Prior
from mat_dist.models.modes import frozen

# (clean images, labels, start) -> AEs and, where they are counted, the images that held at every point of the attack
Engine = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


class TrainingAttack:
    """How one peer makes AEs in training.

    Args:
        model: the peer's live model; an attack leaves it as it was.
        threats: what to attack with; the first is the peer's own, to which the step length belongs.
        settings: complete settings.
        step: precision, copy and engine.
        tell: gets one line where a copy or an engine cannot be used.
        counts: also tell which images held.

    Attributes:
        held_B: whether each image of the newest batch was classified correctly at every point of its attack, the start
            and the result included (bool); None where that is not counted.
    """

    def __init__(self, model: nn.Module, threats: Sequence[Threat], settings: AttackConfig, step: StepConfig,
                 tell: Callable[[str], None], *, counts: bool = False) -> None:
        self._model, self._threats, self._settings, self._step, self._tell = model, threats, settings, step, tell
        self._copy: AttackCopy | None = None  # made by the first attack, which knows the images
        self._called: Model = model
        self._counts = counts
        self.held_B: Tensor | None = None
        self._engines: list[Engine] = []  # one per threat
        self._sizes = [settings.step_size or 0.0] + [
            step_size(settings.method, settings.steps, one.norm, one.eps) for one in threats[1:]]

    def __call__(self, x_BCHW: Tensor, y_B: Tensor, *, stream: int, first_row: int, threat: int = 0,
                 teacher_BK: Tensor | None = None, scale: float = 1.0, steps: int | None = None,
                 prior: Prior | None = None) -> Tensor:
        """AEs of a clean batch -> (B, C, H, W) in [0, 1].

        Args:
            x_BCHW: in the layout of the run.
            stream: key of the start noise.
            first_row: row of the global batch at which x_BCHW starts.
            threat: position of the threat.
            teacher_BK: logits of a teacher on x_BCHW, for the loss `kl_teacher`; such an attack runs eagerly.
            scale: of radius and steps, in (0, 1]; below 1 the attack runs eagerly.
            steps: number of steps, where it is not yet that of the settings; such an attack runs eagerly.
            prior: perturbations to start from, where there are some.
        """
        chosen = self._threats[threat].scaled(scale)
        settings = self._settings
        assert settings.start is not None and settings.loss is not None
        if settings.method == "n_fgsm":
            with self._ready(x_BCHW):
                return n_fgsm(self._called, x_BCHW, y_B, eps=chosen.eps, step_size=scale * self._sizes[threat],
                              loss=settings.loss, stream=stream, first_row=first_row)
        region = chosen.region(x_BCHW, settings.l1_share)
        kind = "uniform" if settings.start == "previous" else settings.start
        start = chosen.start(kind, region, x_BCHW, stream=stream, first_row=first_row)
        if prior is not None:
            start = prior.start(start, region)
        with self._ready(x_BCHW):
            if self._step.attack_engine == "eager" or teacher_BK is not None or scale < 1 or steps is not None:
                return self._keep(*self._attack(x_BCHW, y_B, start, threat, region, teacher_BK, scale, steps))
            try:
                return self._keep(*self._engines[threat](x_BCHW, y_B, start))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers raise anything; eager calls raise it again if it is the model's
                self._fall_back(f"{type(error).__name__}: {error}".splitlines()[0])
                return self._keep(*self._attack(x_BCHW, y_B, start, threat))

    def steepest(self, x_BCHW: Tensor, y_B: Tensor, *, stream: int, first_row: int, scale: float = 1.0,
                 steps: int | None = None) -> Tensor:
        """AEs of the steepest of all threats in each step (MSD), from a start for the first threat; runs eagerly."""
        settings = self._settings
        assert settings.start is not None and settings.loss is not None
        threats = [threat.scaled(scale) for threat in self._threats]
        regions = [threat.region(x_BCHW, settings.l1_share) for threat in threats]
        start = threats[0].start(settings.start, regions[0], x_BCHW, stream=stream, first_row=first_row)
        with self._ready(x_BCHW):
            return msd(self._called, x_BCHW, y_B, regions=regions, step_sizes=[scale * size for size in self._sizes],
                       start_BCHW=start, loss=settings.loss, steps=steps or settings.steps, stream=stream)

    # ---------------------------------------------------------------- inside

    @contextmanager
    def _ready(self, x_BCHW: Tensor) -> Iterator[None]:
        """The model frozen in eval mode, its copy up to date.

        Train-mode BN would absorb one attack forward per step, and weakens the attack (CE 2.77 against 3.17 on a
        small CNN). No cache of cast weights: frozen ones do not change, and a CUDA graph may not hold it.
        """
        with frozen(self._model), autocast(self._step.precision, x_BCHW.device, cache=False):
            if not self._engines:
                self._prepare(x_BCHW)
            if self._copy is not None:
                self._copy.refresh()
            yield

    def _keep(self, found_BCHW: Tensor, held_B: Tensor | None = None) -> Tensor:
        self.held_B = held_B
        return found_BCHW

    def _attack(self, x_BCHW: Tensor, y_B: Tensor, start_BCHW: Tensor, threat: int, region: Region | None = None,
                teacher_BK: Tensor | None = None, scale: float = 1.0,
                steps: int | None = None) -> tuple[Tensor, ...]:
        """What an engine gives; a graph, whose images change in place, leaves the region to be formed inside."""
        settings = self._settings
        assert settings.loss is not None
        region, size = region or self._threats[threat].region(x_BCHW, settings.l1_share), scale * self._sizes[threat]
        if settings.method == "apgd":
            found = apgd(self._called, x_BCHW, y_B, region=region, start_BCHW=start_BCHW, loss=settings.loss,
                         steps=steps or settings.steps, step_size=size, teacher_BK=teacher_BK)
            return (found.best_BCHW, found.held_B) if self._counts else (found.best_BCHW,)
        right: list[Tensor] | None = [] if self._counts else None
        adv = pgd(self._called, x_BCHW, y_B, region=region, start_BCHW=start_BCHW, loss=settings.loss,
                  steps=steps or settings.steps, step_size=size, teacher_BK=teacher_BK, right=right)
        return (adv, torch.stack(right).all(0)) if right else (adv,)

    def _eager(self) -> list[Engine]:
        return [partial(self._attack, threat=number) for number in range(len(self._threats))]

    def _prepare(self, x_BCHW: Tensor) -> None:
        """Make the copy and the engine; the images tell shape and device."""
        step = self._step
        if step.attack_copy:
            self._copy = AttackCopy(self._model, x_BCHW[:2], torch.bfloat16 if step.precision == "bf16" else None)
            self._called = self._copy
            if self._copy.reason:
                self._tell(f"attacked without folding and casting its weights once: {self._copy.reason}; "
                           "step.attack_copy=false silences this")
        self._engines = self._eager()
        if step.attack_engine == "compile":
            self._called = torch.compile(self._called, dynamic=False)
        elif step.attack_engine == "cuda_graph" and not x_BCHW.is_cuda:
            self._fall_back("a CUDA graph needs a GPU")
        elif step.attack_engine == "cuda_graph":
            self._engines = [GraphedAttack(engine) for engine in self._eager()]

    def _fall_back(self, why: str) -> None:
        self._tell(f"step.attack_engine={self._step.attack_engine} cannot run, attacks go on eagerly: {why}")
        self._engines = self._eager()
        self._called = self._copy if self._copy is not None else self._model


def autocast(precision: str, device: torch.device, *, cache: bool = True) -> AbstractContextManager[Any]:
    """The scope in which models of this precision are called: torch's autocast with bf16."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=cache)
