"""Each peer's model on a few images: one attack step, one forward, one backward, one update; and what that holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mat_dist.checkpoints.load import initialise
from mat_dist.config.schema import Config
from mat_dist.core.graph import CohortGraph, View
from mat_dist.core.peer import Peer
from mat_dist.core.step import Batch
from mat_dist.errors import NonFinite, PeerFailed
from mat_dist.models.registry import make_model, parameter_count
from mat_dist.tools.check.data import Sample
from mat_dist.tools.check.findings import Answer

IMAGES = 8  # tried; the memory of a batch follows from this many and half of it


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
        gradients = sum(_bytes(g) for g in peer.gradients())
        peer.update(0, spec.optim.lr, lambda tensor: tensor)
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError, AttributeError) as error:
        raise PeerFailed(f"{type(error).__name__}: {error}", where,
                         "the model must take (B, C, H, W) in train and eval mode, and be differentiable") from error
    _check_region(peer, x_BCHW, attacks[-1].result, where)
    weights = sum(map(_bytes, model.state_dict().values()))
    state = _total(peer.state())
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


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _total(value: Any) -> int:
    """Bytes of all tensors in nested containers."""
    if isinstance(value, Tensor):
        return _bytes(value)
    if isinstance(value, dict):
        return sum(_total(item) for item in value.values())
    return sum(_total(item) for item in value) if isinstance(value, (list, tuple)) else 0
