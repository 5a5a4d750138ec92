"""`bench naive`: the step against the references in benchmarks/, and whether all compute the same."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_dist.bench.parts import both
from mat_dist.bench.subject import Subject
from mat_dist.bench.timing import Spread, interleaved
from mat_dist.config.schema import Config
from mat_dist.core.step import train_step
from mat_dist.errors import ConfigError, EnvironmentFault, PeerFailed
from mat_dist.models.modes import frozen
from mat_dist.runs.metrics import device_memory

# Relative difference of a loss at equal weights and AEs, and of the cross-entropy that equal attacks reach.
TOLERANCE = {"fp32": 1e-3, "fp64": 1e-3, "bf16": 5e-2}


def measure_against_references(subject: Subject, rounds: int) -> dict[str, Any]:
    """Time the step against the naive and the careful trainer -> figures.

    Raises:
        ConfigError, EnvironmentFault: settings that the references do not know, or several ranks.
        PeerFailed: the references compute something else.
    """
    if subject.cohort.mesh.placement.world > 1:
        raise EnvironmentFault("the references are single-process trainers", "bench naive", "start it without torchrun")
    recipe = recipe_of(subject.config)
    equal = check_equal(subject, _reference("naive"), _reference("careful"), recipe)
    trainers = reference_trainers(subject)
    times = interleaved({"step": subject.step, **trainers}, rounds, subject.cohort.mesh)
    return {
        "rounds": rounds, "equal": equal, "memory": [device_memory(subject.cohort.mesh.device)],
        **{f"{name}_s": vars(Spread.of([t.wall for t in found])) for name, found in times.items()},
        **{f"{name}_cpu_s": vars(Spread.of([t.cpu for t in found])) for name, found in times.items()},
        "naive_over_step": both(times, "naive", "step"), "careful_over_step": both(times, "careful", "step"),
    }


def reference_trainers(subject: Subject) -> dict[str, Callable[[], None]]:
    """One step of the naive and of the careful trainer, by name, on copies of the peers' models.

    Raises ConfigError for settings that they do not know.
    """
    recipe, naive = recipe_of(subject.config), _reference("naive")
    trainers = {}
    for name in ("naive", "careful"):
        models = _plain_models(subject)
        optimizers = [torch.optim.SGD(m.parameters(), lr=o.lr, momentum=o.momentum, weight_decay=o.weight_decay)
                      for m, o in zip(models, (spec.optim for spec in subject.config.peers), strict=True)]
        batches = naive.batches(subject.images.permute(0, 2, 3, 1).contiguous(), subject.labels,
                                subject.config.train.batch_size)
        trainers[name] = _trainer(_reference(name), models, optimizers, batches, recipe, subject.cohort.mesh.device)
    return trainers


def check_equal(subject: Subject, naive: Any, careful: Any, recipe: Any) -> dict[str, float]:
    """Compare losses at equal weights and AEs, and attacks from an equal start -> relative differences."""
    cohort, (x_BCHW, y_B) = subject.cohort, subject.batch()
    models = _plain_models(subject)
    aes = [peer.attack(x_BCHW, y_B, subject.number) for peer in cohort.peers]
    told = naive.mutual_losses(copy.deepcopy(models), [ae.float() for ae in aes], y_B, recipe)
    theirs = torch.stack([loss.detach() for loss in told])
    attacked = []
    for peer, model, ae in zip(cohort.peers, models, aes, strict=True):
        region = peer.threat.region(x_BCHW)
        start = peer.threat.start("uniform", region, x_BCHW, stream=peer.stream("attack", subject.number))
        other = careful.attack(model, x_BCHW.float(), y_B, recipe, start.float())
        attacked.append(_strength(model, ae, y_B) / _strength(model, other, y_B) - 1)
    ours = train_step(cohort, x_BCHW, y_B, subject.number, log=True).loss_P
    subject.number += 1
    assert ours is not None
    found = {"loss": float((ours.to(theirs) / theirs - 1).abs().max()),
             "attack": float(torch.stack(attacked).abs().max())}
    limit = TOLERANCE[subject.config.step.precision]
    for what, value in found.items():
        if value > limit:
            raise PeerFailed(f"the references reach another {what}: relative difference {value:.2g}, allowed {limit:g}",
                             "bench naive", "use preset mat, the linf threat and untrained weights of one precision")
    return found


def _strength(model: nn.Module, aes_BCHW: Tensor, y_B: Tensor) -> Tensor:
    with frozen(model), torch.no_grad():
        return F.cross_entropy(model(aes_BCHW.float()), y_B)


def _plain_models(subject: Subject) -> list[nn.Module]:
    """Copies of the peers' models in fp32 and contiguous layout."""
    return [copy.deepcopy(peer.model).float().to(memory_format=torch.contiguous_format)
            for peer in subject.cohort.peers]


def _trainer(module: Any, models: list[nn.Module], optimizers: list[Any], batches: Any, recipe: Any,
             device: torch.device) -> Callable[[], None]:
    def step() -> None:
        x, y = next(batches)
        module.train_step(models, optimizers, x.to(device), y.to(device), recipe)
    return step


def recipe_of(config: Config) -> Any:
    """The settings of the references. Raises ConfigError for what they do not know."""
    first, peers = config.peers[0], config.peers
    unknown = [key for key, unfit in {
        "loss (preset mat)": any(p.loss.preset != "mat" for p in peers), "one peer": len(peers) < 2,
        "threat (linf)": any(p.threat.norm != "linf" for p in peers),
        "peers that differ": any((p.threat, p.attack, p.loss) != (first.threat, first.attack, first.loss)
                                 for p in peers),
        "data.augment.cutmix (0)": bool(config.data.augment.cutmix),
        "attack.method (pgd)": first.attack.method != "pgd",
        "attack.start (uniform)": first.attack.start != "uniform", "attack.loss (ce)": first.attack.loss != "ce",
    }.items() if unfit]
    if unknown:
        raise ConfigError(f"the references do not know these settings: {', '.join(unknown)}", "bench naive",
                          "leave them at their defaults")
    loss, attack = first.loss, first.attack
    return _reference("naive").Recipe(first.threat.eps, attack.step_size, attack.steps, loss.hard_weight,
                                      loss.kd_weight)


def _reference(name: str) -> Any:
    try:
        return importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        raise EnvironmentFault(f"{error.name} cannot be imported", "bench naive",
                               "start it in the root of a checkout, where benchmarks/ is") from error
