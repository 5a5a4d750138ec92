"""Checkpoints that are not ours: reading state dicts without running anything, and matching them to a network."""

from __future__ import annotations

import argparse
import enum
import io
import pickle
import re
import zipfile
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mat_dist.checkpoints.foreign import Network, TensorFile, find_network, read_tensors
from mat_dist.config.schema import ModelConfig
from mat_dist.errors import CheckpointError, ConfigError
from mat_dist.models import build_model


class Named(nn.Module):
    """A small residual network with the names that others use."""

    def __init__(self, channels: int = 3, classes: int = 10, width: int = 4, kernel: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, kernel, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.bn1(self.conv1(x)).mean((2, 3)))


def ours(channels: int = 3, classes: int = 10, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Conv2d(channels, width, 3, bias=False), nn.BatchNorm2d(width)), nn.ReLU(),
                         nn.Linear(width, classes))


def saved(folder: Path, content: Any, name: str = "a.pt", **options: Any) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def find(source: TensorFile, net: nn.Module, entry: str | None = None) -> Network:
    return find_network(source, net, channels=3, classes=10, entry=entry)


def fit(source: TensorFile, net: nn.Module) -> tuple[dict[str, Tensor], str]:
    found = find(source, net)
    return found.state(net), found.notes[0]


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("place", ["", "state_dict", "model_ema", "student", "weights.network", "a.b.module.net", "1",
                                   "checkpoint.0"])
def test_a_network_is_found_wherever_it_stands_beside_other_things(place: str, tmp_path: Path) -> None:
    net = Named()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.rand(2, 3, 9, 9)).sum().backward()
    optimizer.step()
    content: Any = net.state_dict()
    for part in reversed(place.split(".") if place else []):
        content = [content, 7] if part == "0" else {"epoch": 3, part: content, "criterion.weight": torch.ones(10)}
    content = {**content, "optimizer": optimizer.state_dict()}
    found = find(read_tensors(saved(tmp_path, content)), Named())
    assert found.place == (f"{place}." if place else "") and same(found.state(Named()), net)
    assert f"{place!r}" in found.notes[0] or not place
    assert "left out" in found.notes[1] and ("criterion.weight" in found.notes[1] or not place)


def test_files_of_old_torch_versions_are_read_too(tmp_path: Path) -> None:
    weights = Named().state_dict()
    source = read_tensors(saved(tmp_path, {"net": weights}, _use_new_zipfile_serialization=False))
    assert all(torch.equal(source.tensors[f"net.{key}"], value) for key, value in weights.items())


def test_wrappers_before_and_inside_names_do_not_matter(tmp_path: Path) -> None:
    net = Named()
    weights = net.state_dict()
    wrapped = {f"module._orig_mod.{key}": value for key, value in weights.items()}
    averaged = {"n_averaged": torch.tensor(3), **{f"module.module.{key}": value for key, value in weights.items()}}
    partly = {key.replace("conv1.", "conv1._orig_mod."): value for key, value in weights.items()}
    for content in (wrapped, averaged, partly, torch.optim.swa_utils.AveragedModel(net).state_dict()):
        found = find(read_tensors(saved(tmp_path, content)), Named())
        assert same(found.state(Named()), net) and len(found.notes) == 1


def test_parameters_and_what_pytorch_puts_into_checkpoints_are_plain(tmp_path: Path) -> None:
    schedule = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD(Named().parameters(), 0.1), [2, 3])
    content = {"state_dict": OrderedDict(Named().named_parameters()), "schedule": schedule.state_dict(),
               "size": torch.Size([3, 4])}
    source = read_tensors(saved(tmp_path, content))
    assert all(type(value) is Tensor and not value.requires_grad for value in source.tensors.values())


@dataclass
class Settings:
    rate: float = 0.1


class Slotted:
    __slots__ = ("rate",)

    def __init__(self) -> None:
        self.rate = 0.1


class Mode(enum.Enum):
    FAST = 1


