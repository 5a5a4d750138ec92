"""When an attempt runs out of memory, nothing of it is alive as it is tried again with less."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mat_dist.attacks.norms import Threat
from mat_dist.core import step as steps
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.placement import Placement
from mat_dist.evaluation.attacks import AttackPlan, crafted
from mat_dist.training import capture
from tests.cohorts import BATCH, SHAPE, batch, build, cohort_config, first_view, make_peer, nets, one_step
from tests.recorder import CpuRecorder

HELD_BY = ["nobody", "the model", "a cycle", "another error"]


class Node(torch.autograd.Function):
    """A node of a graph, at the images, whose life can be watched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, model: Short) -> Tensor:
        ctx.life, ctx.model, ctx.rows = Life(), model, len(x)
        model.lives.append(weakref.ref(ctx.life))
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.model.lack("backward", grad)
        return grad, None


class Life: ...


class Short(nn.Module):
    """Has memory for graphs of so many images at most, and runs out in the forward or the backward pass.

    Args:
        holder: what else keeps the error, and so the frames that it went through.

    Attributes:
        alive: at each call after a failure, how many nodes of earlier attempts there still are.
    """

    def __init__(self, model: nn.Module, most: int, where: str, holder: str) -> None:
        super().__init__()
        self.model, self.most, self.where, self.holder = model, most, where, holder
        self.lives: list[weakref.ref[Life]] = []
        self.failures: list[Any] = []
        self.alive: list[int] = []

    def lack(self, where: str, tensor: Tensor) -> None:
        if where != self.where or len(tensor) <= self.most:
            return
        error = torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        if self.holder != "a cycle":
            self.failures.append(error if self.holder == "the model" else None)
            try:
                raise error
            finally:
                del error
        self.failures.append(None)
        raise error  # which this frame holds, and which holds this frame

    def forward(self, x: Tensor) -> Tensor:
        if self.failures:
            self.alive.append(sum(life() is not None for life in self.lives))
            self.lives.clear()
        x = Node.apply(x, self) if x.requires_grad else x
        logits: Tensor = self.model(x)
        try:
            if x.requires_grad:
                self.lack("forward", logits)
        except torch.OutOfMemoryError as error:
            if self.holder != "another error":
                raise
            raise torch.OutOfMemoryError("in a block") from error
        return logits


@pytest.fixture(autouse=True)
def by_hand() -> Iterator[None]:
    """Garbage is collected where the code asks for it, not by chance; what was there before takes no part, nor time."""
    gc.disable()
    gc.freeze()
    yield
    gc.unfreeze()
    gc.enable()


@pytest.fixture(params=[(where, holder) for where in ("forward", "backward") for holder in HELD_BY], ids="-".join)
def short(request: pytest.FixtureRequest) -> Callable[[nn.Module, int], Short]:
    return lambda model, most: Short(model, most, *request.param)


@pytest.mark.parametrize("entry", [{"attack": {"method": "pgd", "steps": 2}},
                                   {"attack": {"method": "apgd", "steps": 2}},
                                   {"attack": {"method": "n_fgsm", "steps": 1}},
                                   {"union": {"strategy": "msd", "threats": "linf:0.1,l2:1"}}],
                         ids=["pgd", "apgd", "n_fgsm", "msd"])
def test_an_attack_of_training_goes_on_in_halves_without_the_whole_one(
        entry: dict[str, Any], short: Callable[[nn.Module, int], Short]) -> None:
    config = cohort_config("at", 1, entry=entry)
    model = short(nets(1)[0], BATCH // 2)
    peer, (x, y) = make_peer(model, config), batch(0)
    peer.attack_of_training._called = model  # not a copy
    assert first_view(peer, x, y).shape == x.shape
    assert model.failures and model.alive[0] == 0


@pytest.mark.parametrize("threat", [Threat("linf", 0.1), Threat("l1", 1.0)], ids=lambda threat: threat.norm)
def test_an_attack_of_the_evaluation_goes_on_in_parts_without_the_larger_ones(
        threat: Threat, short: Callable[[nn.Module, int], Short]) -> None:
    model = short(nets(1)[0], 3)
    x, y = batch(0, 11)
    (found,) = crafted(model, x, y, threat, AttackPlan(2), seed=4, chunk=1)
    assert found.shape == (11, *SHAPE)
    assert len(model.failures) == 2 and model.alive[0] == 0
    assert max(model.alive) <= 1  # of the step before, in the same attempt


def test_a_step_that_cannot_be_recorded_runs_eagerly_without_what_was_recorded(
        short: Callable[[nn.Module, int], Short], monkeypatch: pytest.MonkeyPatch) -> None:
    model, alive = short(nets(1)[0], 0), []

    def record(*_: Any) -> None:
        model(batch(0)[0].requires_grad_()).sum().backward()

    def compute(*given: Any, plain: Any = steps.compute) -> Any:
        alive.append([len(model.failures), sum(life() is not None for life in model.lives)])
        return plain(*given)

    monkeypatch.setattr(capture.Tape, "record", record)
    monkeypatch.setattr(steps, "compute", compute)
    mesh = Mesh(Placement.place(1, 1, 0), torch.device("cpu"))
    cohort = build(cohort_config("at", 1, step={"engine": "graph"}), mesh, nets(1))
    notes: list[str] = []
    work = capture.captured_steps(cohort, notes.append, CpuRecorder())
    for step in range(2):
        one_step(cohort, step, compute=work)
    assert alive == [[0, 0], [1, 0]] and len(notes) == 1 and "OutOfMemoryError" in notes[0]
