"""Scopes restore exactly what they found; norm layers count forwards as told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.config.schema import ModelConfig
from mat_dist.models import build_model
from mat_dist.models.modes import batch_stats_only, frozen, saved_buffers, set_bn_forwards, split_norm_bias

Scope = Callable[[nn.Module], AbstractContextManager[None]]
both = pytest.mark.parametrize("scope", [frozen, batch_stats_only])


def model_with_mixed_flags() -> nn.Module:
    """Train mode, but one norm layer in eval mode and two parameters without gradient."""
    with rng.keyed_rng(0):
        model = build_model(ModelConfig(name="tiny_cnn"), shape=(1, 8, 8), classes=4, mean=[0.5], std=[0.5])
    model.train()
    model.get_submodule("net.1.1").eval()
    model.get_parameter("net.0.0.weight").requires_grad_(False)
    model.get_parameter("net.4.bias").requires_grad_(False)
    return model


def flags(model: nn.Module) -> tuple[list[object], ...]:
    return ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()],
            [getattr(m, "track_running_stats", None) for m in model.modules()])


def x_BCHW(rows: int = 6) -> Tensor:
    return rng.uniform(5, (rows, 1, 8, 8))


def snapshot(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@both
def test_flags_are_restored_one_by_one(scope: Scope) -> None:
    model = model_with_mixed_flags()
    before = flags(model)
    with scope(model):
        assert flags(model) != before
        with frozen(model), batch_stats_only(model):
            model(x_BCHW())
    assert flags(model) == before


@both
def test_flags_are_restored_after_an_exception(scope: Scope) -> None:
    model = model_with_mixed_flags()
    before = flags(model)
    with pytest.raises(ZeroDivisionError), scope(model):
        raise ZeroDivisionError
    assert flags(model) == before


@both
def test_flags_are_restored_when_a_module_refuses_the_mode(scope: Scope) -> None:
    class Stubborn(nn.Linear):
        def train(self, mode: bool = True) -> Stubborn:
            raise RuntimeError("no")

    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), Stubborn(2, 2))
    model[1].training = False
    before = flags(model)
    with pytest.raises(RuntimeError, match="no"), scope(model):
        pass
    assert flags(model) == before


def test_a_frozen_model_gives_input_gradients_and_keeps_its_state() -> None:
    model = model_with_mixed_flags()
    before = snapshot(model)
    x = x_BCHW().requires_grad_(True)
    with frozen(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        gradient, = torch.autograd.grad(model(x).logsumexp(1).sum(), x)
    assert gradient.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())
    assert same(before, snapshot(model))


def test_batch_stats_only_gives_train_mode_logits_and_leaves_the_buffers() -> None:
    model = model_with_mixed_flags().train()
    reference = copy.deepcopy(model)
    before = snapshot(model)
    expected = reference(x_BCHW())
    with batch_stats_only(model):
        logits = model(x_BCHW())
    assert torch.equal(logits, expected)
    assert same(before, snapshot(model))
    assert not same(before, snapshot(reference))
    model(x_BCHW())  # tracking goes on afterwards
    assert same(snapshot(model), snapshot(reference))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_several_forwards_on_constant_statistics_weigh_as_one(norm: type[nn.Module], count: int) -> None:
    once, several = (norm(3, momentum=0.1, track_running_stats=True).double() for _ in range(2))
    set_bn_forwards(several, count)
    x = rng.normal(1, (4, 3, 5, 5), dtype=torch.float64) * 3 + 2
    once(x)
    for _ in range(count):
        several(x)
    torch.testing.assert_close(several.running_mean, once.running_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(several.running_var, once.running_var, rtol=1e-12, atol=0)


def test_the_momentum_is_always_taken_from_the_original_one() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=0.3), nn.BatchNorm1d(2, momentum=None), nn.GroupNorm(1, 2))
    for count, momentum in ((4, 1 - 0.7**0.25), (4, 1 - 0.7**0.25), (2, 1 - 0.7**0.5), (1, 0.3)):
        set_bn_forwards(model, count)
        assert model[0].momentum == momentum
        assert model[1].momentum is None
    set_bn_forwards(copied := copy.deepcopy(model), 2)
    assert copied[0].momentum == 1 - 0.7**0.5


def test_saved_buffers_come_back_as_the_same_tensors_also_where_one_is_shared_replaced_or_new() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Identity(), nn.Identity())
    shared = torch.ones(2)
    for module in model[1:]:
        module.register_buffer("table", shared)
        module.register_buffer("latest", None)
    before, restore = snapshot(model), saved_buffers(model)
    with batch_stats_only(model):
        assert model[1].table is model[2].table and model[1].table is not shared
        model[1].table.fill_(5)
    assert model[1].table is shared and same(before, snapshot(model))
    model(x_BCHW())
    shared.fill_(float("nan"))
    model[1].table, model[1].latest = torch.zeros(3), torch.zeros(1)
    restore()
    assert model[1].table is shared is model[2].table and model[1].latest is None and same(before, snapshot(model))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_norm_layers_and_biases_are_split_from_the_other_weights(norm: str) -> None:
    model = build_model(ModelConfig(name="resnet18", width=0.125, norm=norm), shape=(3, 8, 8), classes=4,
                        mean=[0.5] * 3, std=[0.5] * 3)
    decayed, spared = split_norm_bias(model)
    expected_decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {id(p) for p in decayed} == expected_decayed
    assert {id(p) for p in spared} == {id(p) for p in model.parameters()} - expected_decayed
    assert len(decayed) + len(spared) == len(list(model.parameters()))
