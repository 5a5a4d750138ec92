"""The mutual loss of one peer: its graph's weights times the terms of `losses`, and of its hooks. Formula:
docs/loss.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mat_dist.config.presets import LossWeights
from mat_dist.config.schema import OptimConfig
from mat_dist.core import losses
from mat_dist.core.graph import CLEAN, PeerGraph, View
from mat_dist.core.hooks import Hook
from mat_dist.errors import ConfigError

Teaching = Callable[[int, View], Tensor]  # (teacher, what it looks at) -> its logits (B, K), constant
Extra = tuple[Hook, Tensor | None]  # a hook with a loss, and what replicas have counted for it


def partial_loss(row: PeerGraph, views: Sequence[View], logits: Mapping[View, Tensor], teaching: Teaching, y_B: Tensor,
                 extras: Sequence[Extra] = ()) -> Tensor:
    """The terms of the loss that belong to `views`, a union of the graph's groups -> scalar.

    Args:
        logits: this peer's logits_BK on each of `views`, with graph.
        y_B: labels.
    """
    total = torch.zeros((), dtype=next(iter(logits.values())).dtype, device=y_B.device)
    for view in views:
        if row.hard.get(view) and view not in row.rivals:
            total = total + row.hard[view] * losses.cross_entropy(logits[view], y_B, row.weights.label_smoothing)
        if teachers := row.teachers(view):
            told = [teaching(i, row.teacher_view(i, view)) for i in teachers]
            total = total + row.distilled[view] * losses.distillation(
                logits[view], told, y_B, kind=row.weights.kd_loss, where=row.weights.kd_where,
                temperature=row.weights.temperature)
    if row.paired and row.mine[0] in views:
        total = total + _paired(row, logits[CLEAN], logits[row.mine[0]])
    if row.rivals and row.rivals[0] in views:
        weight = sum(row.hard[view] for view in row.rivals)
        total = total + weight * losses.worst_cross_entropy([logits[view] for view in row.rivals], y_B,
                                                            row.weights.label_smoothing)
    for hook, count in extras:
        if (coupled := couples(row, hook)) and coupled[0] in views:
            total = total + hook.loss(row, logits, y_B, count)
    return total


def couples(row: PeerGraph, hook: Hook) -> Sequence[View]:
    """The views whose logits a hook needs together. Raises ConfigError for one that the peer does not learn from."""
    views = hook.couples(row) if row.learned else ()
    if strange := sorted(set(views) - set(row.learned)):
        raise ConfigError(f"the loss needs {', '.join(map(str, strange))}, which the peer does not learn from",
                          f"{type(hook).__name__}.couples", "return views of row.learned, or none")
    return views


def own_loss(row: PeerGraph, logits: Mapping[View, Tensor], y_B: Tensor, hooks: Sequence[Hook] = ()) -> Tensor:
    """What the peer would lose if it were alone: hard labels on its own AEs and the clean images, and their pairing.

    Args:
        logits: on the views `row.alone`.
    """
    total = torch.zeros((), dtype=next(iter(logits.values())).dtype, device=y_B.device)
    for view, logits_BK in logits.items():
        if row.hard.get(view):
            total = total + row.hard[view] * losses.cross_entropy(logits_BK, y_B, row.weights.label_smoothing)
    if row.paired:
        total = total + _paired(row, logits[CLEAN], logits[row.mine[0]])
    for hook in hooks:
        if (coupled := hook.couples(row)) and set(coupled) <= set(logits):
            total = total + hook.loss(row, logits, y_B, None)
    return total


def _paired(row: PeerGraph, clean_BK: Tensor, own_BK: Tensor) -> Tensor:
    c = row.weights
    total = torch.zeros((), dtype=own_BK.dtype, device=own_BK.device)
    if c.pair_kl:
        total = total + c.pair_kl * losses.softened_kl(clean_BK, own_BK, c.temperature)
    if c.pair_mse:
        total = total + c.pair_mse * losses.logit_distance(clean_BK, own_BK)
    return total


def steps_alone(weights: LossWeights, total: float, per_epoch: float) -> float:
    """How many of all steps a peer learns alone."""
    return weights.warmup_share * total if weights.warmup_epochs is None else weights.warmup_epochs * per_epoch


def endless_warmups(optim: OptimConfig, weights: LossWeights, total: int, per_epoch: int) -> list[str]:
    """What the user should know of warm-ups that go on to the end of a training, as train.max_steps can have it."""
    steps = {"loss.warmup_epochs": ("learns alone in", steps_alone(weights, total, per_epoch)),
             "optim.warmup_epochs": ("never has its whole learning rate in", optim.warmup_epochs * per_epoch)}
    return [f"{what} all {total:,} steps, because {key} are {number:,.0f}: make them fewer, or train longer"
            for key, (what, number) in steps.items() if number >= total]
