"""Small cohorts for tests: real steps on random images, models built before any thread starts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.config.presets import fill_attack, fill_loss, fill_threat
from mat_dist.config.schema import Config
from mat_dist.core.cohort import Cohort, state_hash
from mat_dist.core.step import train_step
from mat_dist.distributed.groups import Mesh
from mat_dist.errors import MatError, NonFinite

SHAPE, CLASSES, BATCH = (2, 6, 6), 5, 8


def complete(raw: dict[str, Any]) -> Config:
    """A resolved configuration from a plain dict whose `peers` is a list of complete or partial entries."""
    config = Config.model_validate(raw)
    peers = []
    for i, peer in enumerate(config.peers):
        loss = fill_loss(peer.loss, i, len(config.peers), peer.role, peer.union)
        threat = fill_threat(peer.threat, peer.union)
        attack = fill_attack(peer.attack, peer.loss.preset, i, threat)
        stream = i if peer.stream is None else peer.stream
        peers.append(peer.model_copy(update={"loss": loss, "threat": threat, "attack": attack, "stream": stream,
                                             "name": peer.name or f"peer{i}"}))
    return config.model_copy(update={"peers": tuple(peers)})


def cohort_config(preset: str | list[str] = "mat", peers: int = 4, *, norm: str = "linf", eps: float = 0.1,
                  steps: int = 3, loss: dict[str, Any] | None = None, optim: dict[str, Any] | None = None,
                  entry: dict[str, Any] | None = None, **sections: Any) -> Config:
    """`peers` equal peers of one preset (or one preset each)."""
    presets = [preset] * peers if isinstance(preset, str) else preset
    entries = [{"threat": {"norm": norm, "eps": eps}, "attack": {"steps": steps}, "loss": {"preset": p, **(loss or {})},
                "optim": {"lr": 0.1, "schedule": "constant", **(optim or {})}, **(entry or {})} for p in presets]
    return complete({"peers": entries, "train": {"batch_size": BATCH, "epochs": 1000}, **sections})


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


def build(config: Config, mesh: Mesh, models: list[nn.Module]) -> Cohort:
    """The cohort of one rank round copies of the models of all peers."""
    mine = [copy.deepcopy(models[i]) for i in mesh.placement.local_peers]
    return Cohort.build(config, mesh, None, steps_per_epoch=10, models=mine)  # type: ignore[arg-type]


def train(config: Config, mesh: Mesh, models: list[nn.Module], steps: int, *, dtype: torch.dtype = torch.float32,
          log: bool = False, data: Callable[..., tuple[Tensor, Tensor]] = batch) -> Cohort:
    """Run some steps; the batch is a function of the step, each replica takes its rows."""
    cohort = build(config, mesh, models)
    for step in range(steps):
        cohort.begin(step)
        x, y = data(step, config.train.batch_size, dtype)
        train_step(cohort, x[cohort.rows], y[cohort.rows], step, log=log)
    return cohort


def resumed_and_refused(train: Callable[..., Cohort], steps: int, cut: int) -> tuple[str, str]:
    """What peer 0 is after `steps` in one go, and when it was stored after `cut` and resumed -> hashes of its state.

    On the way a step that is refused after the cut must leave no trace.

    Args:
        train: (steps, cohort=, first=) -> the cohort after them.
    """
    whole, first, resumed = train(steps), train(cut), train(0)
    resumed.peers[0].load(first.peers[0].state())
    train(steps, cohort=resumed, first=cut)
    before, peer = state_hash(first.peers[0].state()), first.peers[0]
    peer.learn = lambda x, draw, learn=peer.learn: learn(x, draw) * float("inf")  # type: ignore[method-assign]
    with pytest.raises(NonFinite):
        train(cut + 1, cohort=first, first=cut)
    assert state_hash(peer.state()) == before
    return state_hash(whole.peers[0].state()), state_hash(resumed.peers[0].state())


def failed_step(cohort: Cohort, method: str, text: str, *, here: bool) -> str:
    """What a rank says of a step in which `method` of the first peer of some rank raises RuntimeError(text).

    Args:
        here: whether it is this rank's.
    """
    def broken(*args: Any) -> Any:
        raise RuntimeError(text)

    if here:
        setattr(cohort.peers[0], method, broken)
    x, y = batch(0)
    with pytest.raises(MatError) as caught:
        train_step(cohort, x[cohort.rows], y[cohort.rows], 0)
    return str(caught.value)


def hashes(cohorts: list[Cohort]) -> dict[int, str]:
    """State hash of every peer; replicas must agree."""
    found: dict[int, set[str]] = {}
    for cohort in cohorts:
        for peer in cohort.peers:
            found.setdefault(peer.index, set()).add(state_hash(peer.state()))
    assert all(len(h) == 1 for h in found.values())
    return {i: h.pop() for i, h in sorted(found.items())}


def largest_difference(one: list[Cohort], other: list[Cohort]) -> float:
    """Over all weights and buffers of all peers."""
    def states(cohorts: list[Cohort]) -> dict[int, dict[str, torch.Tensor]]:
        return {p.index: p.model.state_dict() for c in cohorts for p in c.peers}
    a, b = states(one), states(other)
    return max((a[i][k].double() - b[i][k].double()).abs().max().item() for i in a for k in a[i])
