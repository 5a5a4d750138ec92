"""Networks of torchvision and timm: adapted to images, classes and settings, or refused."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.config.schema import ModelConfig
from mat_dist.errors import ConfigError, EnvironmentFault
from mat_dist.models import build_model, parameter_count
from mat_dist.models.library import replace_relus


def build(name: str, shape: tuple[int, int, int] = (3, 64, 64), classes: int = 5, **settings: Any) -> nn.Module:
    with rng.keyed_rng(0):
        return build_model(ModelConfig(name=name, **settings), shape=shape, classes=classes, mean=[0.5] * shape[0],
                           std=[0.25] * shape[0])


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def alike(*values: Any) -> Any:
    """A network that is built as the first ones are."""
    return pytest.param(*values, marks=(pytest.mark.slow, pytest.mark.thorough))


@pytest.mark.parametrize(("name", "shape"), [
    ("resnet18", (3, 64, 64)), ("vgg11_bn", (3, 32, 32)), ("shufflenet_v2_x0_5", (1, 28, 28)),
    slow("vit_b_16", (3, 32, 32)), slow("densenet121", (3, 32, 32)),
    alike("swin_t", (3, 64, 64)), alike("efficientnet_b0", (1, 28, 28)),
    slow("googlenet", (3, 64, 64)), slow("inception_v3", (3, 96, 96)), slow("maxvit_t", (3, 224, 224)),
    alike("mobilenet_v3_small", (1, 32, 32)), alike("convnext_tiny", (3, 64, 64)),
])
def test_torchvision_networks_return_one_tensor_of_logits_in_both_modes(name: str, shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = build(f"torchvision/{name}", shape)
        for mode in (True, False):
            assert model.train(mode)(torch.empty(2, *shape)).shape == (2, 5)


def test_a_torchvision_network_has_its_own_weights_and_function() -> None:
    model = build("torchvision/squeezenet1_1", (3, 64, 64)).eval()
    reference = torchvision.models.squeezenet1_1(num_classes=5).eval()
    reference.load_state_dict(model.get_submodule("net").state_dict())
    x = rng.uniform(1, (2, 3, 64, 64))
    torch.testing.assert_close(model(x), reference((x - 0.5) / 0.25))


def test_grey_images_are_shown_in_three_equal_channels() -> None:
    model = build("torchvision/squeezenet1_1", (1, 64, 64)).eval()
    reference = torchvision.models.squeezenet1_1(num_classes=5).eval()
    reference.load_state_dict(model.get_submodule("net.1").state_dict())
    x = rng.uniform(1, (2, 1, 64, 64)).requires_grad_(True)
    logits = model(x)
    torch.testing.assert_close(logits, reference(((x - 0.5) / 0.25).repeat(1, 3, 1, 1)))
    assert torch.autograd.grad(logits.sum(), x)[0].shape == x.shape


def test_nothing_is_in_place() -> None:
    with torch.device("meta"):
        for name in ("resnet18", "vgg11"):
            assert not any(getattr(m, "inplace", False) for m in build(f"torchvision/{name}").modules())


def test_activation_replaces_every_relu_and_relu6_and_no_other() -> None:
    with torch.device("meta"):
        before = [type(m) for m in build("torchvision/mobilenet_v3_small").modules()]
        after = [type(m) for m in build("torchvision/mobilenet_v3_small", activation="softplus").modules()]
        six = [type(m) for m in build("torchvision/mobilenet_v2", activation="silu").modules()]
    changed = {(old, new) for old, new in zip(before, after, strict=True) if old is not new}
    assert changed == {(nn.ReLU, nn.Softplus)}
    assert nn.Hardswish in after
    assert nn.SiLU in six and nn.ReLU6 not in six


def test_a_shared_activation_is_replaced_everywhere_by_one_module() -> None:
    shared = nn.ReLU()
    net = nn.Module()
    net.first, net.second, net.inner = shared, shared, nn.Sequential(shared, nn.ReLU())
    assert replace_relus(net, "silu") == 2
    assert net.first is net.second is net.inner[0]
    assert isinstance(net.first, nn.SiLU) and isinstance(net.inner[1], nn.SiLU)


def test_norm_group_replaces_every_batch_norm_and_keeps_eps_and_parameter_count() -> None:
    with torch.device("meta"):
        plain, group = build("torchvision/mobilenet_v3_small"), build("torchvision/mobilenet_v3_small", norm="group")
    batch_norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    group_norms = [m for m in group.modules() if isinstance(m, nn.GroupNorm)]
    assert [(m.num_features, m.eps) for m in batch_norms] == [(m.num_channels, m.eps) for m in group_norms]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in group.modules())
    assert parameter_count(plain) == parameter_count(group)


@pytest.mark.parametrize(("name", "settings", "text"), [
    ("resnet18", {"width": 2}, "width 2 for a network of torchvision"),
    ("vit_b_16", {"activation": "silu"}, "no ReLU modules"),
    ("densenet121", {"activation": "silu"}, "calls ReLU as a function"),
    ("vgg11", {"norm": "group"}, "no batch norm"),
    ("convnext_tiny", {"norm": "batch"}, "no batch norm"),
    ("resnet_18", {}, "torchvision has no classifier 'resnet_18'.*resnet18"),
    ("fasterrcnn_resnet50_fpn", {}, "no classifier"),
    ("qqqqqqqqqqqq", {}, "see torchvision's list"),
])
def test_what_a_network_does_not_support_is_refused(name: str, settings: dict[str, Any], text: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=text):
        build(f"torchvision/{name}", (3, 64, 64), **settings)


def test_images_that_do_not_fit_are_refused() -> None:
    with torch.device("meta"):
        with pytest.raises(ConfigError, match=r"vit_b_16.*another image size"):
            build("torchvision/vit_b_16", (3, 40, 40))
        with pytest.raises(ConfigError, match=r"cannot take images of shape \(3, 16, 16\)"):
            build("torchvision/inception_v3", (3, 16, 16))
        with pytest.raises(ConfigError, match="2 channels"):
            build("torchvision/resnet18", (2, 64, 64))


def test_without_timm_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(EnvironmentFault, match="pip install timm"):
        build("timm/resnet18")


class BatchNormAct(nn.BatchNorm2d):
    """A norm layer with an activation inside, as timm's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def fake_timm(calls: list[dict[str, Any]]) -> types.ModuleType:
    """The part of timm's interface that is used, with two networks."""

    def create_model(name: str, **options: Any) -> nn.Module:
        calls.append({"name": name, **options})
        norm = BatchNormAct(4) if name == "fused" else nn.BatchNorm2d(4)
        return nn.Sequential(nn.Conv2d(options["in_chans"], 4, 3), norm, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1),
                             nn.Flatten(), nn.Linear(4, options["num_classes"]))

    module = types.ModuleType("timm")
    vars(module).update(
        create_model=create_model, list_models=lambda: ["fused", "plain", "fixed"],
        is_model=lambda name: name in ("fused", "plain", "fixed"),
        get_pretrained_cfg=lambda name: types.SimpleNamespace(fixed_input_size=name == "fixed"))
    return module


def test_timm_gets_classes_channels_and_the_image_size_where_it_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "timm", fake_timm(calls))
    build("timm/plain", (2, 16, 16))
    model = build("timm/fixed", (1, 16, 20), activation="silu", norm="group")
    common = {"pretrained": False, "num_classes": 5}
    assert calls == [{"name": "plain", "in_chans": 2, **common},
                     {"name": "fixed", "in_chans": 1, "img_size": (16, 20), **common}]
    assert [type(m) for m in model.get_submodule("net").children()][1:3] == [nn.GroupNorm, nn.SiLU]


def test_timm_networks_with_norm_layers_of_their_own_are_not_changed_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", fake_timm([]))
    with pytest.raises(ConfigError, match="of a type of their own"):
        build("timm/fused", norm="group")
    with pytest.raises(ConfigError, match="calls ReLU as a function"):
        build("timm/fused", activation="silu")
    with pytest.raises(ConfigError, match=r"timm has no classifier 'plan'.*plain"):
        build("timm/plan")
