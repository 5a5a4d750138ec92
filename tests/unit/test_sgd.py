"""Our SGD is torch's: the same bits, and state dicts that fit each other."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from mat_dist.core.sgd import SGD

SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def groups(model: nn.Module) -> list[dict]:
    parameters = list(model.parameters())
    return [{"params": parameters[:3]}, {"params": parameters[3:], "weight_decay": 0.0}]


def train(model: nn.Module, optimizer, steps: int, first: int = 0) -> None:
    for n in range(first, first + steps):
        generator = torch.Generator().manual_seed(n)
        model(torch.randn(8, 5, generator=generator)).tanh().sum().backward()
        if n == 1:
            next(model.parameters()).grad = None  # a parameter that took no part in one step
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + n)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("changed", [{}, {"momentum": 0.0, "nesterov": False}, {"nesterov": False}])
def test_weights_are_bitwise_those_of_torch(changed):
    settings = {**SETTINGS, **changed}
    ours, theirs = net(), net()
    train(ours, SGD(groups(ours), **settings), 4)
    train(theirs, torch.optim.SGD(groups(theirs), **settings), 4)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("first, second", [(SGD, torch.optim.SGD), (torch.optim.SGD, SGD), (SGD, SGD)])
def test_a_state_of_either_continues_in_the_other_bitwise(first, second):
    model = net()
    optimizer = first(groups(model), **SETTINGS)
    train(model, optimizer, 3)
    again = copy.deepcopy(model)
    continued = second(groups(again), **SETTINGS)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 3, first=3)
    train(again, continued, 3, first=3)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_other_groups_is_refused():
    model = net()
    optimizer = SGD(groups(model), **SETTINGS)
    with pytest.raises(ValueError, match=r"\[6\]"):
        optimizer.load_state_dict(SGD([{"params": model.parameters()}], **SETTINGS).state_dict())


def test_the_compiler_is_not_imported():
    code = ("import sys; from mat_dist.core.sgd import SGD; import torch; p = torch.nn.Parameter(torch.ones(2));"
            "o = SGD([{'params': [p]}], lr=0.1, momentum=0.9, weight_decay=0.0, nesterov=False);"
            "p.sum().backward(); o.step(); print('torch._dynamo' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
