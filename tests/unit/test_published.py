"""Networks that others publish, above all in RobustBench's model zoo: their names, forms, files and normalisations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.checkpoints.load import initialise
from mat_dist.config.schema import ModelConfig, PeerConfig, StepConfig
from mat_dist.errors import CheckpointError, ConfigError, EnvironmentFault
from mat_dist.models import model_names
from mat_dist.models.registry import Images, find_builder, make_model
from mat_dist.models.robustbench import as_ours, entries
from mat_dist.tools.standalone import definitions
from tests.robustbench_table import FORMS, ROWS, Loaded, difference, original

IMAGES = Images((3, 32, 32), 10, (0.3, 0.3, 0.3), (0.2, 0.2, 0.2))
C10 = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
RAW, HALF = ((0.0,) * 3, (1.0,) * 3), ((0.5,) * 3, (0.5,) * 3)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int | None = None) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2 if padding is None else padding, bias=False)


class Trades(nn.Module):
    """A block of the Wide ResNet of TRADES."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3)
        if inputs != outputs:
            self.convShortcut = conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (self.convShortcut(active) if hasattr(self, "convShortcut") else x)


class Kuangliu(nn.Module):
    """A pre-activation block of pytorch-cifar and of its copies, whose shortcut starts late or early."""

    def __init__(self, inputs: int, outputs: int, stride: int, early: bool) -> None:
        super().__init__()
        self.early = early
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        skip = self.shortcut(x if self.early else active) if hasattr(self, "shortcut") else x
        return self.conv2(F.relu(self.bn2(self.conv1(active)))) + skip


