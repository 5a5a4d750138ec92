"""Stochastic weight averaging (SWA; Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
Generalization", UAI 2018): an even average of the weights at the ends of the later epochs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mat_dist.config.fields import Number, Section
from mat_dist.config.methods import Method, register_method
from mat_dist.core.hooks import Hook
from mat_dist.methods import rng, torch

if TYPE_CHECKING:
    from torch import Tensor

NORM_IMAGES = 10_000  # training images behind the statistics: a fifth of CIFAR; fewer where an epoch has fewer


class SwaConfig(Section):
    """Even average of the weights at the end of each epoch, in place of optim.ema_decay."""

    start: Number = Field(0.5, ge=0, lt=1, description="share of the training from which on the weights are averaged")


def averaged_epochs(done: int, start: float, *, total_steps: int, steps_per_epoch: int) -> int:
    """How many epochs' ends have passed after `done` steps since an average began at a share of the training."""
    first = max(1, math.ceil(start * total_steps / steps_per_epoch - 1e-9))  # 0.55 * 100 is a little above 55
    return max(0, done // steps_per_epoch - first + 1)


class WeightAverage(Hook):
    """Says how the averaged weights follow, and renews their batch-norm statistics before they are stored."""

    name = "swa"
    repeats = True
    averages = True
    ends: int | None = 0  # of epochs whose weights are averaged; None after a checkpoint of 0.1, which did not store it

    def passed(self, done: int) -> int:
        """How many ends of epochs are to be averaged after `done` steps of a training that was never longer or shorter,
        and left no step out."""
        settings: SwaConfig = self.peer.spec.methods["swa"]  # type: ignore[assignment]
        return averaged_epochs(done, settings.start, total_steps=self.peer.total_steps,
                               steps_per_epoch=self.peer.steps_per_epoch)

    def averaged(self, done: int) -> int:
        """How many epochs' weights are averaged after `done` steps."""
        self.ends = self.passed(done) if self.ends is None else self.ends
        return self.ends

    def kept_share(self, step: int) -> float:
        """0 before there is an average, so that the averaged weights are the weights themselves; then 1 - 1/n at the
        end of the n-th epoch of it, and 1 within epochs. One that has begun goes on, whatever the length becomes."""
        count, due = self.averaged(step), self.passed(step + 1)
        if (step + 1) % self.peer.steps_per_epoch or not (count or due):
            return 1.0 if count else 0.0
        self.ends = count + 1
        return 1 - 1 / self.ends

    def before_save(self, done: int, batches: Iterator[Tensor]) -> None:
        """The averaged weights never saw the activations that the averaged statistics belong to (section 3.2), so one
        pass over the first `NORM_IMAGES` training images in the order of the first epoch, augmented as there and clean
        (Chen et al., ICLR 2021, do so), sets them to the mean over its batches. Each rank passes whole batches through
        each of its peers alone: the result is a function of the weights and the run's seed, whatever the placement."""
        peer = self.peer
        if peer.ema is None or not self.averaged(done):
            return
        few = itertools.islice(batches, -(-NORM_IMAGES // peer.batch_size))
        model = peer.fresh_model()
        model.load_state_dict(peer.ema)
        with rng.keyed_rng(peer.stream("swa-norms")), peer.precision():
            torch.optim.swa_utils.update_bn(map(peer.arrange, few), model)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in peer.ema:
                    peer.ema[name].copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.ends}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ends = state.get("epochs")


register_method(Method("swa", "even average of the weights of later epochs (SWA)", section=SwaConfig,
                       hook=WeightAverage))
