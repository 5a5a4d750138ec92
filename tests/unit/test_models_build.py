"""The networks: shapes, published sizes, normalisation, gradients, precision, refusals."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.config.schema import ModelConfig
from mat_dist.errors import ConfigError
from mat_dist.models import Normalize, build_model, model_names, parameter_count, register_model, registry
from mat_dist.models.blocks import norm_groups, scaled
from mat_dist.models.networks import PreActBlock

BUILT_IN = ["mobilenet_v2", "preact_resnet18", "resnet18", "resnet50", "small_cnn", "tiny_cnn", "wrn_28_10",
            "wrn_34_10"]


ONE_OF_EACH = [n for n in BUILT_IN if n != "wrn_34_10"]  # which is wrn_28_10 with a block more per stage


def build(name: str = "tiny_cnn", shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10, seed: int = 0,
          **settings: Any) -> nn.Module:
    mean, std = [0.5, 0.4, 0.3, 0.2][:shape[0]], [0.25, 0.2, 0.3, 0.1][:shape[0]]
    with rng.keyed_rng(seed):
        return build_model(ModelConfig(name=name, **settings), shape=shape, classes=classes, mean=mean, std=std)


def images(count: int, shape: tuple[int, int, int], seed: int = 1) -> Tensor:
    return rng.uniform(seed, (count, *shape))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry of its own, so that test networks do not stay."""
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))
    yield


# ---------------------------------------------------------------- shapes and sizes

def test_the_built_in_names_are_the_documented_ones() -> None:
    assert [n for n in model_names() if registry.find_builder(n).__module__.startswith("mat_dist.models")] == BUILT_IN


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 28, 20), (3, 65, 66)])
@pytest.mark.parametrize("name", BUILT_IN)
def test_logits_have_a_row_per_image_and_a_column_per_class(name: str, shape: tuple[int, int, int]) -> None:
    assert build(name, shape, classes=7, width=0.125)(images(3, shape)).shape == (3, 7)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_every_parameter_gets_a_finite_gradient_in_training(name: str, norm: str) -> None:
    model = build(name, (1, 16, 16), width=0.125, norm=norm)
    model(images(2, (1, 16, 16))).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize(("name", "shape", "classes", "count"), [
    ("resnet18", (3, 32, 32), 10, 11_173_962),  # kuangliu/pytorch-cifar
    ("resnet18", (3, 224, 224), 1000, 11_689_512),  # torchvision's table
    ("preact_resnet18", (3, 32, 32), 10, 11_172_170),  # Rice et al. 2020: 11.17 M
    ("wrn_28_10", (3, 32, 32), 10, 36_479_194),  # Zagoruyko and Komodakis 2016: 36.5 M
    ("wrn_34_10", (3, 32, 32), 10, 46_160_474),  # Madry et al. 2018, Zhang et al. 2019: 46.2 M
    ("mobilenet_v2", (3, 32, 32), 10, 2_236_682),
    ("mobilenet_v2", (3, 224, 224), 1000, 3_504_872),  # torchvision's table
    ("small_cnn", (3, 32, 32), 10, 98_890),
    ("tiny_cnn", (3, 32, 32), 10, 94_426),
    ("tiny_cnn", (1, 8, 8), 10, 36_538),
])
def test_parameter_counts_are_the_published_ones(name: str, shape: tuple[int, int, int], classes: int,
                                                 count: int) -> None:
    with torch.device("meta"):
        assert parameter_count(build(name, shape, classes)) == count


@pytest.mark.parametrize("name", ["tiny_cnn", "small_cnn"])
def test_small_networks_take_every_side_from_4_to_40_pixels(name: str) -> None:
    for size in range(4, 41):
        build(name, (1, size, 44 - size), width=0.25)  # passes one image through


def test_width_scales_the_channels_to_multiples_of_8() -> None:
    assert [scaled(64, w) for w in (1, 0.5, 0.25, 0.01, 2, 1.3)] == [64, 32, 16, 8, 128, 80]
    convolutions = [m.out_channels for m in build("tiny_cnn", width=2).modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == [32, 64, 192]


# ---------------------------------------------------------------- the same function as an independent one

@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_the_form_for_large_images_computes_what_torchvision_computes(name: str) -> None:
    model = build(name, (3, 96, 96), classes=6).eval()
    reference = torchvision.models.get_model(name, weights=None, num_classes=6).eval()
    net = model.get_submodule("net")
    reference.load_state_dict(dict(zip(reference.state_dict(), net.state_dict().values(), strict=True)))
    x_BCHW = images(2, (3, 96, 96))
    with torch.no_grad():
        normalised_BCHW = torchvision.transforms.functional.normalize(x_BCHW, [0.5, 0.4, 0.3], [0.25, 0.2, 0.3])
        torch.testing.assert_close(model(x_BCHW), reference(normalised_BCHW), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 8, 2), (4, 8, 1)])
