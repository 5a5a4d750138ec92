"""Batch norm over replicas: outputs, gradients and running statistics are those of one process with the whole batch."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.models.modes import batch_stats_only
from mat_dist.models.synchronised import SynchronisedNorms

ROWS = 8


class Activated(nn.BatchNorm2d):
    """A norm layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.3).relu()


class Written(nn.Module):
    """A norm that is no layer of torch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=self.training, momentum=0.2)


def net(layer: Callable[[int], nn.Module]) -> nn.Module:
    with rng.keyed_rng(3):
        return nn.Sequential(nn.Conv2d(3, 4, 3), layer(4), nn.Conv2d(4, 5, 3), layer(5), nn.Flatten(), nn.Linear(80, 6),
                             nn.BatchNorm1d(6, momentum=None)).double()


class Exchange:
    """What replicas that are threads hand each other."""

    def __init__(self, replicas: int) -> None:
        self.all_here, self.rows = threading.Barrier(replicas, timeout=20), [torch.empty(0)] * replicas

    def of(self, rank: int) -> Callable[[Tensor], Tensor]:
        def gather(row: Tensor) -> Tensor:
            self.rows[rank] = row.detach().clone()
            self.all_here.wait()
            found = torch.cat(self.rows)
            self.all_here.wait()
            return found

        return gather


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    x = 3 * rng.uniform(1, (ROWS, 3, 8, 8), dtype=torch.float64) + 1
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def in_shards(model: nn.Module, x: Tensor, replicas: int, **scope: bool) -> list[tuple[nn.Module, Tensor]]:
    """Copies of the model after two forwards and backwards of each replica's rows, and the last outputs."""
    exchange = Exchange(replicas)

    def one(rank: int) -> tuple[nn.Module, Tensor]:
        own, rows = copy.deepcopy(model), slice(rank * len(x) // replicas, (rank + 1) * len(x) // replicas)
        for factor in (1, 2):
            with SynchronisedNorms(exchange.of(rank)):
                out = own(x[rows] * factor)
            target = rng.uniform(7, out.shape, first_row=rows.start, dtype=torch.float64)
            ((out.double() - target) ** 2).mean().backward()
        return own, out.detach()

    with ThreadPoolExecutor(replicas) as pool:
        return [future.result() for future in [pool.submit(one, rank) for rank in range(replicas)]]


def plain(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    own = copy.deepcopy(model)
    for factor in (1, 2):
        out = own(x * factor)
        ((out.double() - rng.uniform(7, out.shape, dtype=torch.float64)) ** 2).mean().backward()
    return own, out.detach()


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "plain": nn.BatchNorm2d, "no weights": lambda c: nn.BatchNorm2d(c, affine=False),
    "batch statistics alone": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "a forward of its own": Activated, "written by hand": Written}


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("layer", LAYERS)
def test_replicas_compute_what_one_process_computes_to_1e_9_in_fp64(layer: str, replicas: int) -> None:
    model, x = net(LAYERS[layer]), images()
    one, out = plain(model, x)
    shards = in_shards(model, x, replicas)
    assert (torch.cat([part for _, part in shards]) - out).abs().max() < 1e-9
    gradients = [torch.stack([p.grad for p in ps]).mean(0) for ps in zip(*(own.parameters() for own, _ in shards),
                                                                        strict=True)]
    assert max((g - p.grad).abs().max() for g, p in zip(gradients, one.parameters(), strict=True)) < 1e-9
    for own, _ in shards:
        assert all(torch.allclose(b, c, rtol=0, atol=1e-9) for b, c in zip(own.buffers(), one.buffers(), strict=True))
        assert all(torch.equal(b, c) for b, c in zip(own.buffers(), shards[0][0].buffers(), strict=True))


def test_one_image_per_replica_is_a_batch_and_one_value_in_all_is_none() -> None:
    model, x = nn.BatchNorm1d(3).double(), rng.normal(1, (2, 3), dtype=torch.float64)
    _, out = plain(model, x)
    shards = in_shards(model, x, 2)
    assert torch.allclose(torch.cat([part for _, part in shards]), out, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="more than one value per channel"):
        in_shards(model, x[:1], 1)


def test_half_precision_is_as_exact_as_that_of_one_process() -> None:
    model, x = net(nn.BatchNorm2d).float(), images(torch.float32)
    exact = plain(model, x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        alone = plain(model, x)[1]
        (found,) = [out for _, out in in_shards_autocast(model, x)]
    assert (found - exact).norm() < 1.5 * (alone - exact).norm()


def in_shards_autocast(model: nn.Module, x: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """One replica, in this thread: autocast is a thread's own."""
    own = copy.deepcopy(model)
    for factor in (1, 2):
        with SynchronisedNorms(lambda row: row):
            out = own(x * factor)
        ((out.double() - rng.uniform(7, out.shape, dtype=torch.float64)) ** 2).mean().backward()
    return [(own, out.detach())]


def test_eval_mode_and_forwards_without_a_trace_exchange_and_leave_what_they_should() -> None:
    model, x, asked = net(nn.BatchNorm2d), images(), []

    def gather(row: Tensor) -> Tensor:
        asked.append(row.shape)
        return row

    before = copy.deepcopy(model.state_dict())
    with SynchronisedNorms(gather), torch.no_grad():
        with batch_stats_only(model):
            model(x)
        assert len(asked) == 3
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        expected = copy.deepcopy(model).eval()(x)
        assert torch.equal(model.eval()(x), expected) and len(asked) == 3
