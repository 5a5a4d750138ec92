"""`step`, `naive` and `memory`: the figures of a training step against its limit and against plain trainers."""

from __future__ import annotations

import copy
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.command import Watch
from benchmarks.speed import references
from benchmarks.speed.references import Recipe, careful_attack, mutual_losses, naive_attack
from benchmarks.speed.subject import Limit, Subject
from benchmarks.speed.timing import Contestant, both, interleaved, of_all_ranks, spreads, warm_up
from mat_dist.config.schema import Config
from mat_dist.distributed.groups import Mesh, prepare_torch
from mat_dist.distributed.placement import Placement
from mat_dist.errors import ConfigError, EnvironmentFault, PeerFailed, StopRequested
from mat_dist.models.modes import frozen
from mat_dist.runs.console import duration
from mat_dist.runs.metrics import device_memory

# Relative difference of a loss at equal weights and AEs, and of the cross-entropy that equal attacks reach.
TOLERANCE = {"fp32": 1e-3, "tf32": 1e-2, "ieee": 1e-3, "fp64": 1e-3, "bf16": 5e-2, "fp16": 5e-2}
ATTACKS = {"naive": naive_attack, "careful": careful_attack}
PEAKS = ("keep", "recompute", "naive")  # the step with both settings of `step.memory`, and a reference
CHECKS_A_ROUND = 1.6  # a round of all trainers takes so many times what the check of their equality takes
STEPS = 2  # of a peak; the second one has momentum buffers from its start


def measure_step(subject: Subject, rounds: int, watch: Watch) -> dict[str, Any]:
    """Time the step against its limit and against itself without guards -> figures of this launch.

    Every rank gets the same figures. Times of a round are those of the slowest rank; CPU times are those of all
    ranks together.
    """
    mesh = subject.mesh
    contestants: dict[str, Contestant] = {"step": subject.step, "unguarded": subject.unguarded_step,
                                          "limit": Limit(subject), "logged": subject.logged_step}
    times = of_all_ranks(mesh, interleaved(contestants, rounds, mesh, watch))
    timed = len(times["step"])
    first = warm_up(mesh.device)
    clocks = mesh.gather_json(subject.clocks[first:first + timed])
    parts = {phase: statistics.median(max(rank[n][phase] for rank in clocks) for n in range(timed))
             for phase in clocks[0][0]}
    spread = spreads(times, "step", "limit")
    return {
        "rounds": timed, **{name: spread[name] for name in ("step_s", "step_cpu_s", "limit_s")},
        "images_per_s": subject.config.train.batch_size / spread["step_s"]["median"], "parts_s": parts,
        "of_limit": both(times, "limit", "step"), "guards": both(times, "step", "unguarded", minus=1.0),
        "log_step": both(times, "logged", "step", minus=1.0), "log_every": subject.config.log.every,
        "memory": mesh.gather_json(device_memory(mesh.device)),
    }


# ------------------------------------------------------------------------------------------------ references


def measure_against_references(subject: Subject, rounds: int, watch: Watch) -> dict[str, Any]:
    """Time the step against the naive and the careful trainer -> figures.

    Raises:
        ConfigError, EnvironmentFault: settings that the references do not know, or several ranks.
        PeerFailed: the references compute something else.
    """
    if subject.mesh.placement.world > 1:
        raise EnvironmentFault("the references are single-process trainers", "naive", "start it without torchrun")
    recipe = recipe_of(subject.config)
    watch.say("checking that all trainers compute the same")
    began = time.monotonic()
    equal = check_equal(subject, recipe)
    whole = (time.monotonic() - began) * CHECKS_A_ROUND * (warm_up(subject.mesh.device) + rounds)
    watch.say(f"a warm-up and {rounds} rounds of the step and both trainers take about {duration(whole)}")
    trainers = {name: trainer(subject, name) for name in ATTACKS}
    times = interleaved({"step": subject.step, **trainers}, rounds, subject.mesh, watch)
    return {"rounds": len(times["step"]), "equal": equal, "memory": [device_memory(subject.mesh.device)],
            **spreads(times, *times),
            "naive_over_step": both(times, "naive", "step"), "careful_over_step": both(times, "careful", "step")}


def trainer(subject: Subject, name: str) -> Callable[[], object]:
    """One step of the naive or the careful trainer, on copies of the peers' models.

    Raises ConfigError for settings that it does not know.
    """
    recipe, models, device = recipe_of(subject.config), subject.plain_models(), subject.mesh.device
    optimizers = [torch.optim.SGD(m.parameters(), lr=o.lr, weight_decay=o.weight_decay, **{"momentum": 0.9, **o.args})
                  for m, o in zip(models, (spec.optim for spec in subject.config.peers), strict=True)]
    batches = references.batches(subject.images.permute(0, 2, 3, 1).contiguous(), subject.labels,
                                 subject.config.train.batch_size)

    def step() -> object:
        x, y = next(batches)
        return references.train_step(models, optimizers, x.to(device), y.to(device), recipe, ATTACKS[name])
    return step