def test_a_pre_activation_block_follows_the_paper(inputs: int, outputs: int, stride: int) -> None:
    functional = nn.functional
    block = PreActBlock(inputs, outputs, stride, ModelConfig())
    x = rng.normal(3, (2, inputs, 6, 6))
    first = functional.relu(functional.batch_norm(x, None, None, training=True))
    second = functional.conv2d(first, block.conv1.weight, stride=stride, padding=1)
    residual = functional.conv2d(functional.relu(functional.batch_norm(second, None, None, training=True)),
                                 block.conv2.weight, padding=1)
    if inputs == outputs and stride == 1:
        assert block.shortcut is None
        skip = x
    else:  # Wide ResNet: the projection sees the activated input
        skip = functional.conv2d(first, block.get_submodule("shortcut").get_parameter("weight"), stride=stride)
    torch.testing.assert_close(block(x), residual + skip)


def test_wide_resnets_have_the_published_depth() -> None:
    for name, depth in (("wrn_28_10", 28), ("wrn_34_10", 34)):
        net = build(name, (1, 8, 8), width=0.125)
        convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) == depth  # 6n + 4 counts the three 1x1 projections
        assert [m.kernel_size for m in convolutions].count((1, 1)) == 3


def test_images_up_to_64_pixels_are_halved_less_often() -> None:
    side = {}
    for pixels in (64, 65):
        model = build("resnet18", (3, pixels, pixels), width=0.125)
        net = model.get_submodule("net")
        features_BCHW = net.get_submodule("1")(net.get_submodule("0")(images(2, (3, pixels, pixels))))
        side[pixels] = features_BCHW.shape[-1]
    assert side == {64: 8, 65: 3}  # 64 / 2^3, and 65 / 2^5 rounded up


# ---------------------------------------------------------------- normalisation

def test_normalisation_is_inside_and_matches_hand_numbers() -> None:
    layer = Normalize([0.5, 0.25], [0.25, 0.5])
    x = torch.tensor([[[[0.0, 1.0]], [[0.25, 0.75]]]])
    assert torch.equal(layer(x), torch.tensor([[[[-2.0, 2.0]], [[0.0, 1.0]]]]))
    assert torch.equal(x, torch.tensor([[[[0.0, 1.0]], [[0.25, 0.75]]]]))


def test_normalisation_is_the_first_layer_and_travels_in_the_state_dict() -> None:
    model = build("tiny_cnn", (3, 8, 8))
    assert isinstance(next(model.children()), Normalize)
    state = model.state_dict()
    assert torch.equal(state["normalize.mean"].flatten(), torch.tensor([0.5, 0.4, 0.3]))
    assert torch.equal(state["normalize.std"].flatten(), torch.tensor([0.25, 0.2, 0.3]))
    assert not any(key.startswith("normalize") for key, _ in model.named_parameters())
    other = build_model(ModelConfig(), shape=(3, 8, 8), classes=10, mean=[0, 0, 0], std=[1, 1, 1])
    other.load_state_dict(state)
    x = images(4, (3, 8, 8))
    assert torch.equal(other.eval()(x), model.eval()(x))


# ---------------------------------------------------------------- randomness, precision, layout, gradients

