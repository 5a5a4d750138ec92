"""`--dry-run`: what a run would do, from a look at its data, without run folder or process group; its passes, for
studies too."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mat_dist.attacks.norms import Threat
from mat_dist.config import dump_config
from mat_dist.config.methods import methods
from mat_dist.config.schema import Config, DataConfig, ModelConfig, OptimConfig, PeerConfig
from mat_dist.core.cohort import replica_rows
from mat_dist.core.graph import CLEAN, CohortGraph, PeerGraph
from mat_dist.core.objective import endless_warmups, steps_alone
from mat_dist.core.optim import ema_decay_at, lr_at
from mat_dist.data import RawData, steps_per_epoch
from mat_dist.data.arrays import load_npz
from mat_dist.data.builtin import load_digits
from mat_dist.data.folder import Decoder
from mat_dist.data.load import Preview, default_val_size, preview_data
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.placement import Placement
from mat_dist.errors import DataError, OutputError
from mat_dist.models import build_model, parameter_count
from mat_dist.models.registry import DTYPES, Images
from mat_dist.screens import arrived

KNOWN_IMAGES = {  # data set: (shape, classes, training images before the validation split)
    "digits": ((1, 8, 8), 10, 1437), "fashion_mnist": ((1, 28, 28), 10, 60000), "cifar10": ((3, 32, 32), 10, 50000),
    "cifar100": ((3, 32, 32), 100, 50000), "svhn": ((3, 32, 32), 10, 73257),
}
WIDTH = 100


class Passes(NamedTuple):
    """Of one peer: attack and learning (forward and backward), teaching (forward only), and their sums."""

    attack: Fraction
    learning: Fraction
    teaching: Fraction
    forward: Fraction
    backward: Fraction


def step_passes(config: Config, graph: CohortGraph) -> list[Passes]:
    """The passes of each peer in one step of full attacks."""
    return [_passes_of(config, graph, index) for index in range(len(config.peers))]


def total_passes(config: Config, graph: CohortGraph, total: int) -> tuple[int, int]:
    """Forward and backward passes of all peers in `total` steps."""
    rows = step_passes(config, graph)
    return math.ceil(total * sum(row.forward for row in rows)), math.ceil(total * sum(row.backward for row in rows))


def _passes_of(config: Config, graph: CohortGraph, index: int) -> Passes:
    spec, row = config.peers[index], graph.peers[index]
    steps = Fraction(spec.attack.steps)
    used = [method for method in methods().values() if method.uses(spec)]
    learning = Fraction(len(row.learned) + sum(method.learning(spec, row) for method in used if method.learning))
    # With memory: recompute, no graph is kept until the logits have travelled: what is taught is run twice.
    again = config.step.memory == "recompute" or config.step.teachers == "ema"
    teaching = Fraction(len(graph.taught[index] if again else graph.forwarded(index)) + any(graph.guides))
    # Forwards alone: the clean prediction once, APGD's look at its last point.
    attack, alone = steps, Fraction((spec.attack.loss == "kl_clean") + (spec.attack.method == "apgd"))
    views = len(graph.crafted(index))
    attack, alone = attack * views, alone * views
    for method in used:
        if views and method.attack_passes is not None:
            instead, more = method.attack_passes(spec, steps)
            attack, alone = attack + instead - steps, alone + more
    backward = attack + learning
    return Passes(attack, learning, teaching, backward + teaching + alone, backward)


# ------------------------------------------------------------------------------------------------ the whole text


def show_run(config: Config, launch: Launch, device: torch.device, notes: Sequence[str] = ()) -> None:
    """Print the description and notes on the settings; then raise what reading the data would raise, as far as a look
    can tell."""
    seen, problem = None, None
    try:
        seen = look_at_data(config)
    except (DataError, OutputError) as error:
        problem = error
    text = describe_run(config, launch, device, seen)
    if launch.speaks_for():
        print("\n".join([text, *(f"note: {note}" for note in notes)]))
        arrived()
    if problem is not None:
        raise problem


def look_at_data(config: Config) -> Preview | None:
    """The data set from its headers, labels and a few images; None for one that must be read to know. Raises as
    loading does; of data sets that are known, only for sizes that do not fit."""
    name = config.data.name
    looks: dict[str, Callable[[DataConfig], RawData]] = {
        "folder": lambda data: Decoder.open(data).look(), "npz": partial(load_npz, pixels=False), "digits": load_digits}
    if name in KNOWN_IMAGES:
        looks.setdefault(name, _known)
    return preview_data(config.data, looks[name], seed=config.run.seed,
                        batch_size=config.train.batch_size) if name in looks else None


def _known(data: DataConfig) -> RawData:
    """Nothing but the sizes; of as many test images as are asked for."""
    shape, classes, count = KNOWN_IMAGES[data.name]
    train, test = (np.broadcast_to(np.uint8(0), (n, *shape)) for n in (count, data.test_size or classes))
    return RawData(train, np.arange(len(train)) % classes, test, np.arange(len(test)) % classes,
                   tuple(map(str, range(classes))))


def rough(shape: tuple[int, int, int], classes: int) -> Images:
    """Images of that shape, normalised with 0.5 and 0.25."""
    return Images(shape, classes, (0.5,) * shape[0], (0.25,) * shape[0])


def describe_run(config: Config, launch: Launch, device: torch.device, seen: Preview | None = None) -> str:
    """The resolved settings, placement, plan of each peer, passes, bytes that travel and schedule as text.

    `seen`: its data. Raises EnvironmentFault for a rank count or micro-batches that do not fit.
    """
    place = Placement.place(len(config.peers), launch.world, launch.rank)
    graph = CohortGraph.of(config.peers)
    rows = replica_rows(place, config.train.batch_size, config.train.accumulate)
    run = _Run(config, place, graph, rows.stop - rows.start, seen)
    lines = [dump_config(config, with_name=True).rstrip(), "",
             f"placement   {place.describe()}, device {device.type}",
             *(f"  or        {Placement.place(place.peers, world, 0).describe()}"
               for world in place.fitting if world != launch.world),
             f"images      {run.describe_images()}", *(f"  note      {note}" for note in (seen.notes if seen else ()))]
    return "\n".join([*lines, "", *_peers(run), "", *_terms(run), "", *_passes(run), "", *_travel(run), "",
                      "memory: python -m mat_dist.check measures what a rank needs", "", *_schedule(run)])


def training_passes(config: Config, steps: int | None = None) -> tuple[int, int, int] | None:
    """Steps of a training, and the forward and backward passes of a batch through a network in all of them.

    Evaluations and the transfer table of log steps do not count.

    Args:
        steps: of the training, where they are known; default by the settings, None where that needs the data set.
    """
    graph = CohortGraph.of(config.peers)
    run = _Run(config, Placement.place(len(config.peers), 1, 0), graph, config.train.batch_size)
    if run.per_epoch < 1 and steps is None:
        return None
    total = _total(config, run.per_epoch) if steps is None else steps
    return total, *total_passes(config, graph, total)


def _total(config: Config, per_epoch: int) -> int:
    """Steps of the whole training."""
    whole = config.train.epochs * per_epoch
    return min(whole, config.train.max_steps or whole)


@dataclass(frozen=True)
class _Run:
    """What the parts of the description share; `rows` are the images of a replica's batch."""

    config: Config
    place: Placement
    graph: CohortGraph
    rows: int
    seen: Preview | None = None

    @cached_property
    def data(self) -> Preview:
        """What was seen of the data set, else what its name tells; of one without a known name, a guess."""
        if self.seen is not None:
            return self.seen
        data, side = self.config.data, self.config.data.image_size or 32
        shape, classes, whole = KNOWN_IMAGES.get(data.name, ((3, side, side), 10, None))
        if whole is not None:
            whole -= default_val_size(whole) if data.val_size is None else data.val_size
        return Preview(shape, classes, whole if data.train_size is None else data.train_size)

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch; 0 where the data set must be read to know."""
        train = self.config.train
        return steps_per_epoch(self.data.train or 0, train.batch_size, self.config.data.generated_share, train.replays)

    def epochs_alone(self, row: PeerGraph) -> float:
        """How many epochs a peer learns alone; of a data set of unknown size as if train.max_steps did not cut them."""
        per_epoch = self.per_epoch or 1
        total = _total(self.config, per_epoch) if self.per_epoch else self.config.train.epochs
        return steps_alone(row.weights, total, per_epoch) / per_epoch

    def describe_images(self) -> str:
        data, size, classes = self.config.data, " x ".join(map(str, self.data.shape)), self.data.classes
        if self.seen is None and data.name not in KNOWN_IMAGES:
            return f"{data.name}: not read; parameters below are for {size} and {classes} classes"
        more = f"; {data.generated_share:.0%} of a batch from {data.generated}" if data.generated else ""
        return f"{data.name}: {self.data.train:,} for training, {size}, {classes} classes{more}"

    @cached_property
    def parameters(self) -> dict[ModelConfig, int]:
        """Number of parameters of each distinct model."""
        found, shown = {}, rough(self.data.shape, self.data.classes)
        for model in {spec.model for spec in self.config.peers}:
            with torch.device("meta"):
                found[model] = parameter_count(build_model(model, shape=shown.shape, classes=shown.classes,
                                                           mean=shown.mean, std=shown.std))
        return found

    def named(self) -> list[tuple[str, PeerConfig, PeerGraph]]:
        """Name, settings and plan of each peer."""
        return [(str(spec.name), spec, row) for spec, row in zip(self.config.peers, self.graph.peers, strict=True)]


# ------------------------------------------------------------------------------------------------ parts


def _peers(run: _Run) -> list[str]:
    """What each peer is, and what it defends against."""
    table = _table(["peer", "model"], ["parameters"], ["threat", "attack", "loss"])
    for name, spec, _ in run.named():
        table.add_row(name, spec.model.name, f"{run.parameters[spec.model]:,}", _threats(spec),
                      f"{spec.attack.method.upper()}-{spec.attack.steps} {spec.attack.loss}", spec.loss.preset)
    return ["peers", *_lines(table)]


def _threats(spec: PeerConfig) -> str:
    """What a peer defends against: one threat, or a union and how it is learnt."""
    labels = ", ".join(Threat(*ball).label for ball in spec.union.balls or [(spec.threat.norm, spec.threat.eps)])
    if spec.union.strategy is None:
        return labels
    return f"union ({spec.union.strategy}): {labels if spec.union.balls else 'those of the specialists'}"


def _terms(run: _Run) -> list[str]:
    """The weights of the loss that are not 0 everywhere, and for how long a peer learns alone before they count."""
    weights = {name: {**_weights(row), "epochs alone": run.epochs_alone(row)} for name, _, row in run.named()}
    used = [term for term in next(iter(weights.values())) if any(row[term] for row in weights.values())]
    table = _table(["peer"], used)
    for name, row in weights.items():
        table.add_row(name, *(f"{row[term]:.3g}" for term in used))
    return ["loss: weights of cross-entropy (CE) and distillation (KD) on own AEs, on those of each other peer",
            *_lines(table)]


def _weights(row: PeerGraph) -> dict[str, float]:
    others = [view for view in (*row.hard, *row.distilled) if view != CLEAN and view.maker != row.index]
    return {"CE own": sum(row.hard.get(view, 0.0) for view in row.mine),
            "CE other": max((row.hard.get(view, 0.0) for view in others), default=0.0),
            "CE clean": row.hard.get(CLEAN, 0.0),
            "KD own": sum(row.distilled.get(view, 0.0) for view in row.mine if row.teachers(view)),
            "KD other": max((row.distilled.get(view, 0.0) for view in others), default=0.0),
            "KD clean": row.distilled.get(CLEAN, 0.0),
            "pair KL": row.weights.pair_kl, "pair MSE": row.weights.pair_mse}


def _passes(run: _Run) -> list[str]:
    """Passes of a replica's batch through each network in one step."""
    table = _table(["peer"], ["attack", "learning", "teaching", "forward", "backward"])
    counts = step_passes(run.config, run.graph)
    for (name, *_), row in zip(run.named(), counts, strict=True):
        table.add_row(name, *map(_number, row))
    table.add_row("all", *(_number(sum(column)) for column in zip(*counts, strict=True)))
    return [f"passes per step, of {run.rows} images each", *_lines(table),
            "  Not counted: evaluations, and forwards for the transfer table of log steps.",
            "  Counted in full: epochs in which peers still learn alone."]


