"""Small cohorts for tests: real steps on random images, models built before any thread starts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.config.presets import fill_peer
from mat_dist.config.schema import Config
from mat_dist.core.cohort import Cohort
from mat_dist.core.graph import CohortGraph, View
from mat_dist.core.peer import Peer
from mat_dist.core.state_hash import state_hash
from mat_dist.core.step import Batch, Outcome, train_step
from mat_dist.distributed.groups import Mesh
from mat_dist.errors import MatError, NonFinite

SHAPE, CLASSES, BATCH = (2, 6, 6), 5, 8


def complete(raw: dict[str, Any]) -> Config:
    """A resolved configuration from a plain dict whose `peers` is a list of complete or partial entries."""
    config = Config.model_validate(raw)
    return config.model_copy(update={"peers": tuple(
        fill_peer(peer, i, len(config.peers)) for i, peer in enumerate(config.peers))})


def cohort_config(preset: str | list[str] = "mat", peers: int = 4, *, norm: str = "linf", eps: float = 0.1,
                  steps: int = 3, loss: dict[str, Any] | None = None, optim: dict[str, Any] | None = None,
                  entry: dict[str, Any] | None = None, **sections: Any) -> Config:
    """`peers` equal peers of one preset (or one preset each)."""
    presets = [preset] * peers if isinstance(preset, str) else preset
    entries = [{"threat": {"norm": norm, "eps": eps}, "attack": {"steps": steps}, "loss": {"preset": p, **(loss or {})},
                "optim": {"lr": 0.1, "schedule": "constant", **(optim or {})}, **(entry or {})} for p in presets]
    return complete({"peers": entries, "train": {"batch_size": BATCH, "epochs": 1000}, **sections})


def cut(parts: int) -> dict[str, Any]:
    """The section `train` of a training whose batches are cut into parts."""
    return {"batch_size": BATCH, "epochs": 1000, "accumulate": parts}


class Net(nn.Module):
    """Two convolutions with a norm layer each, and a linear layer."""

    def __init__(self, norm: str = "batch", classes: int = CLASSES) -> None:
        super().__init__()
        def layer(c: int) -> nn.Module:
            return nn.BatchNorm2d(c) if norm == "batch" else nn.GroupNorm(2, c)
        self.body = nn.Sequential(nn.Conv2d(SHAPE[0], 4, 3, padding=1, bias=False), layer(4), nn.ReLU(),
                                  nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), layer(6), nn.ReLU(),
                                  nn.Flatten(), nn.Linear(6 * 9, classes))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out


def nets(count: int, norm: str = "batch", dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """`count` nets with different keyed weights."""
    made = []
    for i in range(count):
        with rng.keyed_rng(rng.key(1, "test-net", i)):
            made.append(Net(norm).to(dtype))
    return made


def batch(step: int, rows: int = BATCH, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random images in [0, 1] and labels, a function of the step."""
    x = rng.uniform(rng.key(2, "test-x", step), (rows, *SHAPE), dtype=dtype)
    y = rng.uniform(rng.key(2, "test-y", step), (rows,), dtype=torch.float64) * CLASSES
    return x, y.long()


def build(config: Config, mesh: Mesh, models: list[nn.Module], *, steps_per_epoch: int = 10) -> Cohort:
    """The cohort of one rank round copies of the models of all peers."""
    mine = [copy.deepcopy(models[i]) for i in mesh.placement.local_peers]
    return Cohort.build(config, mesh, None, steps_per_epoch=steps_per_epoch, models=mine)  # type: ignore[arg-type]


def make_peer(model: nn.Module, config: Config, index: int = 0) -> Peer:
    """One peer of a configuration round this model."""
    row = CohortGraph.of(config.peers).peers[index]
    return Peer(index, config.peers[index], model, row, seed=config.run.seed, step=config.step)


def first_view(peer: Peer, x: Tensor, y: Tensor, step: int = 0, first_row: int = 0) -> Tensor:
    """The AEs of a peer's first view."""
    view = View(peer.index)
    return peer.attack(Batch(x, y, step, first_row), [view])[view]