def test_weights_depend_on_the_callers_seed_only() -> None:
    first, second, other = build(seed=1), build(seed=1), build(seed=2)
    states = [model.state_dict().values() for model in (first, second)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert not torch.equal(first.get_parameter("net.0.0.weight"), other.get_parameter("net.0.0.weight"))
    assert not torch.equal(build_twice()[0], build_twice()[1])


def build_twice() -> list[Tensor]:
    with rng.keyed_rng(0):
        made = [build_model(ModelConfig(), shape=(1, 8, 8), classes=3, mean=[0.5], std=[0.5]) for _ in range(2)]
    return [m.get_parameter("net.0.0.weight") for m in made]


def test_initial_convolutions_have_the_variance_of_he() -> None:
    weight = build("small_cnn", width=4).get_parameter("net.3.0.weight")  # 256 x 256 x 3 x 3
    assert weight.var().item() == pytest.approx(2 / (256 * 9), rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_layout_and_precision_change_logits_by_rounding_only(name: str) -> None:
    model, x = build(name, (3, 16, 16), width=0.125).eval(), images(4, (3, 16, 16))
    before = x.clone()
    with torch.no_grad():
        plain = model(x)
        double = model.double()(x.double())
        single = model.float().to(memory_format=torch.channels_last)
        last = single(x.contiguous(memory_format=torch.channels_last))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(x)
    assert double.dtype == torch.float64
    scale = double.abs().max().item()
    assert (plain - double).abs().max().item() < 1e-5 * scale
    assert (last - double).abs().max().item() < 1e-5 * scale
    assert (half.float() - double).abs().max().item() < 0.1 * scale
    assert torch.equal(x, before)


@pytest.mark.parametrize("activation", ["relu", "silu", "softplus"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_input_gradient_is_the_finite_difference_in_fp64(activation: str, norm: str) -> None:
    model = build("tiny_cnn", (2, 8, 8), activation=activation, norm=norm).double().eval()
    x = images(2, (2, 8, 8)).double().requires_grad_(True)
    weights = rng.normal(9, (2, 10), dtype=torch.float64)

    def loss(at: Tensor) -> Tensor:
        return (model(at) * weights).sum()

    gradient, = torch.autograd.grad(loss(x), x)
    with torch.no_grad():
        for n in range(5):
            # 1e-6: small enough that no ReLU of these images changes sides, rounding stays near 1e-9.
            direction = rng.normal(100 + n, x.shape, dtype=torch.float64)
            difference = (loss(x + 1e-6 * direction) - loss(x - 1e-6 * direction)) / 2e-6
            assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_settings_choose_activation_and_norm_and_nothing_is_in_place(name: str) -> None:
    kinds = {"relu": nn.ReLU, "silu": nn.SiLU, "softplus": nn.Softplus}
    for activation, kind in kinds.items():
        modules = list(build(name, (1, 16, 16), width=0.125, activation=activation, norm="group").modules())
        assert not any(isinstance(m, nn.BatchNorm2d) for m in modules)
        assert any(isinstance(m, nn.GroupNorm) for m in modules)
        assert {type(m) for m in modules if isinstance(m, (*kinds.values(), nn.ReLU6))} == {kind}
    default = list(build(name, (1, 16, 16), width=0.125).modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in default)
    assert any(isinstance(m, nn.ReLU | nn.ReLU6) for m in default)
    assert not any(getattr(m, "inplace", False) for m in default)


def test_group_norm_groups_divide_the_channels_and_hold_at_least_two() -> None:
    assert [norm_groups(c) for c in (64, 160, 640, 48, 40, 32, 16, 7, 1)] == [32, 32, 32, 24, 20, 16, 8, 1, 1]
    groups = [m.num_groups for m in build("tiny_cnn", norm="group").modules() if isinstance(m, nn.GroupNorm)]
    assert groups == [8, 16, 32]


# ---------------------------------------------------------------- plug-ins and refusals

@pytest.mark.usefixtures("registered")
def test_a_plug_in_builder_gets_config_shape_and_classes() -> None:
    seen = []

    @register_model("mine")
    def mine(config: ModelConfig, shape: tuple[int, int, int], classes: int) -> nn.Module:
        seen.append((config.width, shape, classes))
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

    model = build("mine", (1, 4, 4), 3, width=2)
    assert seen == [(2.0, (1, 4, 4), 3)]
    assert model(images(5, (1, 4, 4))).shape == (5, 3)
    assert parameter_count(model) == 17 * 3


@pytest.mark.usefixtures("registered")
def test_a_name_is_registered_once_unless_by_the_same_plug_in() -> None:
    def builder(config: ModelConfig, shape: tuple[int, int, int], classes: int) -> nn.Module:
        return nn.Flatten()

    register_model("mine")(builder)
    register_model("mine")(types.FunctionType(builder.__code__, builder.__globals__, builder.__name__))
    with pytest.raises(ConfigError, match="registered twice"):
        register_model("resnet18")(builder)
    with pytest.raises(ConfigError, match="taken by a library"):
        register_model("timm/mine")(builder)


@pytest.mark.usefixtures("registered")
def test_the_first_image_shows_a_model_that_does_not_fit() -> None:
    def offer(net: nn.Module) -> None:
        registry._BUILDERS["mine"] = lambda config, shape, classes: net

    offer(nn.Flatten())
    with pytest.raises(ConfigError, match=r"returns \(1, 64\).*\(B, 10\)"):
        build("mine", (1, 8, 8))
    offer(nn.Linear(5, 10))
    with pytest.raises(ConfigError, match=r"cannot take images of shape \(1, 8, 8\).*another image size"):
        build("mine", (1, 8, 8))
    offer(nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(1)))
    with pytest.raises(ConfigError, match=r"returns probabilities.*leave its softmax out"):
        build("mine", (1, 8, 8))
    bad = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.constant_(bad.get_parameter("1.weight"), float("nan"))
    offer(bad)
    with pytest.raises(ConfigError, match="not finite"):
        build("mine", (1, 8, 8))


@pytest.mark.usefixtures("registered")
def test_the_first_image_leaves_modes_as_the_builder_set_them() -> None:
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64).eval(), nn.Linear(64, 10))
    registry._BUILDERS["mine"] = lambda config, shape, classes: net
    model = build("mine", (1, 8, 8))
    assert model.training and net[2].training and not net[1].training
    assert all(p.requires_grad for p in model.parameters())


def test_an_unknown_name_names_the_nearest_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'resnet_18'.*did you mean resnet18"):
        build("resnet_18")
    with pytest.raises(ConfigError, match=r"unknown model 'zzz' \(model.name\): Known: .*torchvision/<name>"):
        build("zzz")


@pytest.mark.parametrize(("mean", "std", "classes", "text"), [
    ([0.5], [0.5, 0.5], 10, "std 2 values for 1 channels"),
    ([0.5], [0.0], 10, "above 0"),
    ([float("nan")], [0.5], 10, "must be finite"),
    ([0.5], [0.5], 1, "at least 2"),
])
def test_statistics_and_classes_are_checked(mean: list[float], std: list[float], classes: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build_model(ModelConfig(), shape=(1, 8, 8), classes=classes, mean=mean, std=std)