def _travel(run: _Run) -> list[str]:
    """What each rank sends along the peer axis in a step, and which views never leave their maker."""
    graph, place, step, rows = run.graph, run.place, run.config.step, run.rows
    who = "each rank sends"
    if place.peer_ranks == 1:
        if place.peers == 1:
            return ["travels per step: nothing, there is one peer"]
        place, who = Placement.place(place.peers, place.peers, 0), "nothing; with a rank for each peer, each would send"
    sent, width = graph.width(place.peers_by_rank()), DTYPES[step.precision].itemsize
    pixels = math.prod(run.data.shape)
    image = {"full": pixels * width, "fp16": pixels * 2, "int8": pixels + 4}[step.wire]  # int8: and its scale
    taught = place.peers_per_rank * (graph.most_taught + any(graph.guides))
    aes = rows * sent * image
    logits = rows * taught * run.data.classes * width
    lines = [f"travels per step: {who} {aes:,} bytes of AEs",
             f"  ({_count(sent, 'view')}) and {logits:,} bytes of logits"]
    home = {name: [row.threat_of(view).label for view in graph.crafted(row.index) if view not in graph.travelling]
            for name, _, row in run.named()}
    told = ", ".join(f"{name} ({', '.join(threats)})" for name, threats in home.items() if threats)
    return lines + textwrap.wrap(f"views that stay with their makers: {told or 'none'}", WIDTH, subsequent_indent="  ")


