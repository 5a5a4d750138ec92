"""Learning rate, averaging decay and attack steps as pure functions of the step: a resumed run needs no state."""

from __future__ import annotations

import math

from mat_dist.config.schema import OptimConfig

ONECYCLE_RISE = 0.3  # share of the training before the peak (torch.optim.lr_scheduler.OneCycleLR's default)


def lr_at(step: int, *, total_steps: int, steps_per_epoch: int, optim: OptimConfig) -> float:
    """Learning rate of step `step` (0-based) of `total_steps`.

    constant and piecewise hold the rate (piecewise multiplies it by gamma at each milestone's share of the
    training); cosine falls to 0 along half a cosine (Loshchilov and Hutter, ICLR 2017); onecycle rises linearly
    to the peak and falls linearly to 0 (Smith and Topin, 2018; linear as in fast_adversarial). A warm-up rises
    linearly from lr / warm-up steps; the other schedules then run over the remaining steps.
    """
    warmup = round(optim.warmup_epochs * steps_per_epoch)
    if optim.schedule == "onecycle":
        rise = warmup or max(1, round(ONECYCLE_RISE * total_steps))
        if step < rise:
            return optim.lr * (step + 1) / rise
        return optim.lr * (total_steps - step) / max(1, total_steps - rise)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, total_steps - warmup)
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1 + math.cos(math.pi * share))
    if optim.schedule == "piecewise":
        return optim.lr * optim.gamma ** sum(step / total_steps >= m for m in optim.milestones)
    return optim.lr


def swa_count(done: int, start: float, *, total_steps: int, steps_per_epoch: int) -> int:
    """How many epochs' last weights the even average holds after `done` steps, when it begins at a share of the
    training (Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018)."""
    first = max(1, math.ceil(start * total_steps / steps_per_epoch - 1e-9))  # 0.55 * 100 is a little above 55
    return max(0, done // steps_per_epoch - first + 1)


def swa_decay_at(step: int, start: float, *, total_steps: int, steps_per_epoch: int) -> float:
    """Share of the old average after update number `step` (0-based): 0 before there is one, so that the averaged
    weights are the weights themselves; then 1 - 1/n at the end of the n-th epoch of it, and 1 within epochs."""
    count = swa_count(step + 1, start, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    if count == 0:
        return 0.0
    return 1 - 1 / count if (step + 1) % steps_per_epoch == 0 else 1.0


def ema_decay_at(step: int, decay: float) -> float:
    """Decay of the averaged weights after update number `step` (0-based): min(decay, (1 + t) / (10 + t)).

    The warm-up of TensorFlow's ExponentialMovingAverage, so that a short run does not average its random start.
    """
    return min(decay, (1 + step) / (10 + step))


def attack_steps_at(step: int, steps: int, growing: int) -> int:
    """Gradient steps of the attack at training step `step` (0-based): they grow evenly from 1 to `steps` over the first
    `growing` training steps (curriculum adversarial training; Cai, Liu and Song, IJCAI 2018)."""
    return steps if step >= growing else -(-steps * (step + 1) // growing)