def check_equal(subject: Subject, recipe: Recipe) -> dict[str, float]:
    """Compare losses at equal weights and AEs, and attacks from an equal start -> relative differences.

    Raises PeerFailed where they are too large.
    """
    models, batch, attacks = subject.plain_models(), subject.batch(), subject.attacks()
    x_BCHW, y_B = batch.x_BCHW, batch.y_B
    aes = [ae.float() for _, ae in attacks]
    theirs = torch.stack([loss.detach() for loss in mutual_losses(copy.deepcopy(models), aes, y_B, recipe)])
    strengths = [_strength(model, ae, y_B) / _strength(
        model, careful_attack(model, x_BCHW.float(), y_B, recipe, start.float()), y_B) - 1
        for model, (start, _), ae in zip(models, attacks, aes, strict=True)]
    ours = subject.logged_step()
    found = {"loss": float((ours.to(theirs) / theirs - 1).abs().max()),
             "attack": float(torch.stack(strengths).abs().max())}
    limit = TOLERANCE[subject.config.step.precision]
    for what, value in found.items():
        if value > limit:
            raise PeerFailed(f"the references reach another {what}: relative difference {value:.2g}, allowed {limit:g}",
                             "naive", "use preset mat or at, the linf threat and untrained weights of one precision")
    return found


def _strength(model: nn.Module, aes_BCHW: Tensor, y_B: Tensor) -> Tensor:
    with frozen(model), torch.no_grad():
        return F.cross_entropy(model(aes_BCHW), y_B)


def recipe_of(config: Config) -> Recipe:
    """The settings of the references. Raises ConfigError for what they do not know."""
    first, peers = config.peers[0], config.peers
    unknown = [key for key, unfit in {
        "loss (preset mat or at)": any(p.loss.preset not in ("mat", "at") for p in peers),
        "one peer": len(peers) < 2 and first.loss.preset != "at",
        "threat (linf)": any(p.threat.norm != "linf" for p in peers),
        "peers that differ": any((p.threat, p.attack, p.loss) != (first.threat, first.attack, first.loss)
                                 for p in peers),
        "data.augment.cutmix (0)": bool(config.data.augment.cutmix),
        "optim.name (sgd)": any(p.optim.name.lower() != "sgd" for p in peers),
        "methods (none)": any(p.methods for p in peers),
        "attack.method (pgd)": first.attack.method != "pgd",
        "attack.start (uniform)": first.attack.start != "uniform", "attack.loss (ce)": first.attack.loss != "ce",
    }.items() if unfit]
    if unknown:
        raise ConfigError(f"the references do not know these settings: {', '.join(unknown)}", "naive",
                          "leave them at their defaults")
    loss, attack = first.loss, first.attack
    assert attack.step_size is not None and loss.hard_weight is not None and loss.kd_weight is not None
    return Recipe(first.threat.eps, attack.step_size, attack.steps, loss.hard_weight, loss.kd_weight)


# ------------------------------------------------------------------------------------------------ memory


def measure_memory(config: Config, shape: tuple[int, int, int], classes: int, mesh: Mesh,
                   watch: Watch) -> dict[str, Any]:
    """MiB that a few steps need on top of what the process holds before them: models, images, libraries.

    On a GPU the peak of its tensors, models included. Each contestant has a process of its own: a peak cannot be taken
    back, and allocators keep what they have.

    Raises:
        ConfigError: settings that the references do not know.
        EnvironmentFault: memory cannot be measured, several ranks.
        StopRequested: a signal came before the first contestant had ended.
    """
    if mesh.placement.world > 1:
        raise EnvironmentFault("each contestant has a process of its own", "memory", "start it without torchrun")
    recipe_of(config)
    if mesh.device.type == "cpu" and not Path("/proc/self/statm").is_file():
        raise EnvironmentFault("this system does not tell how much memory a process holds", "memory",
                               "run it on Linux or on a GPU")
    found = dict(_peaks(config, shape, classes, mesh.device, watch))
    if not found:
        raise StopRequested("stopped before the first contestant had ended", "memory", "give it more time")
    return {"rounds": STEPS, "peak_mib": found, **{f"{name}_over_naive": found[name] / found["naive"]
                                                   for name in ("recompute", "keep") if "naive" in found}}


def _peaks(config: Config, shape: tuple[int, int, int], classes: int, device: torch.device,
           watch: Watch) -> Iterator[tuple[str, float]]:
    spawn = multiprocessing.get_context("spawn")
    for number, name in enumerate(PEAKS):
        if watch.stopped:
            return
        watch.say(f"memory of {name} ({number + 1} of {len(PEAKS)})")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            try:
                yield name, pool.submit(partial(peak_of, name, config, shape, classes, str(device))).result()
            except (KeyboardInterrupt, BrokenProcessPool) as error:
                if watch.stopped:
                    return
                raise EnvironmentFault(f"the process of {name} died", "memory", "it may have taken all memory: try a "
                                       "smaller train.batch_size") from error


def peak_of(name: str, config: Config, shape: tuple[int, int, int], classes: int, device_name: str) -> float:
    """Peak of one contestant in this process, in MiB."""
    prepare_torch(config)
    device = torch.device(device_name)
    if name not in ATTACKS:
        config = config.model_copy(update={"step": config.step.model_copy(update={"memory": name})})
    subject = Subject.make(config, Mesh(Placement.place(len(config.peers), 1, 0), device), shape, classes)
    step = trainer(subject, name) if name in ATTACKS else subject.step
    before = _held(device)
    for _ in range(STEPS):
        step()
    after = device_memory(device)
    return round(after.get("device_peak_mib", after["host_peak_mib"]) - before, 1)


def _held(device: torch.device) -> float:
    """What this process holds already, in MiB; on a GPU nothing is taken off."""
    if device.type == "cuda":
        return 0.0
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)