def local(cohort: Cohort, step: int, data: Callable[..., tuple[Tensor, Tensor]] = batch) -> Batch:
    """This replica's rows of the batch of a step, in the precision of the cohort."""
    x, y = data(step, BATCH, torch.float64 if cohort.step.precision == "fp64" else torch.float32)
    return Batch(x[cohort.rows], y[cohort.rows], step, cohort.rows.start)


def one_step(cohort: Cohort, step: int, *, data: Callable[..., tuple[Tensor, Tensor]] = batch,
             **options: Any) -> Outcome:
    """One step on the batch of that step, with options of `train_step`."""
    return train_step(cohort, local(cohort, step, data), **options)


def train(config: Config, mesh: Mesh, models: list[nn.Module], steps: int, *, log: bool = False,
          data: Callable[..., tuple[Tensor, Tensor]] = batch, cohort: Cohort | None = None, first: int = 0) -> Cohort:
    """Run the steps from `first` on; the batch is a function of the step, each replica takes its rows."""
    cohort = cohort or build(config, mesh, models)
    for step in range(first, steps):
        one_step(cohort, step, data=data, log=log)
    return cohort


def broken(*args: Any, **kwargs: Any) -> Any:
    """Takes the place of a method that fails."""
    raise RuntimeError("the cat sat on the cable")


def exploding(peer: Peer) -> None:
    """Let a peer's logits be infinite where it learns."""
    peer.learn = lambda x, draw, learn=peer.learn: learn(x, draw) * float("inf")  # type: ignore[method-assign]


def states(cohorts: list[Cohort]) -> dict[int, dict[str, Any]]:
    """State of every peer, of the first replica that has it."""
    return {peer.index: peer.state() for cohort in reversed(cohorts) for peer in cohort.peers}


def state_hashes(cohort: Cohort) -> dict[int, str]:
    """Of the local peers."""
    return {peer.index: state_hash(peer.state()) for peer in cohort.peers}


def resumed_and_refused(train: Callable[..., Cohort], steps: int, cut: int) -> None:
    """A run that is stored after `cut` steps and resumed ends as one in one go, and a step that is refused after the
    cut leaves no trace.

    Args:
        train: (steps, cohort=, first=) -> the cohort after them.
    """
    whole, first, resumed = train(steps), train(cut), train(0)
    for peer, stored in zip(resumed.peers, first.peers, strict=True):
        peer.load(copy.deepcopy(stored.state()))
    train(steps, cohort=resumed, first=cut)
    assert state_hashes(whole) == state_hashes(resumed)
    before = state_hashes(first)
    exploding(first.peers[0])
    with pytest.raises(NonFinite):
        train(cut + 1, cohort=first, first=cut)
    assert state_hashes(first) == before


def failed_step(cohort: Cohort, method: str, *, here: bool, step: int = 0) -> MatError:
    """The error of a step in which `method` of the first peer, or of its first hook, of some rank is `broken`.

    Args:
        here: whether it is this rank's.
    """
    if here:
        peer = cohort.peers[0]
        setattr(peer if hasattr(peer, method) else peer.hooks[0], method, broken)
    with pytest.raises(MatError) as caught:
        one_step(cohort, step)
    return caught.value


def hashes(cohorts: list[Cohort]) -> dict[int, str]:
    """State hash of every peer; replicas must agree."""
    found: dict[int, set[str]] = {}
    for cohort in cohorts:
        for index, one in state_hashes(cohort).items():
            found.setdefault(index, set()).add(one)
    assert all(len(h) == 1 for h in found.values())
    return {i: h.pop() for i, h in sorted(found.items())}


def largest_difference(one: list[Cohort], other: list[Cohort]) -> float:
    """Over all weights and buffers of all peers."""
    a, b = states(one), states(other)
    return max((v.double() - b[i]["model"][k].double()).abs().max().item() for i in a for k, v in a[i]["model"].items())
