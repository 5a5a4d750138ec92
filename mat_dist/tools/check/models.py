"""The data set with the first batch of a run, and each peer's model on a few images of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mat_dist import rng
from mat_dist.attacks.pgd import likeliest
from mat_dist.checkpoints.load import initialise
from mat_dist.config.methods import kept_bytes
from mat_dist.config.schema import Config, DataConfig
from mat_dist.core.graph import CohortGraph, View
from mat_dist.core.peer import Peer
from mat_dist.core.step import Batch
from mat_dist.data import as_float, load_data, training_batches
from mat_dist.data.folder import Decoder
from mat_dist.data.load import preview_data
from mat_dist.errors import DataError, NonFinite, PeerFailed
from mat_dist.models.registry import DTYPES, Images, make_model, parameter_count
from mat_dist.tools.check import Answer
from mat_dist.tools.dryrun import KNOWN_IMAGES, rough

DARK = 2.5 / 255  # a batch whose largest value is below this was probably scaled twice
SHOWN = 64  # images that are decoded of a folder whose cache is not built yet
IMAGES = 8  # tried of each model; the memory of a batch follows from this many and half of it
GIB = 1 << 30


@dataclass(frozen=True)
class Sample:
    """Images as a run would see them.

    Attributes:
        images: what the models must fit; mean and deviation are rough.
        x_BCHW: some images in [0, 1].
        y_B: their labels.
        nbytes: bytes of all splits as they are stored.
        train, val, test: images of these splits; None where they are not known yet.
    """

    images: Images
    x_BCHW: Tensor
    y_B: Tensor
    nbytes: int = 0
    train: int | None = None
    val: int | None = None
    test: int | None = None

    def state_bytes(self, config: Config, measured: Mapping[int, Measured]) -> int:
        """What a checkpoint holds of these peers, with what their methods keep of the training images."""
        return sum(one.state + kept_bytes(config, config.peers[index], self.train or 0, self.images.shape)
                   for index, one in measured.items())


def check_data(config: Config) -> Answer[Sample]:
    """Read the data set as a run does, but download nothing and build no cache; take the batch of step 0.

    Raises what loading raises, and DataError for a batch outside [0, 1] or labels that do not fit.
    """
    wanted = config.data
    if wanted.name == "folder":
        decoder = Decoder.open(wanted)
        cache = decoder.cache() if decoder.maps else None
        if cache is not None and cache.look()[0] is None:
            seen = preview_data(wanted, decoder.look, seed=config.run.seed, batch_size=config.train.batch_size)
            shown = decoder.sample(SHOWN)
            sample = Sample(rough(seen.shape, seen.classes), as_float(shown.images, DTYPES[config.step.precision]),
                            shown.labels, cache.nbytes, train=seen.train)
            found = (f"{decoder.listing.count} images of {seen.classes} classes, {_size(seen.shape)}; {len(shown)} of "
                     f"them decode; the run will build a cache of {cache.nbytes / GIB:.1f} GiB in {cache.folder}")
            return Answer(sample, "; ".join([found, *seen.notes]), _check_sample(sample, wanted))
    try:
        data = load_data(wanted.model_copy(update={"download": False}), seed=config.run.seed,
                         batch_size=config.train.batch_size)
    except DataError as error:
        noise = known_sample(config) if wanted.download else None
        if noise is None:
            raise
        return Answer(noise, f"not there yet: {error.what} ({error.where})",
                      "the run will download it, so its first rank needs a network")
    batches = training_batches(config, data, "cpu", DTYPES[config.step.precision])
    sample = Sample(rough(data.train.shape, len(data.classes)), *batches.at(0),
                    nbytes=sum(split.nbytes for split in (data.train, data.val, data.test)),
                    train=len(data.train), val=len(data.val), test=len(data.test))
    dark = _check_sample(sample, wanted)
    steps = min(batches.steps_per_epoch * config.train.replays * config.train.epochs, config.train.max_steps or 1 << 62)
    found = (f"{len(data.train)} + {len(data.val)} + {len(data.test)} images (training, validation, test) of "
             f"{len(data.classes)} classes, {_size(data.train.shape)}; {steps} steps")
    return Answer(sample, "; ".join([found, *data.notes]), dark)


def known_sample(config: Config) -> Sample | None:
    """Noise in the shape of a data set whose shape is known without reading it; None for others."""
    if config.data.name not in KNOWN_IMAGES:
        return None
    shape, classes, count = KNOWN_IMAGES[config.data.name]
    rows = min(SHOWN, config.train.batch_size)
    x_BCHW = rng.uniform(rng.key(config.run.seed, "check"), (rows, *shape), dtype=DTYPES[config.step.precision])
    return Sample(rough(shape, classes), x_BCHW, torch.arange(rows) % classes,
                  count * math.prod(shape))


def _check_sample(sample: Sample, config: DataConfig) -> str:
    """A warning or nothing. Raises DataError where the images or labels do not fit."""
    x_BCHW, y_B, where = sample.x_BCHW, sample.y_B, f"data.name={config.name}, first batch"
    low, high = float(x_BCHW.min()), float(x_BCHW.max())
    if not bool(x_BCHW.isfinite().all()) or low < 0 or high > 1:
        raise DataError(f"pixels from {low:.4g} to {high:.4g}", where, "images must be finite and in [0, 1]")
    y_B = likeliest(y_B)
    if int(y_B.min()) < 0 or int(y_B.max()) >= sample.images.classes:
        raise DataError(f"labels from {int(y_B.min())} to {int(y_B.max())}", where,
                        f"labels count from 0 to {sample.images.classes - 1}")
    if high < DARK:
        return f"the brightest pixel of a batch is {high:.4f}: give bytes in 0 to 255, or floats in 0 to 1"
    return ""


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]} x {shape[2]} x {shape[0]}"


# ---------------------------------------------------------------- models


@dataclass(frozen=True)
class Graph:
    """Bytes that autograd holds for one forward: for each image, and once."""

    per_image: float
    once: float

    def at(self, images: int) -> float:
        """For a batch of `images`."""
        return self.per_image * images + self.once


@dataclass(frozen=True)
class Measured:
    """A peer's needs in bytes: weights, gradients, everything that a checkpoint holds, graphs, its largest tensor."""

    weights: int
    gradients: int
    state: int
    learn: Graph
    attack: Graph
    largest: Graph