class DeepMind(nn.Module):
    """A block of the Wide ResNet (late shortcut) or the ResNet (early 3x3 shortcut) of DeepMind."""

    def __init__(self, inputs: int, outputs: int, stride: int, wide: bool) -> None:
        super().__init__()
        self.first, self.second = ("conv_0", "conv_1") if wide else ("conv_2d_1", "conv_2d_2")
        self.wide, self.stride = wide, stride
        self.batchnorm_0 = nn.BatchNorm2d(inputs)
        setattr(self, self.first, conv(inputs, outputs, 3, stride, 0))
        self.batchnorm_1 = nn.BatchNorm2d(outputs)
        setattr(self, self.second, conv(outputs, outputs, 3))
        if stride != 1 or inputs != outputs:
            self.shortcut = conv(inputs, outputs, 1 if wide else 3, stride, 0)

    def padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 1, 1, 1) if self.stride == 1 else (0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        active, skip = F.silu(self.batchnorm_0(x)), x
        if hasattr(self, "shortcut"):
            skip = self.shortcut(active) if self.wide else self.shortcut(self.padded(x))
        out = getattr(self, self.first)(self.padded(active))
        return getattr(self, self.second)(F.silu(self.batchnorm_1(out))) + skip


class Bottleneck(nn.Module):
    """A block of pytorch-cifar's ResNet-50."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 4
        self.conv1, self.bn1 = conv(inputs, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class Published(nn.Module):
    """Stem, stages, head, and perhaps a norm layer, under the names of a published code."""

    def __init__(self, block: Callable[[int, int, int], nn.Module], stages: str, widths: tuple[int, ...],
                 blocks: tuple[int, ...], *, stem: str, head: str, norm: str = "", post: str = "",
                 act: Callable[[Tensor], Tensor] = F.relu, moments: Any = RAW, first: int = 8) -> None:
        super().__init__()
        self.stages, self.stem, self.norm, self.head, self.post, self.act = [], stem, norm, head, post, act
        self.moments = [torch.tensor(one).view(1, -1, 1, 1) for one in moments]
        self.add_module(stem, conv(3, first, 3))
        if post:
            self.add_module(post, nn.BatchNorm2d(first))
        inputs = first
        for number, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers = []
            for n in range(count):
                layers.append(block(inputs, width, 2 if number and not n else 1))
                inputs = width
            holder, parts = self, stages.format(stage=number + 1, group=number).split(".")
            for part in parts[:-1]:
                if part not in dict(holder.named_children()):
                    holder.add_module(part, nn.Module())
                holder = holder.get_submodule(part)
            holder.add_module(parts[-1], nn.Sequential(*layers))
            self.stages.append(".".join(parts))
        if norm:
            self.add_module(norm, nn.BatchNorm2d(inputs))
        self.add_module(head, nn.Linear(inputs, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule(self.stem)((x - self.moments[0]) / self.moments[1])
        if self.post:
            x = self.act(self.get_submodule(self.post)(x))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        if self.norm:
            x = self.act(self.get_submodule(self.norm)(x))
        return self.get_submodule(self.head)(x.mean((2, 3)))


LOW, WIDE = (8, 16, 32, 64), (16, 40, 80)  # our networks with width 0.125
TRADES = {"stem": "conv1", "norm": "bn1", "head": "fc"}
NETWORKS: dict[str, tuple[str, Callable[[], nn.Module]]] = {  # entry of RobustBench, and its network with few channels
    "trades": ("Zhang2019Theoretically", lambda: Published(Trades, "block{stage}.layer", WIDE, (5,) * 3, **TRADES)),
    "trades, half": ("Hendrycks2019Using", lambda: Published(Trades, "block{stage}.layer", WIDE, (4,) * 3, moments=HALF,
                                                             **TRADES)),
    "preact": ("L2/Rice2020Overfitting", lambda: Published(
        lambda *a: Kuangliu(*a, early=False), "layer{stage}", LOW, (2,) * 4, stem="conv1", norm="bn", head="linear",
        moments=C10)),
    "preact, bare, early": ("Wong2020Fast", lambda: Published(
        lambda *a: Kuangliu(*a, early=True), "layer{stage}", LOW, (2,) * 4, stem="conv1", head="linear", moments=C10)),
    "dm wide": ("Wang2023Better_WRN-28-10", lambda: Published(
        lambda *a: DeepMind(*a, wide=True), "layer.{group}.block", WIDE, (4,) * 3, stem="init_conv", norm="batchnorm",
        head="logits", act=F.silu, moments=C10)),
    "dm preact": ("Rebuffi2021Fixing_R18_ddpm", lambda: Published(
        lambda *a: DeepMind(*a, wide=False), "layer_{group}", LOW, (2,) * 4, stem="conv_2d", norm="batchnorm",
        head="logits", act=F.silu, moments=C10)),
    "resnet50": ("Engstrom2019Robustness", lambda: Published(
        Bottleneck, "layer{stage}", tuple(4 * width for width in LOW), (3, 4, 6, 3), stem="conv1", post="bn1",
        head="linear", moments=(C10[0], (0.2023, 0.1994, 0.2010)))),
}


def theirs(name: str) -> nn.Module:
    with rng.keyed_rng(5):
        net = NETWORKS[name][1]()
        for key, value in net.state_dict().items():
            if value.is_floating_point():
                noise = 0.1 * torch.randn_like(value)
                value += noise.abs() if "running_var" in key else noise
    return net.eval()


def write(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "a.pt")
    return folder / "a.pt"


def loaded(start: Path | str, model: str, images: Images = IMAGES, frozen: bool = True, **config: Any) -> Loaded:
    spec = PeerConfig(name="peer0", init_from=str(start), frozen=frozen, model=ModelConfig(name=model, **config))
    peer = Loaded(spec, make_model(spec, images, seed=0, step=StepConfig(), device=torch.device("cpu")))
    initialise([peer], images)
    peer.model.eval()
    return peer


def apart(one: nn.Module, other: nn.Module) -> float:
    x_BCHW = rng.uniform(1, (2, 3, 32, 32))
    with torch.no_grad():
        want_BK, found_BK = one(x_BCHW), other(x_BCHW)
    return float((want_BK - found_BK).abs().max() / want_BK.abs().max())


@pytest.mark.parametrize(("name", "form"), [
    *((name, "safetensors") for name in NETWORKS), ("trades", "state_dict, module."), ("trades, half", "module."),
    ("preact", "best, last"), ("preact, bare, early", "plain"), ("dm wide", "module."), ("dm preact", "plain"),
    ("resnet50", "state_dict, model.")])
def test_an_entry_of_robustbench_computes_what_the_published_network_computes(name: str, form: str,
                                                                              tmp_path: Path) -> None:
    net, entry = theirs(name), NETWORKS[name][0]
    if form == "safetensors":
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, tmp_path / "a.safetensors")
        start: Any = tmp_path / "a.safetensors"
    else:
        start = f"{write(tmp_path, FORMS[form](net.state_dict()))}{':last' if form == 'best, last' else ''}"
    found = loaded(start, f"robustbench/{entry}", width=0.125)
    assert apart(net, found.model) < 1e-5
    assert any("normalisation of the architecture" in note for note in found.notes)


def test_a_branch_that_the_network_never_runs_is_left_out_and_told(tmp_path: Path) -> None:
    net = theirs("trades")
    more = {f"sub_block1.{key.removeprefix('block1.')}": value + 1 for key, value in net.state_dict().items()
            if key.startswith("block1.")}
    found = loaded(write(tmp_path, {"state_dict": {**net.state_dict(), **more}}),
                   "robustbench/Zhang2019Theoretically", width=0.125)
    assert apart(net, found.model) < 1e-5
    assert any("left out" in note and "sub_block1.layer.0" in note for note in found.notes)


def test_the_normalisation_in_a_file_counts_before_that_of_the_entry(tmp_path: Path) -> None:
    net = theirs("dm wide")
    content = {"mu": torch.full((1, 3, 1, 1), 0.25), "sigma": torch.full((1, 3, 1, 1), 0.5), **net.state_dict()}
    found = loaded(write(tmp_path, content), "robustbench/Wang2023Better_WRN-28-10", width=0.125)
    net.moments = [content["mu"], content["sigma"]]
    assert apart(net, found.model) < 1e-5


def test_an_entry_is_trained_on_for_other_classes(tmp_path: Path) -> None:
    net, seven = theirs("dm preact"), Images((3, 32, 32), 7, (0.3,) * 3, (0.2,) * 3)
    found = loaded(f"pretrained:{write(tmp_path, net.state_dict())}", "robustbench/Rebuffi2021Fixing_R18_ddpm", seven,
                   frozen=False, width=0.125)
    assert found.model(rng.uniform(1, (2, 3, 32, 32))).shape == (2, 7)
    assert torch.equal(found.model.state_dict()["net.1.7.conv2.weight"], net.state_dict()["layer_3.1.conv_2d_2.weight"])


@pytest.mark.parametrize(("name", "model", "says"), [
    ("dm wide", "wrn_28_10", r"DeepMind's networks.*write \+dm behind"),
    ("dm preact", "preact_resnet18", r"DeepMind's networks.*write \+dm behind"),
    ("trades, half", "wrn_28_10+dm", r"TRADES.*leave \+dm out"),
    ("trades", "wrn_28_10", "the weights do not fit"),
    ("preact", "preact_resnet18+bare", "the weights do not fit"),
    ("preact, bare, early", "preact_resnet18", "the weights do not fit"),
    ("resnet50", "resnet18", "the weights do not fit")])
def test_a_file_of_another_architecture_is_refused(name: str, model: str, says: str, tmp_path: Path) -> None:
    file = write(tmp_path, theirs(name).state_dict())
    with pytest.raises(CheckpointError, match=says) as caught:
        loaded(file, model, width=0.125)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_what_no_file_tells_of_a_pre_activation_network_is_told(tmp_path: Path) -> None:
    late = loaded(write(tmp_path, theirs("preact").state_dict()), "preact_resnet18", width=0.125)
    assert any("+early" in note for note in late.notes)


@pytest.mark.parametrize(("name", "says"), [
    ("wrn_29_10", "there is no Wide ResNet of depth 29"), ("wrn_04_1", "no Wide ResNet"),
    ("wrn_28_10+swish", r"unknown model 'wrn_28_10\+swish' .*did you mean wrn_28_10"),
    ("resnet19", "unknown model 'resnet19'"), ("resnet50+dm", "unknown model"), ("robustbench/", "unknown model")])
def test_a_name_that_looks_like_one_of_a_family_is_one_line(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find_builder(name)


def test_an_entry_that_is_neither_built_in_nor_in_the_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robustbench.model_zoo", None)
    with pytest.raises(EnvironmentFault, match="pip install robustbench"):
        loaded("none", "robustbench/Nobody2030")
    with pytest.raises(EnvironmentFault, match="did you mean robustbench/Wang2023Better_WRN-28-10"):
        loaded("none", "robustbench/Wang2023Better_WRN_28_10")
    with pytest.raises(ConfigError, match="the data have 7 classes, those of RobustBench 10, 100 or 1000"):
        loaded("none", "robustbench/Nobody2030", Images((3, 32, 32), 7, (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(ConfigError, match="the images have 1 channels"):
        loaded("none", "robustbench/Wong2020Fast", Images((1, 32, 32), 10, (0.5,), (0.5,)))


def test_every_entry_is_a_network_of_ours() -> None:
    for classes in (10, 100, 1000):
        assert len(entries(classes)) >= 15
        for model, moments in entries(classes).values():
            find_builder(model.partition("*")[0])
            assert [len(one) for one in moments] == [3, 3]
    assert "resnet50" in model_names()


def test_an_entry_leaves_as_the_source_of_its_network() -> None:
    def written(name: str) -> list[str]:
        builders: list[str] = definitions([as_ours(ModelConfig(name=name), 10)[0]], False)["builders"]
        return builders

    assert written("robustbench/Wong2020Fast")[0].endswith(": preact_resnet(*('18', '+bare+early'))")
    assert "wrn_34_20" in written("robustbench/Rice2020Overfitting")[0]
    assert "preact_resnet18" in written("robustbench/L2/Rice2020Overfitting")[0]
    with pytest.raises(ConfigError, match="of the package robustbench"):
        written("robustbench/Ding2020MMA")


@pytest.mark.thorough
@pytest.mark.parametrize("row", [row for row in ROWS if row[0] != 1000 and "Chen2020Adv" not in row[1]], ids=str)
def test_the_original_module_gives_the_same_logits(row: tuple[int, str, str], tmp_path: Path) -> None:
    pytest.importorskip("robustbench.model_zoo", reason="the package robustbench is not installed")
    assert difference(*row, tmp_path)[0] < 1e-5


@pytest.mark.thorough
@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_every_entry_has_the_shapes_of_the_original(classes: int) -> None:
    zoo = pytest.importorskip("robustbench.model_zoo", reason="the package robustbench is not installed").model_dicts
    data = {10: "cifar10", 100: "cifar100", 1000: "imagenet"}[classes]
    kinds = next(found for key, found in zoo.items() if key.value == data)
    known, side = entries(classes), 224 if classes == 1000 else 32
    for threat, models in kinds.items():
        for entry in models:
            found = known.get(f"{threat.value}/{entry}", known.get(entry))
            if found is None or entry == "Standard_R50":  # which its package fetches
                continue
            model, _, factor = found[0].partition("*")
            with torch.device("meta"):
                net = find_builder(model)(ModelConfig(name=model, width=float(factor or 1)), (3, side, side), classes)
                theirs_ = original(classes, f"{threat.value}/{entry}", noise=False)
            shapes = sorted(tuple(value.shape) for key, value in theirs_.state_dict().items()
                            if not key.startswith(("sub_block1", "mu", "sigma", "normalize")))
            assert shapes == sorted(tuple(value.shape) for value in net.state_dict().values()), entry