EXTRAS = {"mode": Mode.FAST, "partial": partial(Settings, rate=0.2), "last": deque([1.0], 9),
          "accuracy": np.float64(0.5), "history": np.arange(3.0), "args": argparse.Namespace(lr=0.1, out=Path("runs")),
          "path": Path("a/b"), "at": datetime(2020, 1, 1), "all": defaultdict(list, {"a": [1]}), "range": range(3),
          "generator": np.random.get_state(), "settings": Settings(), "slotted": Slotted()}


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
@pytest.mark.parametrize("names", [[name] for name in EXTRAS] + [list(EXTRAS)], ids=[*EXTRAS, "every"])
def test_inert_objects_beside_the_weights_are_left_out_and_told(names: list[str], options: dict[str, Any],
                                                                tmp_path: Path) -> None:
    net = Named()
    file = saved(tmp_path, {**{name: EXTRAS[name] for name in names}, "state_dict": net.state_dict()}, **options)
    found = find(read_tensors(file), Named())
    assert same(found.state(Named()), net)
    kind = type(EXTRAS[names[0]])
    told = "numpy" if names[0] in ("accuracy", "history", "generator") else f"{kind.__module__}.{kind.__qualname__}"
    if told != "builtins.range":
        assert "nothing of them was executed" in found.notes[-1] and told in found.notes[-1]


@pytest.mark.parametrize(("names", "form"), [
    (("0.mean", "0.std"), "{}"), (("normalizer.mean", "normalizer.std"), "model.{}"), (("mean", "std"), "{}"),
    (("mu", "sigma"), "{}"), (("model.mean", "model.std"), "model.{}"), (("MEAN", "STD"), "net.{}"),
    (("module.normalizer.new_mean", "module.normalizer.new_std"), "module.model.{}"),
    (("pixelMean", "pixelStd"), "1.{}"), (("avg", "std_dev"), "net.{}"),
    (("norm.mean.value", "norm.std.value"), "state_dict.{}")])
@pytest.mark.parametrize("shape", [(3,), (1, 3, 1, 1), (3, 1, 1)])
@pytest.mark.parametrize("net", [Named, ours])
def test_a_normalisation_beside_the_network_is_found_under_any_name(
        names: tuple[str, str], form: str, shape: tuple[int, ...], net: Any, tmp_path: Path) -> None:
    mean, std, weights = torch.tensor([0.5, 0.25, 0.125]), torch.tensor([0.25, 0.5, 0.25]), Named()
    content = {names[0]: mean.view(shape), names[1]: std.view(shape),
               **{form.format(key): value for key, value in weights.state_dict().items()}}
    found = find(read_tensors(saved(tmp_path, content)), net())
    assert same(found.state(net()), weights)
    assert found.normalisation(3, "") == (names[0], (0.5, 0.25, 0.125), (0.25, 0.5, 0.25))


def test_a_normalisation_inside_the_network_is_that_of_the_file_or_stays(tmp_path: Path) -> None:
    class Inside(Named):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mu", torch.full((1, 3, 1, 1), 0.5))
            self.register_buffer("sigma", torch.full((1, 3, 1, 1), 0.25))

    own, net = {"mu": torch.zeros(1, 3, 1, 1), "sigma": torch.ones(1, 3, 1, 1)}, Inside()
    for content, mu in ((Named().state_dict(), 0.5), (own | dict(Named().state_dict()), 0.0)):
        found = find(read_tensors(saved(tmp_path, {"state_dict": content})), net)
        assert found.state(net)["mu"].flatten().tolist() == [mu] * 3 and found.normalisation(3, "") is None
        assert any("own mu, sigma stay" in note for note in found.notes) == (mu == 0.5)
    weights = {key: value for key, value in Named().state_dict().items() if "linear" not in key}
    with pytest.raises(CheckpointError, match=r"missing \(linear\.weight"):
        find(read_tensors(saved(tmp_path, weights)), net)


def test_of_several_normalisations_that_of_the_network_counts(tmp_path: Path) -> None:
    def one(place: str, mean: float) -> dict[str, Any]:
        return {f"{place}.norm.mean": torch.full((3,), mean), f"{place}.norm.std": torch.ones(3),
                **{f"{place}.net.{key}": value for key, value in Named().state_dict().items()}}

    source = read_tensors(saved(tmp_path, one("student", 0.25) | one("teacher", 0.5)))
    for entry, mean in (("student", 0.25), ("teacher", 0.5)):
        told = find(source, Named(), entry).normalisation(3, "")
        assert told is not None and told[:2] == (f"{entry}.norm.mean", (mean,) * 3)
    loose = {"a.mean": torch.zeros(3), "a.std": torch.ones(3), "b.mean": torch.ones(3), "b.std": torch.ones(3)}
    with pytest.raises(ConfigError, match=r"2 normalisations: a\.mean, b\.mean"):
        find(read_tensors(saved(tmp_path, loose | Named().state_dict())), Named()).normalisation(3, "")
    plain = {"mean": [0.5, 0.25, 0.125], "std": (1, 1, 1), "net": Named().state_dict()}
    assert find(read_tensors(saved(tmp_path, plain)), Named()).normalisation(3, "") == (
        "mean", (0.5, 0.25, 0.125), (1.0, 1.0, 1.0))
    for wrong in ({"mean": [125.0] * 3, "std": [63.0] * 3}, {"mean": [0.5] * 3, "std": [0.0] * 3}):
        with pytest.raises(ConfigError, match=r"not for pixels in \[0, 1\].*divide"):
            find(read_tensors(saved(tmp_path, plain | wrong)), Named()).normalisation(3, "divide")