def alike(config: Config) -> list[tuple[int, ...]]:
    """The peers in groups that differ in nothing that is tried here."""
    groups: dict[str, list[int]] = {}
    for index, spec in enumerate(config.peers):
        key = spec.model_dump_json(exclude={"name", "stream", "loss"}) + str(spec.attack.loss)
        groups.setdefault(key, []).append(index)
    return [tuple(members) for members in groups.values()]


def check_model(config: Config, peers: tuple[int, ...], sample: Sample, device: torch.device) -> Answer[Measured]:
    """Try the model of the first of `peers`, with the weights of `init_from` where it has one.

    Raises ConfigError for a model that does not fit, CheckpointError for weights that do not, such as those of a
    teacher with other classes, NonFinite, and PeerFailed for whatever else the model raises.
    """
    spec = config.peers[peers[0]]
    where = f"peer {peers[0]}, model.name={spec.model.name}"
    model = make_model(spec, sample.images, seed=config.run.seed, step=config.step, device=device)
    once = spec.model_copy(update={"attack": spec.attack.model_copy(update={"steps": 1}), "frozen": False})
    row, view = CohortGraph.of(config.peers).peers[peers[0]], View(peers[0])
    peer = Peer(peers[0], once, model, row, seed=config.run.seed, step=config.step)
    initialise([peer], sample.images)
    x_BCHW, y_B = sample.x_BCHW[:IMAGES].to(device), sample.y_B[:IMAGES].to(device)
    few = max(1, len(x_BCHW) // 2), max(2, len(x_BCHW) // 2)  # batch norm needs two
    try:
        attacks = [_held(peer, lambda n: peer.attack(Batch(x_BCHW[:n], y_B[:n], 0), (view,))[view], n)
                   for n in (few[0], len(x_BCHW))]
        learns = [_held(peer, peer.learn, x_BCHW[:n], (0, 0, 0)) for n in (few[1], len(x_BCHW))]
        logits_BK = learns[-1].result
        _check_logits(logits_BK, len(x_BCHW), sample.images.classes, where)
        F.cross_entropy(logits_BK, y_B).backward()
        if not bool(peer.reduced().isfinite()):
            raise NonFinite("the gradient is not finite", where, "check the model's loss of precision and its data")
        gradients = sum(g.nbytes for g in peer.gradients())
        peer.update(0, spec.optim.lr, [hook.proposed() for hook in peer.hooks])
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, AttributeError) as error:
        raise PeerFailed(f"{type(error).__name__}: {error}", where,
                         "the model must take (B, C, H, W) in train and eval mode, and be differentiable") from error
    _check_region(peer, x_BCHW, attacks[-1].result, where)
    weights = sum(t.nbytes for t in model.state_dict().values())
    state, gradients = (weights, 0) if spec.frozen else (_total(peer.state()), gradients)
    attack, learn = ((n, len(x_BCHW)) for n in few)
    measured = Measured(weights, gradients, state, _line(learn, [h.total for h in learns]),
                        _line(attack, [h.total for h in attacks]), _line(learn, [h.largest for h in learns]))
    found = (f"{spec.model.name}, {parameter_count(model):,} parameters: attack, forward, backward, update of "
             f"{len(x_BCHW)} images on {device.type}")
    return Answer(measured, found, details={"peers": list(peers), "parameters": parameter_count(model),
                                            "state_bytes": state})


