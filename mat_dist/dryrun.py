"""`--dry-run`: what a run would do, without data, run folder or process group."""

from __future__ import annotations

import torch

from mat_dist.cohort import Images
from mat_dist.config import dump_config
from mat_dist.config.schema import Config, PeerConfig
from mat_dist.mesh.launch import Launch
from mat_dist.mesh.placement import Placement
from mat_dist.models import build_model
from mat_dist.plan import CohortPlan, PeerPlan
from mat_dist.schedules import lr_at

KNOWN_IMAGES = {  # data set: (shape, classes, training images before the validation split)
    "digits": ((1, 8, 8), 10, 1437), "fashion_mnist": ((1, 28, 28), 10, 60000), "cifar10": ((3, 32, 32), 10, 50000),
    "cifar100": ((3, 32, 32), 100, 50000), "svhn": ((3, 32, 32), 10, 73257),
}
MIB = 1 << 20


def describe_run(config: Config, launch: Launch, device: torch.device) -> str:
    """The resolved settings, placement, plan of each peer, schedule, parameters and memory as text.

    Raises EnvironmentFault for a rank count that does not fit.
    """
    place = Placement.place(len(config.peers), launch.world, launch.rank)
    place.shard(config.train.batch_size)
    shape, classes, count = _images(config)
    lines = [dump_config(config, with_name=True).rstrip(), "", f"placement   {place.describe()}, device {device.type}"]
    lines += [f"launch      {n} ranks: {Placement.place(place.peers, n, 0).describe()}"
              for n in range(1, 2 * place.peers + 1) if n != launch.world and (place.peers % n == 0 or n % place.peers == 0)]
    lines += _peers(config, CohortPlan.of([p.loss for p in config.peers]), shape, classes, place)
    lines += _schedule(config, count)
    return "\n".join(lines)


def _images(config: Config) -> tuple[tuple[int, int, int], int, int]:
    side = config.data.image_size or 32
    shape, classes, count = KNOWN_IMAGES.get(config.data.name, ((3, side, side), 10, 0))
    count = config.data.train_size or count - (config.data.val_size or min(max(count // 50, 500), count // 5))
    return shape, classes, count


def _peers(config: Config, plan: CohortPlan, shape: tuple[int, int, int], classes: int, place: Placement) -> list[str]:
    """A line per peer: parameters, what it learns from, passes per step, memory of its rank."""
    lines = []
    width = {"fp32": 4, "bf16": 4, "fp64": 8}[config.step.precision]
    images = Images(shape, classes, (0.5,) * shape[0], (0.25,) * shape[0])
    for spec, row in zip(config.peers, plan.peers, strict=True):
        parameters = _parameters(spec, images)
        copies = 3 + (spec.optim.ema_decay is not None)  # weights, gradient, momentum, averaged weights
        teaches = len(plan.forwarded(row.index))
        passes = f"{spec.attack.steps} attack + {len(row.learned)} learning + {teaches} teaching passes per step"
        lines.append(f"{str(spec.name):<12}{spec.model.name}, {parameters:,} parameters, {passes}; {_sources(row)}; "
                     f"state {parameters * copies * width / MIB:,.1f} MiB")
    batch = config.train.batch_size // place.replicas
    exchanged = place.peers * batch * shape[0] * shape[1] * shape[2] * width if plan.shares_aes else 0
    lines.append(f"memory      exchanged AEs {exchanged / MIB:,.1f} MiB per rank, logits "
                 f"{place.peers * plan.most_taught * batch * classes * width / MIB:,.2f} MiB; activations are not estimated")
    return lines


def _parameters(spec: PeerConfig, images: Images) -> int:
    with torch.device("meta"):
        model = build_model(spec.model, shape=images.shape, classes=images.classes, mean=images.mean, std=images.std)
    return sum(p.numel() for p in model.parameters())


def _sources(plan: PeerPlan) -> str:
    hard = " ".join(f"{w:.3g}" for w in plan.hard)
    soft = " ".join(f"{w:.3g}" for w in plan.distilled)
    clean = f", clean {plan.loss.clean_weight:g}, beta {plan.loss.trades_beta:g}" if plan.paired or plan.loss.clean_weight else ""
    return f"{plan.loss.preset}: hard [{hard}] distilled [{soft}]{clean}"


def _schedule(config: Config, count: int) -> list[str]:
    """Steps and the learning rate at ten points of the training."""
    per_epoch = count // config.train.batch_size
    if per_epoch < 1:
        return ["schedule    known once the data set is read (data.name, data.train_size)"]
    total = min(config.train.epochs * per_epoch, config.train.max_steps or 1 << 62)
    marks = sorted({min(total - 1, total * k // 10) for k in range(11)})
    optim = config.peers[0].optim
    rates = "  ".join(f"{s}: {lr_at(s, total_steps=total, steps_per_epoch=per_epoch, optim=optim):.4g}" for s in marks)
    return [f"schedule    {total:,} steps, {per_epoch} per epoch, {config.train.batch_size} images each",
            f"lr          {optim.schedule} of {config.peers[0].name}, by step  {rates}"]
