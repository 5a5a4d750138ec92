"""Models that nobody foresaw: whatever they draw in a forward and whatever buffers they keep, a run is the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.distributed.groups import Mesh
from mat_dist.errors import NonFinite
from tests.cohorts import (
    SHAPE,
    Net,
    batch,
    build,
    cohort_config,
    exploding,
    hashes,
    largest_difference,
    make_peer,
    one_step,
    state_hashes,
    train,
)

Run = Callable[..., list[Any]]


class Body(nn.Module):
    """The small net, with something between the images and it."""

    def __init__(self, change: Callable[..., Tensor] | None = None, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.change, self.layer, self.net = change, layer, Net("group")

    def forward(self, x: Tensor) -> Tensor:
        x = self.change(x, self.training) if self.change else x
        out: Tensor = self.net(self.layer(x) if self.layer is not None else x)
        return out


def attended(x: Tensor, training: bool) -> Tensor:
    rows = x.flatten(2).transpose(1, 2)
    seen = F.scaled_dot_product_attention(rows, rows, rows, dropout_p=0.5 if training else 0.0)
    return x + seen.transpose(1, 2).reshape(x.shape)


DRAWS: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "functional dropout": lambda x, training: F.dropout(x, 0.3, training),
    "dropout that is never off": lambda x, training: F.dropout(x, 0.3),
    "noise": lambda x, training: x + 0.1 * torch.randn_like(x) if training else x,
    "noise in eval mode too": lambda x, training: x + 0.1 * torch.rand_like(x),
    "attention dropout": attended,
    "rrelu": lambda x, training: F.rrelu(x - 0.5, training=training),
    "a coin of Python": lambda x, training: x * (0.5 + random.random()),
    "a coin of numpy": lambda x, training: x * float(np.random.uniform(0.5, 1.5)),
}


def models(count: int, make: Callable[[], nn.Module]) -> list[nn.Module]:
    made = []
    for number in range(count):
        with rng.keyed_rng(number):
            made.append(make())
    return made


@pytest.mark.parametrize("name", DRAWS)
def test_ranks_logs_and_the_past_do_not_change_what_a_model_draws(name: str, run_ranks: Run,
                                                                  one_draws_at_a_time: None) -> None:
    nets, config = models(2, lambda: Body(DRAWS[name])), cohort_config("mat", 2)
    one = run_ranks(lambda mesh: train(config, mesh, nets, 2), 2, 1)
    torch.rand(7)
    random.random()
    np.random.rand()
    assert hashes(run_ranks(lambda mesh: train(config, mesh, nets, 2, log=True), 2, 2)) == hashes(one)


@pytest.mark.parametrize("step", [{"memory": "recompute"}, {"teachers": "ema"}], ids=str)
def test_a_model_that_always_draws_draws_alike_however_a_step_is_made(step: dict[str, str], run_ranks: Run,
                                                                      one_draws_at_a_time: None) -> None:
    nets = models(2, lambda: Body(DRAWS["noise in eval mode too"]))
    config = cohort_config("mat", 2, optim={"ema_decay": 0.5}, step=step)
    runs = [run_ranks(lambda mesh: train(config, mesh, nets, 2), 2, world) for world in (1, 2)]
    assert hashes(runs[0]) == hashes(runs[1])


def test_what_a_model_draws_depends_on_the_peer_and_the_step() -> None:
    seen: list[Tensor] = []

    def noise(x: Tensor, training: bool) -> Tensor:
        seen.append(torch.randn_like(x))
        return x + seen[-1]

    for stream, step in ((0, 0), (1, 0), (0, 1), (0, 0)):
        peer = make_peer(Body(noise), cohort_config("at", 1, entry={"stream": stream}))
        peer.learn(batch(0)[0], (step, 0, 0))
    assert torch.equal(seen[0], seen[3]) and not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])


# ------------------------------------------------------------------------------------------------ buffers


class Rebinding(nn.Module):
    """A mean of its inputs that is a new tensor in each forward, and a counter of them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(SHAPE[0]))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("latest", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
            self.count += 1
            self.latest = x.detach().amax()
        return x - self.mean.view(1, -1, 1, 1)


BUFFERS: dict[str, Callable[[], nn.Module]] = {
    "instance norm": lambda: nn.InstanceNorm2d(SHAPE[0], affine=True, track_running_stats=True),
    "batch norm": lambda: nn.BatchNorm2d(SHAPE[0]),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(SHAPE[0], SHAPE[0], 3, padding=1)),
    "own statistics": Rebinding,
}
some_buffers = pytest.mark.parametrize("name", BUFFERS)


def kept(cohort: Any) -> list[tuple[str, Any]]:
    return [(name, None if value is None else value.clone()) for peer in cohort.peers
            for module in peer.model.modules() for name, value in module._buffers.items()]


@some_buffers
def test_a_refused_step_leaves_no_trace_in_any_buffer(name: str, run_ranks: Run) -> None:
    def one(mesh: Mesh) -> None:
        cohort = build(cohort_config("mat", 2), mesh, models(2, lambda: Body(layer=BUFFERS[name]())))
        for step in range(2):
            before, state = kept(cohort), state_hashes(cohort)
            learn = cohort.peers[0].learn
            exploding(cohort.peers[0])
            with pytest.raises(NonFinite):
                one_step(cohort, step)
            cohort.peers[0].learn = learn
            for (where, old), (_, new) in zip(before, kept(cohort), strict=True):
                assert old is new is None or torch.equal(old, new), where
            assert state_hashes(cohort) == state
            one_step(cohort, step)
        assert state_hashes(cohort) != state

    run_ranks(one, 2, 1)


@some_buffers
def test_buffers_do_not_depend_on_logs_ranks_or_memory_and_are_the_same_on_all_replicas(name: str,
                                                                                         run_ranks: Run) -> None:
    """Memory: where the logits of train mode do not depend on them. `recompute` runs a model more often."""
    nets = models(2, lambda: Body(layer=BUFFERS[name]()).double())
    plain, recomputed = (cohort_config("mat", 2, step={"precision": "fp64", "memory": memory})
                         for memory in ("keep", "recompute"))
    one = run_ranks(lambda mesh: train(plain, mesh, nets, 2), 2, 1)
    assert hashes(run_ranks(lambda mesh: train(plain, mesh, nets, 2, log=True), 2, 2)) == hashes(one)
    if name in ("instance norm", "batch norm"):
        assert largest_difference(one, run_ranks(lambda mesh: train(recomputed, mesh, nets, 2), 2, 1)) < 1e-11
    replicas = run_ranks(lambda mesh: train(plain, mesh, nets, 2), 2, 4)
    assert len(hashes(replicas)) == 2  # which compares them


def test_constants_of_a_model_are_the_same_after_steps_on_three_replicas(run_ranks: Run) -> None:
    """In fp32 a third of three times a number is sometimes its neighbour."""
    def constant() -> nn.Module:
        net = Body(lambda x, training: x)
        net.register_buffer("table", torch.linspace(0.1, 0.9, 999))
        return net

    nets, config = models(1, constant), cohort_config("at", 1, train={"batch_size": 6, "epochs": 9})
    for cohort in run_ranks(lambda mesh: train(config, mesh, nets, 1, data=few), 1, 3):
        assert torch.equal(cohort.peers[0].model.table, torch.linspace(0.1, 0.9, 999))


def few(step: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rng.uniform(step, (6, *SHAPE), dtype=dtype), torch.arange(6) % 5
