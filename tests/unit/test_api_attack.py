"""`mat_dist.attack`: any model, left as it was; what cannot be used is one error of ours."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mat_dist
import mat_dist.api.evaluation  # importing it draws from Python's generator
from mat_dist import rng
from mat_dist.attacks import Threat, pgd
from mat_dist.errors import ConfigError, DataError, EnvironmentFault, MatError, NotReportable
from mat_dist.evaluation.settings import MENU
from mat_dist.models import Normalize


class Restless(nn.Module):
    """Counts its calls in a buffer, also in eval mode, replaces another one, and draws from the global generators."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach().mean()
        return x + 0 * (torch.rand(()) + random.random())


def network(channels: int = 1, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Restless(), nn.Dropout(0.5),
                           nn.Flatten(), nn.Linear(4 * 36, classes))
    layers(torch.rand(8, channels, 8, 8))  # statistics that matter
    return layers


def batch(count: int = 6, channels: int = 1, classes: int = 4) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, 8, 8, generator=draw), torch.randint(classes, (count,), generator=draw)


def state(model: nn.Module) -> list[Any]:
    """All of a model that an attack could change, and the global generators."""
    return [[(name, m.training) for name, m in model.named_modules()],
            [(p.requires_grad, p.tolist(), None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
            [(id(b), b._version, b.tolist()) for b in model.buffers()], [len(m._forward_hooks) + len(
                m._forward_pre_hooks) for m in model.modules()], torch.get_rng_state().tolist(), random.getstate()]


def mixed() -> nn.Sequential:
    """Modes, frozen parameters and gradients of all kinds."""
    model = network().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    model[6].bias.grad = torch.ones(4)
    return model


@pytest.mark.parametrize("threat", ["linf:8/255", "l2:1/2", Threat("l1", 2.0)])
@pytest.mark.parametrize("method", [name for name, kind in MENU.items() if kind.maker != "package"] + [
    pytest.param("apgd-ce", marks=pytest.mark.slow)])
def test_every_attack_stays_in_the_ball_and_leaves_the_model_as_it_was(method, threat):
    norm = threat.norm if isinstance(threat, Threat) else threat.partition(":")[0]
    if MENU[method].norm not in ("", norm):
        pytest.skip("not its norm")
    x, y = batch()
    model, few = mixed(), {"queries": 9} if method == "search" else {"steps": 2} if method != "apgd-ce" else {}
    before = state(model)
    adv = mat_dist.attack(model, x, y, threat, method, **few)
    assert state(model) == before
    assert adv.shape == x.shape and adv.dtype == x.dtype and adv.min() >= 0 and adv.max() <= 1
    assert not adv.requires_grad and (adv != x).any()
    ball = threat if isinstance(threat, Threat) else {"linf": Threat("linf", 8 / 255), "l2": Threat("l2", 0.5)}[
        threat.partition(":")[0]]
    assert ball.distance(adv, x).max() <= ball.eps * (1 + 1e-5)


def test_the_examples_are_those_of_the_attack_by_hand():
    x, y = batch()
    model = network().eval().requires_grad_(False)
    region = Threat("l2", 0.5).region(x)
    start = region.start("uniform", stream=rng.key(7, "eval-l2", 0, 0))
    by_hand = pgd(model, x, y, region=region, start_BCHW=start, loss="ce", steps=3, step_size=2.5 * 0.5 / 3)
    found = mat_dist.attack(model, x, y, "l2:0.5", steps=3, seed=7)
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-5)  # batch norm is folded into the convolution: rounding
    assert torch.equal(mat_dist.attack(model.train(), x, y.tolist(), "l2:0.5", steps=3, seed=7), found)


def test_an_image_that_is_wrong_already_is_attacked_too_and_restarts_help():
    x, _ = batch(32)
    model = network().eval()
    y = (model(x).argmax(1) + 1) % 4
    assert (mat_dist.attack(model, x, y, steps=1) != x).flatten(1).any(1).all()
    y = model(x).argmax(1)
    one, several = (mat_dist.attack(model, x, y, "l2:0.3", steps=1, restarts=count, seed=3) for count in (1, 6))
    held = [int((model(adv).argmax(1) == y).sum()) for adv in (one, several)]
    assert held[1] <= held[0] < 32


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_there_wherever_it_is_called(around):
    x, y = batch()
    model = network()
    plain = mat_dist.attack(model, x, y, steps=2)
    with around():
        assert torch.equal(mat_dist.attack(model, x.clone(), y, steps=2), plain)
    with_grad = x.clone().requires_grad_(True)
    assert torch.equal(mat_dist.attack(model, with_grad * 1, y, steps=2), plain) and with_grad.grad is None


def test_a_backward_pass_that_was_begun_before_can_be_ended_after():
    x, y = batch()
    model = network().eval()  # batch norm in eval mode keeps its buffers for the backward pass
    loss = model(x.clone().requires_grad_(True)).sum()
    mat_dist.attack(model, x, y, steps=1)
    loss.backward()
    assert model[0].weight.grad is not None


def test_mean_and_std_are_a_layer_before_the_model():
    x, y = batch(channels=3)
    mean, std = [0.4, 0.5, 0.6], torch.tensor([0.2, 0.25, 0.3])
    model = network(3).eval()
    whole = nn.Sequential(Normalize(mean, std.tolist()), model)
    assert torch.equal(mat_dist.attack(model, x, y, steps=2, mean=mean, std=std), mat_dist.attack(whole, x, y, steps=2))
    for wrong in ({"mean": mean}, {"mean": [0.5, 0.5], "std": [1, 1]}, {"mean": [125, 1, 1], "std": [60, 60, 60]}):
        with pytest.raises(ConfigError, match="mean"):
            mat_dist.attack(model, x, y, **wrong)


@pytest.mark.parametrize("wrap", [lambda model: torch.jit.trace(model.eval(), batch()[0]), nn.DataParallel,
                                  torch.jit.script])
def test_a_wrapped_model_is_a_model(wrap):
    x, y = batch()
    plain = nn.Sequential(*(layer for layer in network() if not isinstance(layer, Restless)))
    expected = mat_dist.attack(plain, x, y, steps=2)
    with warnings.catch_warnings(action="ignore"):  # torch.jit is deprecated
        assert torch.allclose(mat_dist.attack(wrap(plain), x, y, steps=2), expected, atol=1e-6)


def test_a_model_without_weights_is_a_model_too():
    class Means(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([images.mean((1, 2, 3)), images.amax((1, 2, 3))], 1)

    x, y = batch(classes=2)
    assert mat_dist.attack(Means(), x, y, steps=2).shape == x.shape


def test_double_precision_stays_double():
    x, y = batch()
    with pytest.raises(ConfigError, match="cannot take images of shape"):
        mat_dist.attack(network().double(), x, y)
    adv = mat_dist.attack(network().double(), x.double(), y, steps=2)
    assert adv.dtype == torch.float64
    assert Threat("linf", 8 / 255).distance(adv, x.double()).max() <= 8 / 255 * (1 + 1e-9)


def test_a_model_without_gradient_is_refused_but_for_attacks_that_need_none():
    x, y = batch()
    blind = nn.Sequential(network())
    blind.forward = lambda images: blind[0](images).detach()  # type: ignore[method-assign]
    with pytest.raises(NotReportable, match="no gradient"):
        mat_dist.attack(blind, x, y)
    assert mat_dist.attack(blind, x, y, method="search", queries=3).shape == x.shape


class Wrap(nn.Module):
    """A model whose answer is changed."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.change = network(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


def broken(logits: Tensor) -> Tensor:
    raise KeyError("mine")


BAD_IMAGES = [
    (lambda x: x * 255, "outside"), (lambda x: x - 0.5, "outside"), (lambda x: x / x.new_tensor(0), "NaN or infinite"),
    (lambda x: (x * 255).to(torch.uint8), "torch.uint8.*/ 255"), (lambda x: (x * 255).long(), "torch.int64.*/ 255"),
    (lambda x: x > 0.5, "torch.bool"), (lambda x: x.half(), "torch.float16"), (lambda x: x[0], "shape"),
    (lambda x: x[:0], "shape"), (lambda x: x.numpy(), "ndarray"), (lambda x: None, "NoneType"),
    (lambda x: x.to_sparse(), "dense"), (lambda x: x.to("meta"), "meta"),
    (lambda x: x.to(torch.complex64), "complex64"),
]
BAD_LABELS = [
    (lambda y: y[:-1], "6 images but 5 labels"), (lambda y: y[:, None], "shape"), (lambda y: y[0], "shape"),
    (lambda y: nn.functional.one_hot(y, 4), "argmax"), (lambda y: y - 9, "out of range"), (lambda y: y + 4, "0 to 3"),
    (lambda y: y + 0.5, "no whole number"), (lambda y: y > 1, "torch.bool"), (lambda y: [], "0 labels"),
    (lambda y: "abc", "no numbers"), (lambda y: {}, "no numbers"), (lambda y: y.to(torch.complex64), "complex64"),
    (lambda y: y.bfloat16() + 0.5, "no whole number"), (lambda y: [[1], [2, 3]], "no numbers"),
]
BAD_MODELS = [
    (lambda: Wrap(lambda z: z.softmax(1)), ConfigError, "probabilities.*softmax"),
    (lambda: Wrap(lambda z: z.argmax(1)), ConfigError, r"returns \(6,\)"),
    (lambda: Wrap(lambda z: z[:3]), ConfigError, r"returns \(3, 4\)"),
    (lambda: Wrap(lambda z: z[:, :1]), ConfigError, r"returns \(6, 1\)"),
    (lambda: Wrap(lambda z: (z, z)), ConfigError, "returns tuple"),
    (lambda: Wrap(broken), ConfigError, "KeyError"),
    (lambda: network(3), ConfigError, "cannot take images of shape"),
    (lambda: network().to("meta"), EnvironmentFault, "meta"),
    (lambda: print, ConfigError, "nn.Module"), (lambda: nn.Linear, ConfigError, "nn.Module"),
    (lambda: torch.inference_mode()(network)(), ConfigError, "inference mode"),
]


@pytest.mark.parametrize(("change", "text"), BAD_IMAGES)
def test_images_that_cannot_be_used_are_one_error(change, text):
    x, y = batch()
    with pytest.raises(DataError, match=text) as caught:
        mat_dist.attack(network(), change(x), y)
    assert caught.value.where and caught.value.how


@pytest.mark.parametrize(("change", "text"), BAD_LABELS)
def test_labels_that_cannot_be_used_are_one_error(change, text):
    x, y = batch()
    with pytest.raises(DataError, match=text):
        mat_dist.attack(network(), x, change(y))


@pytest.mark.parametrize(("make", "error", "text"), BAD_MODELS)
def test_a_model_that_cannot_be_used_is_one_error_and_is_left_as_it_was(make, error, text):
    x, y = batch()
    model = make()
    known = isinstance(model, nn.Module) and next(model.parameters()).device.type != "meta" and text != "inference mode"
    before = state(model) if known else None
    with pytest.raises(error, match=text):
        mat_dist.attack(model, x, y)
    assert not known or state(model) == before


@pytest.mark.gpu
def test_a_model_on_another_device_is_one_error():
    x, y = batch()
    with pytest.raises(EnvironmentFault, match=r"the model is on cuda:0, the images are on cpu"):
        mat_dist.attack(network().cuda(), x, y)
    assert mat_dist.attack(network().cuda(), x.cuda(), y, steps=2).is_cuda


@pytest.mark.parametrize(("settings", "text"), [
    ({"threat": "linf"}, "threats"), ({"threat": "linf:9"}, "more than the whole range"), ({"threat": "l7:1"}, "l7"),
    ({"threat": "linf:8/255,l2:1"}, "2 threats"), ({"threat": "standard"}, "threats"), ({"threat": 8 / 255}, "threats"),
    ({"method": "pdg"}, "did you mean pgd"), ({"method": "pgd,cw"}, "2 methods"), ({"steps": 0}, "steps"),
    ({"step": 3}, "did you mean steps"), ({"restarts": -1}, "restarts"), ({"images": 3}, "no effect"),
    ({"checks": 3}, "no effect"), ({"targets": "peers"}, "no effect"), ({"threat": "linf:nan"}, "threats"),
    ({"threat": "linf:0.1", "threats": "l2:1"}, "threats has no effect"), ({"attacks": "cw"}, "attacks has no effect"),
    ({"method": ["pgd", "cw"]}, "2 methods"),
])
def test_settings_that_cannot_be_used_are_one_error(settings, text):
    x, y = batch()
    with pytest.raises(ConfigError, match=text):
        mat_dist.attack(network(), x, y, **settings)


def test_one_method_in_a_list_is_that_method():
    (x, y), model = batch(), network()
    listed, named = (mat_dist.attack(model, x, y, method=method, steps=2) for method in (["cw"], "cw"))
    assert torch.equal(listed, named)


def test_an_error_in_the_middle_of_an_attack_leaves_the_model_as_it_was():
    calls = []

    def later(logits: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 4:
            raise ZeroDivisionError("mine")
        return logits

    model = Wrap(later)
    before = state(model)
    with pytest.raises((MatError, ZeroDivisionError), match="mine"):
        mat_dist.attack(model, *batch())
    assert state(model) == before