@pytest.mark.parametrize("places", [("state_dict", "state_dict_ema"), ("student", "teacher"), ("", "ema"),
                                    ("state_dict.model", "state_dict.shadow")])
def test_of_several_networks_one_must_be_chosen(places: tuple[str, str], tmp_path: Path) -> None:
    nets = [Named(), Named()]
    content = {f"{place}.{key}" if place else key: value for place, net in zip(places, nets, strict=True)
               for key, value in net.state_dict().items()}
    source = read_tensors(saved(tmp_path, content))
    labels = [place or "." for place in places]
    with pytest.raises(ConfigError, match=re.escape(f"2 networks that fit: {', '.join(labels)}")) as caught:
        find(source, Named())
    assert f"entry={labels[0]} or entry={labels[1]}" in str(caught.value)
    for label, net in zip(labels, nets, strict=True):
        assert same(find(source, Named(), label).state(Named()), net)
    with pytest.raises(ConfigError, match="there is no entry 'optimizer' with tensors"):
        find(source, Named(), "optimizer")


@pytest.mark.parametrize("net", [Named, ours])
def test_doubled_weights_are_one_network(net: Any, tmp_path: Path) -> None:
    weights = Named().state_dict()
    content = {f"{place}.{key}": value.clone() for place in ("module.model", "module.attacker.model")
               for key, value in weights.items()}
    found = find(read_tensors(saved(tmp_path, content)), net())
    assert any("equal weights stand at" in note for note in found.notes)
    content["module.attacker.model.linear.bias"] += 1
    with pytest.raises(ConfigError, match="2 networks that fit"):
        find(read_tensors(saved(tmp_path, content)), net())


@pytest.mark.parametrize("more", ["5.weight", "linear2.weight", "conv2.weight", "linear.scale"])
def test_a_larger_network_is_not_taken_for_a_part_of_it(more: str, tmp_path: Path) -> None:
    net = ours() if more[0].isdigit() else Named()
    content = {**net.state_dict(), more: torch.ones(10, 10)}
    with pytest.raises(CheckpointError, match=re.escape(f"1 unexpected ({more})")):
        find(read_tensors(saved(tmp_path, content)), net)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["whole", "entry", "value"])
def test_a_foreign_object_is_refused_and_not_run(options: dict[str, Any], place: str, tmp_path: Path) -> None:
    payload = Payload(tmp_path / "executed")
    content = {"whole": payload, "entry": {"state_dict": Named().state_dict(), "args": payload},
               "value": {**Named().state_dict(), "x": payload}}[place]
    file = saved(tmp_path, content, **options)
    with pytest.raises(CheckpointError, match="nothing in it was executed"):
        read_tensors(file)
    assert not (tmp_path / "executed").exists()


def test_a_whole_pickled_model_is_refused_with_its_class_and_a_loss_beside_weights_is_not(tmp_path: Path) -> None:
    found = find(read_tensors(saved(tmp_path, {"net": Named().state_dict(), "loss": nn.CrossEntropyLoss()})), Named())
    assert "left out: objects of torch.nn.modules.loss.CrossEntropyLoss" in found.notes[-1]
    with pytest.raises(CheckpointError, match=r"test_foreign\.Named.* .*state_dict\(\)"):
        read_tensors(saved(tmp_path, Named()))


def bare_pickle(tmp_path: Path) -> bytes:
    return pickle.dumps(Payload(tmp_path / "executed"))


def compressed(tmp_path: Path) -> bytes:
    source, target = saved(tmp_path, Named().state_dict()), io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for one in old.infolist():
            new.writestr(one.filename, old.read(one))
    return target.getvalue()


