"""Checkpoints that are not ours: reading state dicts without running anything, and matching them to a network."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mat_dist.checkpoints.foreign import StateDict, fitted, read_state_dict
from mat_dist.config.schema import ModelConfig
from mat_dist.errors import CheckpointError
from mat_dist.models import build_model


class Named(nn.Module):
    """A small residual network with the names that others use."""

    def __init__(self, channels: int = 3, classes: int = 10, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, classes)


def ours(channels: int = 3, classes: int = 10, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Conv2d(channels, width, 3, bias=False), nn.BatchNorm2d(width)), nn.ReLU(),
                         nn.Linear(width, classes))


def saved(folder: Path, content: Any, name: str = "a.pt", **options: Any) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def fit(state: StateDict, net: nn.Module) -> tuple[dict[str, Tensor], str]:
    return fitted(state, net, channels=3, classes=10)


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("entry", [None, "state_dict", "model_state_dict", "model", "net"])
def test_a_state_dict_is_found_alone_or_beside_other_things(entry: str | None, tmp_path: Path) -> None:
    weights = Named().state_dict()
    optimizer = torch.optim.SGD(Named().parameters(), 0.1, momentum=0.9).state_dict()
    content = weights if entry is None else {"epoch": 3, "acc": 0.5, "optimizer": optimizer, entry: weights}
    state = read_state_dict(saved(tmp_path, content))
    assert list(state.tensors) == list(weights) and state.ordered
    assert all(torch.equal(state.tensors[key], value) for key, value in weights.items())
    assert state.notes == (() if entry is None else (f"entry {entry!r}",))


def test_files_of_old_torch_versions_are_read_too(tmp_path: Path) -> None:
    weights = Named().state_dict()
    state = read_state_dict(saved(tmp_path, {"net": weights}, _use_new_zipfile_serialization=False))
    assert all(torch.equal(state.tensors[key], value) for key, value in weights.items())


def test_wrappers_before_names_are_taken_away(tmp_path: Path) -> None:
    weights = Named().state_dict()
    wrapped = {f"module._orig_mod.{key}": value for key, value in weights.items()}
    averaged = {"n_averaged": torch.tensor(3), **{f"module.module.{key}": value for key, value in weights.items()}}
    partly = {key.replace("conv1.", "conv1._orig_mod."): value for key, value in weights.items()}
    for content in (wrapped, averaged, partly, torch.optim.swa_utils.AveragedModel(Named()).state_dict()):
        assert list(read_state_dict(saved(tmp_path, content)).tensors) == list(weights)
    mixed = {**weights, "module.other": torch.zeros(1)}
    assert list(read_state_dict(saved(tmp_path, mixed)).tensors) == list(mixed)  # not all of them: left as it is


def test_parameters_and_what_pytorch_puts_into_checkpoints_are_plain(tmp_path: Path) -> None:
    schedule = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD(Named().parameters(), 0.1), [2, 3])
    content = {"state_dict": OrderedDict(Named().named_parameters()), "schedule": schedule.state_dict(),
               "size": torch.Size([3, 4])}
    state = read_state_dict(saved(tmp_path, content))
    assert all(type(value) is Tensor and not value.requires_grad for value in state.tensors.values())


@pytest.mark.parametrize("names", [("normalize.mean", "normalize.std"), ("mean", "std"), ("mu", "sigma")])
def test_a_normalisation_in_the_file_is_taken_out(names: tuple[str, str], tmp_path: Path) -> None:
    content = {names[0]: torch.tensor([0.5, 0.25, 0.125]).view(1, 3, 1, 1), names[1]: torch.full((3,), 0.25),
               **Named().state_dict()}
    state = read_state_dict(saved(tmp_path, content))
    assert (state.mean, state.std) == ((0.5, 0.25, 0.125), (0.25, 0.25, 0.25))
    assert list(state.tensors) == list(Named().state_dict())


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
        read_state_dict(file)
    assert not (tmp_path / "executed").exists()


def test_a_whole_pickled_model_is_refused_with_its_class(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"test_foreign\.Named .*state_dict\(\)"):
        read_state_dict(saved(tmp_path, Named()))


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
        read_state_dict(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("content", "says"), [
    ([1, 2], "no state dict in it, but list"),
    ({}, "no state dict in it, but dict"),
    ({"epoch": 1, "weights": {"a": torch.zeros(1)}}, "no state dict in it, but dict 'epoch', 'weights'"),
    ({"state_dict": {"a": torch.zeros(1), "b": 3}}, "no state dict in it, but dict 'a', 'b'"),
    ({"a": torch.zeros(1).to_sparse()}, "no state dict in it|not a file of tensors"),
    ({"a": torch.tensor([1.0, float("nan")])}, "NaN or infinite values"),
])
def test_a_file_without_a_sound_state_dict_is_refused(content: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says):
        read_state_dict(saved(tmp_path, content))


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read the file: No such file"):
        read_state_dict(tmp_path / "none.pt")


def test_safetensors_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    weights = Named().state_dict()
    save_file(weights, file)
    state = read_state_dict(file)
    assert {key: tuple(v.shape) for key, v in state.tensors.items()} == {k: tuple(v.shape) for k, v in weights.items()}
    assert not state.ordered  # sorted by name: only names tell what is what
    assert fit(state, Named())[1] == "matched by name"
    file.write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_state_dict(file)


# ------------------------------------------------------------------------------------------------ matching


def state_of(net: nn.Module, *, ordered: bool = True, prefix: str = "") -> StateDict:
    return StateDict(Path("a.pt"), {f"{prefix}{k}": v for k, v in net.state_dict().items()}, "0" * 64, ordered, ())


def same(tensors: dict[str, Tensor], other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors.values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("prefix", ["", "model.", "net."])
def test_equal_names_are_matched_by_name(prefix: str) -> None:
    source, target = ours(), ours()
    tensors, how = fit(state_of(source, prefix=prefix, ordered=False), target)
    assert how.startswith("matched by name") and same(tensors, source)
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


@pytest.mark.parametrize(("net", "says"), [
    (ours(classes=7), "the weights are for 7 classes, the data have 10"),
    (Named(classes=100), "the weights are for 100 classes, the data have 10"),
    (Named(channels=1), "the weights take images of 1 channels, the data have 3"),
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
    state = read_state_dict(saved(tmp_path, {"net": theirs.state_dict()}))
    net.load_state_dict(fit(state, net)[0])
    torch.testing.assert_close(net(x), theirs(x), rtol=1e-9, atol=1e-9)
    assert theirs(x).std() > 1e-3