def _schedule(run: _Run) -> list[str]:
    """Steps, and the learning rates where they change or at tenths of the training."""
    config, batch, per_epoch = run.config, run.config.train.batch_size, run.per_epoch
    if per_epoch < 1:
        return [f"schedule: {config.train.epochs} epochs of {batch} images a step; the number of steps is known once "
                "the data are read"]
    total = _total(config, per_epoch)
    forward, backward = total_passes(config, run.graph, total)
    optims: list[tuple[OptimConfig, str]] = []  # each schedule with the first peer that has it
    for name, spec, _ in run.named():
        optims += [] if any(spec.optim == optim for optim, _ in optims) else [(spec.optim, name)]
    marks = sorted({step for optim, _ in optims for step in _marks(total, per_epoch, optim)})
    table = _table([], ["step", "epoch", *(f"lr of {name} ({optim.schedule})" for optim, name in optims)])
    before: list[str] = []
    for step in marks:
        rates = [f"{lr_at(step, total_steps=total, steps_per_epoch=per_epoch, optim=optim):.4g}" for optim, _ in optims]
        if rates != before or step == total - 1:
            table.add_row(f"{step:,}", f"{math.floor(100 * step / per_epoch) / 100:.2f}", *rates)
        before = rates
    bounds = {decay: ema_decay_at(total - 1, decay) for optim, _ in optims if (decay := optim.ema_decay) is not None}
    notes = [f"averages: optim.ema_decay {decay:g} is never reached in so few steps: its warm-up allows {bound:.4f}"
             for decay, bound in bounds.items() if bound < decay]
    notes += [f"{name}: {note}" for name, spec, row in run.named()
              for note in endless_warmups(spec.optim, row.weights, total, per_epoch)]
    return [f"schedule: {total:,} steps, {per_epoch:,} per epoch, {batch} images each; "
            f"{forward:,} forward, {backward:,} backward passes", *_lines(table), *[""] * bool(notes), *notes]