@pytest.mark.parametrize("content", [b"", b"PK", b"hello", b"PK\x03\x04" + bytes(100), bare_pickle, compressed])
def test_a_file_that_is_none_is_one_line(content: Any, tmp_path: Path) -> None:
    file = tmp_path / "b.pt"
    file.write_bytes(content if isinstance(content, bytes) else content(tmp_path))
    with pytest.raises(CheckpointError, match="not a file of tensors and plain values") as caught:
        read_tensors(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("content", "says"), [
    ([1, 2], "no state dict in it, but list"),
    ({}, "no state dict in it, but dict"),
    ({"epoch": 1, "weights": {"a": "b"}}, "no state dict in it, but dict 'epoch', 'weights'"),
    ({"a": torch.zeros(1).to_sparse()}, "no state dict in it|not a file of tensors"),
    ({**Named().state_dict(), "linear.bias": torch.full((10,), float("nan"))}, "NaN or infinite values"),
    ({key: value * 1j for key, value in Named().state_dict().items()}, "the weights are complex64, no real numbers"),
    ({key: value.to(torch.int8) for key, value in Named().state_dict().items()}, "the weights are int8"),
    (Named().to("meta").state_dict(), "no state dict in it"),
])
def test_a_file_without_a_sound_state_dict_is_refused(content: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says):
        find(read_tensors(saved(tmp_path, content)), Named())


def test_a_file_without_an_end_is_refused(tmp_path: Path) -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    many: Any = torch.zeros(1)
    for _ in range(40):
        many = {"a": many, "b": many}
    for content in (endless, many):
        with pytest.raises(CheckpointError, match="not a file of tensors and plain values"):
            read_tensors(saved(tmp_path, content))


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read the file: No such file"):
        read_tensors(tmp_path / "none.pt")


def test_safetensors_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    weights = Named().state_dict()
    save_file(weights, file)
    state = read_tensors(file)
    assert {key: tuple(v.shape) for key, v in state.tensors.items()} == {k: tuple(v.shape) for k, v in weights.items()}
    assert not state.ordered  # sorted by name: only names tell what is what
    assert fit(state, Named())[1] == "weights matched by name"
    file.write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_tensors(file)


# ------------------------------------------------------------------------------------------------ matching


def state_of(net: nn.Module, *, ordered: bool = True, prefix: str = "") -> TensorFile:
    return TensorFile(Path("a.pt"), {f"{prefix}{k}": v for k, v in net.state_dict().items()}, "0" * 64, ordered)