@dataclass(frozen=True)
class _Held:
    """What a forward gave, the bytes that autograd held for it, and the largest tensor among them."""

    result: Tensor
    total: int
    largest: int


def _held(peer: Peer, work: Callable[..., Tensor], *args: Any) -> _Held:
    """Run `work(*args)` and add up what autograd saves, without the weights."""
    own = {t.untyped_storage().data_ptr() for t in peer.model.state_dict(keep_vars=True).values()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work(*args)
    return _Held(result, sum(saved.values()), max(saved.values(), default=0))


def _line(images: tuple[int, int], held: list[int]) -> Graph:
    """The straight line through two batch sizes; through 0 where there is only one."""
    (few, many), (less, more) = images, held
    slope = (more - less) / (many - few) if many > few else more / many
    return Graph(max(slope, 0.0), max(more - slope * many, 0.0))


def _check_logits(logits_BK: Tensor, rows: int, classes: int, where: str) -> None:
    if logits_BK.shape != (rows, classes):
        raise PeerFailed(f"logits of shape {tuple(logits_BK.shape)} for {rows} images", where,
                         f"return raw logits of shape ({rows}, {classes}) in train mode too")
    if not bool(logits_BK.isfinite().all()):
        raise NonFinite("logits are not finite", where, "check the initial weights and the precision")


def _check_region(peer: Peer, x_BCHW: Tensor, adv_BCHW: Tensor, where: str) -> None:
    """Each AE lies in the box and in the region of one of the peer's threats; N-FGSM's only in the box."""
    inside = torch.stack([threat.distance(adv_BCHW, x_BCHW) <= threat.eps * (1 + 1e-6)
                          for threat in peer.threats]).any(0)
    in_ball = bool(inside.all()) or peer.spec.attack.method == "n_fgsm"
    if not bool(adv_BCHW.isfinite().all()) or float(adv_BCHW.min()) < 0 or float(adv_BCHW.max()) > 1 or not in_ball:
        far = float(peer.threat.distance(adv_BCHW, x_BCHW).max())
        raise NonFinite(f"an adversarial example left its region (distance {far:.6g}, eps {peer.threat.eps:.6g})",
                        where, "the gradient with respect to the images is not finite: check the model")


def _total(value: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(_total(item) for item in value.values())
    return sum(_total(item) for item in value) if isinstance(value, (list, tuple)) else 0