def _marks(total: int, per_epoch: int, optim: OptimConfig) -> set[int]:
    """Steps at which the learning rate is shown: tenths of the training, the end of a warm-up, milestones."""
    marks = {min(total - 1, total * k // 10) for k in range(11)} | {round(optim.warmup_epochs * per_epoch)}
    if optim.schedule == "piecewise":
        for share in optim.milestones:
            step = math.ceil(share * total)
            marks.add(step - ((step - 1) / total >= share))  # rounding, as in `lr_at`
    return {step for step in marks if 0 <= step < total}


# ------------------------------------------------------------------------------------------------ layout


def _table(words: Sequence[str], numbers: Sequence[str], remarks: Sequence[str] = ()) -> Table:
    """A table with columns of words, of numbers (to the right) and of remarks."""
    table = Table(header_style="", box=None, pad_edge=False)
    for name in words:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    for name in remarks:
        table.add_column(name)
    return table


def _lines(table: Table) -> list[str]:
    """The table as text without colours, its rows indented."""
    screen = Console(file=io.StringIO(), width=WIDTH - 2, color_system=None, force_terminal=False,
                     force_interactive=False)
    with screen.capture() as text:
        screen.print(table)
    return [f"  {row.rstrip()}" for row in text.get().rstrip().splitlines()]


def _number(count: Fraction | int) -> str:
    return f"{float(count):,.2f}" if count % 1 else f"{int(count):,}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
