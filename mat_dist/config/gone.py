"""Settings of version 0.1: those that have another name now, and those that went.

An old name is understood wherever settings are given. A run of version 0.1 wrote all of its settings into its
`config.yaml`: values that did the same as no setting are passed over there.
"""

from __future__ import annotations

from typing import Any

VERSION = "0.2"  # the one in which they went
_OLD = "or train with version 0.1 of mat_dist"

MOVED = {
    "loss.trades_beta": "loss.pair_kl", "loss.pair_weight": "loss.pair_mse",
    "union.ramp_weight": "methods.ramp.weight", "union.projection_beta": "methods.ramp.projection",
    "optim.momentum": "optim.args.momentum", "optim.nesterov": "optim.args.nesterov",
    "optim.decay_norm_bias": "optim.args.decay_norm_bias", "optim.awp_gamma": "methods.awp.gamma",
    "optim.swa_start": "methods.swa.start", "step.microbatches": "train.accumulate",
}
# What to do without them.
WENT = {
    "loss.attackers": f"every peer learns from the AEs of all others: leave it out, {_OLD}",
    "loss.gate": f"teachers are not weighed by confidence: leave it out or use loss.kd_where, {_OLD}",
    "loss.teacher_agg": f"distillation is the mean of the divergences: leave it out, {_OLD}",
    "loss.t2_scale": f"distillation counts T squared times: leave it out, {_OLD}",
    "loss.base_scale": f"scale the weights of the loss themselves, {_OLD}",
    "loss.trades_temperature": f"loss.temperature holds for loss.pair_kl too: leave it out, {_OLD}",
    "loss.hard_loss": f"use loss.preset: mart, {_OLD}",
    "loss.mart_beta": f"use loss.preset: mart, whose weight is methods.mart.beta, {_OLD}",
    "attack.split_batch": f"every peer attacks the whole batch: leave it out, {_OLD}",
    "attack.l1_share": f"the norm says how many values a step moves: leave it out, {_OLD}",
    "attack.reset_epochs": "use methods.warm_start.reset_epochs, which starts from earlier perturbations too",
    "attack.eps_warmup_epochs": f"attacks have their whole radius: leave it out, {_OLD}",
    "attack.steps_warmup_epochs": f"attacks have all their steps from the start: leave it out, {_OLD}",
    "optim.gamma": f"piecewise divides the rate by 10: leave it out, {_OLD}",
    "optim.awp_warmup_epochs": f"weights are perturbed from the start: leave it out, {_OLD}",
    "step.opinions": f"every peer's logits travel: leave it out, {_OLD}",
    "step.bn": f"batch statistics are per source of AEs: leave it out, {_OLD}",
    "step.channels_last": f"images lie channels last: leave it out, {_OLD}",
    "step.attack_copy": "attacks run on a copy that is checked: leave it out",
    "step.attack_engine": "use step.engine",
    "step.pull": f"weights of peers are not pulled together: leave it out, {_OLD}",
    "step.pull_every": "leave it out together with step.pull",
    "peers.N.init_stream": "use stream, which keys the initial weights too",
    "eval.test": "use eval.test_steps, 0 for no test",
    "eval.restarts": "attacks start once; python -m mat_dist.evaluate takes restarts=",
    "eval.step_size": "steps are 2.5 eps / steps long; python -m mat_dist.evaluate takes step_size=",
    "checkpoint.background": "checkpoints are always written while training goes on: leave it out",
    "log.tensorboard": "use log.trackers: tensorboard",
    "log.wandb": "use log.trackers: wandb:PROJECT",
    "data.augment.cutout": f"use data.augment.idbh, which erases too, or leave it out, {_OLD}",
    "data.poison": "write a data set in a plug-in: docs/examples/poisoned_data.py",
}
# Values with which a run of version 0.1 did the same as a run of this one without the setting, beside null.
_UNUSED: dict[str, tuple[Any, ...]] = {
    "loss.attackers": ("all",), "loss.gate": (0,), "loss.teacher_agg": ("mean_kl",), "loss.t2_scale": (True,),
    "loss.base_scale": (1,), "loss.trades_temperature": (1,), "loss.hard_loss": ("ce",), "loss.mart_beta": (0,),
    "attack.split_batch": (False,),
    "attack.l1_share": (0.01, 0.05), "attack.reset_epochs": (0,), "attack.eps_warmup_epochs": (0,),
    "attack.steps_warmup_epochs": (0,), "optim.momentum": (0.9,), "optim.nesterov": (False,),
    "optim.decay_norm_bias": (True,), "optim.gamma": (0.1,), "optim.awp_gamma": (0,), "optim.awp_warmup_epochs": (0,),
    "union.ramp_weight": (5,), "union.projection_beta": (0,), "step.opinions": ("all",), "step.bn": ("separate",),
    "step.channels_last": (True,), "step.pull": (0,), "eval.restarts": (1,), "data.augment.cutout": (0,),
}
# Settings that changed no weights of a run.
_HARMLESS = ("step.attack_copy", "step.attack_engine", "step.pull_every", "eval.test", "checkpoint.background",
             "log.tensorboard", "log.wandb")
# Values that went, of settings that stayed.
_VALUES = {"attack.start": "previous", "step.on_nonfinite": "quarantine", "eval.ensemble": "weights"}


def unused(key: str, value: Any) -> bool:
    """Whether a run of version 0.1 with this setting did what one without it does here."""
    return key in _HARMLESS or (key in {**MOVED, **WENT} and (value is None or value in _UNUSED.get(key, ())))


def lost(key: str, value: Any) -> bool:
    """Whether this version cannot do what a run of version 0.1 with this setting did."""
    return (key in WENT and not unused(key, value)) or (key in _VALUES and value == _VALUES[key])