def same(tensors: dict[str, Tensor], other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors.values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("prefix", ["", "model.", "net."])
def test_equal_names_are_matched_by_name(prefix: str) -> None:
    source, target = ours(), ours()
    tensors, how = fit(state_of(source, prefix=prefix, ordered=False), target)
    assert "matched by name" in how and same(tensors, source)
    target.load_state_dict(tensors)


def test_other_names_in_the_same_order_are_matched_by_order() -> None:
    source = Named()
    tensors, how = fit(state_of(source), ours())
    assert "by order" in how and same(tensors, source) and list(tensors) == list(ours().state_dict())
    with pytest.raises(CheckpointError, match="missing"):
        fit(state_of(source, ordered=False), ours())


def test_the_counters_of_batch_norm_may_be_absent() -> None:
    state = state_of(ours())
    del state.tensors["0.1.num_batches_tracked"]
    assert fit(state, ours())[0]["0.1.num_batches_tracked"] == 0


def test_a_counter_of_another_shape_does_not_keep_the_weights_out() -> None:
    state = state_of(ours())
    for counter, expected in ((torch.tensor(7), 7), (torch.ones(2, 3), 0)):
        net = ours()
        state.tensors["0.1.num_batches_tracked"] = counter
        net.load_state_dict(fit(state, net)[0])
        assert net.state_dict()["0.1.num_batches_tracked"] == expected


@pytest.mark.parametrize(("net", "says"), [
    (ours(classes=7), "the weights are for 7 classes, the data have 10"),
    (Named(classes=100), "the weights are for 100 classes, the data have 10"),
    (Named(channels=1), "the weights take images of 1 channels, the data have 3"),
    (Named(kernel=7), "conv1.weight has kernels of 7x7, that of the network for images of this size 3x3"),
    (nn.Sequential(*ours()[:2], nn.Linear(16, 10)),
     r"the weights are for images of another size \(2\.weight \(10, 16\) instead of \(10, 4\)\)"),
    (ours(width=6), r"6 of 7 weights have another shape \(0\.0\.weight \(6, 3, 3, 3\) instead of \(4, 3, 3, 3\), "),
    (nn.Linear(3, 4), r"the weights do not fit the network: 7 missing \(0\.0\.weight, 0\.1\.weight, 0\.1\.bias, \.\.\."
                      r"\); 2 unexpected \(weight, bias\)"),
])
def test_what_does_not_fit_is_named_in_one_line(net: nn.Module, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        fit(state_of(net), ours())
    assert "--plugin FILE.py" in str(caught.value)


def test_shapes_are_compared_below_a_holder_too() -> None:
    with pytest.raises(CheckpointError, match="the weights are for 7 classes"):
        fit(state_of(ours(classes=7), prefix="model.", ordered=False), ours())


def test_shapes_are_listed_beside_missing_names() -> None:
    state = state_of(ours())
    state.tensors["2.weight"] = torch.zeros(10, 9)
    del state.tensors["2.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing \(2\.bias\); 1 of another shape \(2\.weight \(10, 9\)"):
        fit(state, ours())


# ------------------------------------------------------------------------------------------------ real architectures


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


class Post(nn.Module):
    """Names and order of the common CIFAR ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(shortcut(inputs, outputs, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Pre(nn.Module):
    """Names and order of the common pre-activation block; `wide`: of the common Wide ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int, wide: bool) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.skip = None
        if stride != 1 or inputs != outputs:
            self.skip = "convShortcut" if wide else "shortcut"
            one = shortcut(inputs, outputs, stride)
            setattr(self, self.skip, one if wide else nn.Sequential(one))

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        skip = x if self.skip is None else getattr(self, self.skip)(active)
        return self.conv2(F.relu(self.bn2(self.conv1(active)))) + skip


class Theirs(nn.Module):
    """resnet18, preact_resnet18 or a Wide ResNet in the names that others use, with few channels."""

    def __init__(self, kind: str, widths: tuple[int, ...], stem: int, blocks: int) -> None:
        super().__init__()
        self.kind, inputs = kind, stem
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        if kind == "resnet18":
            self.bn1 = nn.BatchNorm2d(stem)
        self.stages = []
        for number, width in enumerate(widths, 1):
            layers = []
            for n in range(blocks):
                words = inputs, width, 2 if number > 1 and n == 0 else 1
                layers.append(Post(*words) if kind == "resnet18" else Pre(*words, kind.startswith("wrn")))
                inputs = width
            self.stages.append(f"block{number}" if kind.startswith("wrn") else f"layer{number}")
            stage: nn.Module = nn.Sequential(*layers)
            if kind.startswith("wrn"):
                holder = nn.Module()
                holder.layer, holder.forward = stage, stage.forward
                stage = holder
            setattr(self, self.stages[-1], stage)
        if kind != "resnet18":
            self.bn = nn.BatchNorm2d(widths[-1])
        self.linear = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.kind == "resnet18":
            x = F.relu(self.bn1(x))
        for name in self.stages:
            x = getattr(self, name)(x)
        if self.kind != "resnet18":
            x = F.relu(self.bn(x))
        return self.linear(F.avg_pool2d(x, x.shape[-1]).flatten(1))


@pytest.mark.parametrize(("name", "widths", "stem", "blocks"), [
    ("resnet18", (8, 16, 32, 64), 8, 2), ("preact_resnet18", (8, 16, 32, 64), 8, 2),
    ("wrn_28_10", (16, 40, 80), 8, 4), ("wrn_34_10", (16, 40, 80), 8, 5)])
def test_the_usual_cifar_networks_fit_ours_and_answer_the_same(name: str, widths: tuple[int, ...], stem: int,
                                                               blocks: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = Theirs(name, widths, stem, blocks).double()
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    for _ in range(3):
        theirs(x)  # running statistics of their own
    for parameter in theirs.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # norm layers too
    theirs.eval()
    net = build_model(ModelConfig(name=name, width=0.125), shape=(3, 32, 32), classes=10, mean=(0, 0, 0),
                      std=(1, 1, 1)).get_submodule("net").double().eval()
    state = read_tensors(saved(tmp_path, {"net": theirs.state_dict()}))
    net.load_state_dict(fit(state, net)[0])
    torch.testing.assert_close(net(x), theirs(x), rtol=1e-9, atol=1e-9)
    assert theirs(x).std() > 1e-3


def test_published_networks_that_none_of_ours_computes_are_told_by_their_names() -> None:
    state = {key.replace("conv1", "init_conv").replace("bn1", "layer.0.block.0.batchnorm_0"): value
             for key, value in Named().state_dict().items()}
    with pytest.raises(CheckpointError, match=r"DeepMind's networks .* --plugin FILE"):
        fit(TensorFile(Path("a.pt"), state, "0" * 64, True), ours())
