"""Weights from the Hugging Face hub, torchvision and timm, all out of caches in temporary folders."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.config import load_config, with_absolute_paths
from mat_dist.errors import CheckpointError, ConfigError, EnvironmentFault
from mat_dist.models.registry import Images
from tests.unit.test_published import loaded, write

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(side: int = 32, channels: int = 3, classes: int = 10) -> Images:
    return Images((channels, side, side), classes, (0.3,) * channels, (0.2,) * channels)


def net_of(peer: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = peer.model.get_submodule("net").state_dict()
    return state


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a machine without network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def put(cache: Path, repository: str, files: dict[str, dict[str, Tensor]]) -> None:
    """Files in the cache as the library lays them out."""
    place, commit = cache / f"models--{repository.replace('/', '--')}", "a" * 40
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text(commit)
    folder = place / "snapshots" / commit
    folder.mkdir(parents=True)
    for name, state in files.items():
        if name.endswith(".safetensors"):
            save_file({key: value.contiguous() for key, value in state.items()}, folder / name)
        else:
            torch.save(state, folder / name)


@pytest.fixture
def torch_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's cache of a machine without network."""
    def offline(*_: Any, **__: Any) -> Any:
        raise URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    (tmp_path / "torch/checkpoints").mkdir(parents=True)
    return tmp_path / "torch/checkpoints"


def cached(folder: Path, name: str) -> nn.Module:
    """A network of torchvision with random weights, which are put into its cache as the published ones."""
    with rng.keyed_rng(4):
        net = torchvision.models.get_model(name, weights=None).eval()
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    torch.save(net.state_dict(), folder / url.rpartition("/")[2])
    return net


# ------------------------------------------------------------------------------------------------ hf:ORG/NAME


def small(classes: int = 10) -> dict[str, Tensor]:
    with rng.keyed_rng(2):
        state: dict[str, Tensor] = loaded_new("tiny_cnn", classes).state_dict()
    return state


def loaded_new(name: str, classes: int) -> nn.Module:
    from mat_dist.config.schema import ModelConfig
    from mat_dist.models import build_model

    return build_model(ModelConfig(name=name), shape=(3, 32, 32), classes=classes, mean=(0,) * 3,
                       std=(1,) * 3).get_submodule("net")


def test_a_peer_starts_from_the_hub_and_a_teacher_too(hub: Path) -> None:
    plain = small()
    put(hub, "org/one", {"model.safetensors": plain, "optimizer.pt": {"step": torch.ones(1)}})
    put(hub, "org/two", {"a.pt": plain, "b.pt": {"ema": plain, "net": {k: -v for k, v in plain.items()}}})
    for start in ("hf:org/one", f"hf:org/one@{'a' * 40}", "hf:org/two/a.pt", "hf:org/two/b.pt:ema",
                  "pretrained:hf:org/one"):
        for frozen in (True, False):
            peer = loaded(start, "tiny_cnn", images(), frozen)
            assert all(torch.equal(value, plain[key]) for key, value in net_of(peer).items())
            assert start.removesuffix(":ema") in peer.notes[0]


@pytest.mark.parametrize(("start", "kind", "says"), [
    ("hf:org/none", EnvironmentFault, r"hf download org/none .* copy its folder models--org--none to .*hub here"),
    ("hf:org/two", CheckpointError, r"has 2 files of weights; there are a\.pt, b\.pt .*write hf:org/two/FILE"),
    ("hf:org/two/c.pt", CheckpointError, r"no file c\.pt; there are a\.pt"),
    ("hf:org/two/b.pt", ConfigError, r"init_from=hf:org/two/b\.pt:ema"),
    ("hf:org/seven", CheckpointError, "the weights are for 7 classes, the data have 10"),
    ("hf:org", ConfigError, "no address on the hub .*write hf:ORG/NAME"), ("hf:", ConfigError, "no address"),
    ("hf:a/b@c@d", ConfigError, "no address")])
def test_what_the_hub_cannot_give_is_one_line(start: str, kind: type[Exception], says: str, hub: Path) -> None:
    plain = small()
    put(hub, "org/two", {"a.pt": plain, "b.pt": {"ema": plain, "net": {k: -v for k, v in plain.items()}}})
    put(hub, "org/seven", {"model.safetensors": small(7)})
    with pytest.raises(kind, match=says) as caught:
        loaded(start, "tiny_cnn", images())
    assert "\n" not in str(caught.value)


def test_addresses_are_recorded_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for start, recorded in (("hf:org/name", "hf:org/name"), ("pretrained", "pretrained"),
                            ("pretrained:hf:a/b@c/d.pt", "pretrained:hf:a/b@c/d.pt"),
                            ("pretrained:a.pt:ema", f"pretrained:{tmp_path}/a.pt:ema"), ("a.pt", f"{tmp_path}/a.pt")):
        assert with_absolute_paths(load_config(None, [f"peers.0.init_from={start}"])).peers[0].init_from == recorded


# ------------------------------------------------------------------------------------------------ pretrained


def test_torchvision_gives_its_weights_and_a_new_last_layer_is_told(torch_hub: Path) -> None:
    theirs = cached(torch_hub, "squeezenet1_1")
    peer = loaded("pretrained", "torchvision/squeezenet1_1", images(64), frozen=False)
    assert all(torch.equal(value, net_of(peer)[key]) for key, value in theirs.state_dict().items() if
               not key.startswith("classifier"))
    assert net_of(peer)["classifier.1.weight"].std() > 0
    assert not any("middle" in note for note in peer.notes)  # the stem is as it was, on small images too
    assert any("a new last layer (classifier.1.weight, classifier.1.bias) for 10 classes, the weights are for 1000" in
               note for note in peer.notes)
    assert peer.model.get_submodule("normalize").get_buffer("mean").flatten().tolist() == pytest.approx(IMAGENET[0])
    whole = loaded("pretrained", "torchvision/squeezenet1_1", images(64, classes=1000))
    x = rng.uniform(1, (2, 3, 64, 64))
    want = theirs(torchvision.transforms.functional.normalize(x, *map(list, IMAGENET)))
    torch.testing.assert_close(whole.model(x), want, rtol=1e-4, atol=1e-5)
    assert not any("new last layer" in note for note in whole.notes)
    with pytest.raises(CheckpointError, match=r"for 1000 classes, the data have 10, and a frozen peer cannot learn"):
        loaded("pretrained", "torchvision/squeezenet1_1", images(64))


def test_a_grey_image_is_shown_to_pretrained_colours(torch_hub: Path) -> None:
    theirs = cached(torch_hub, "squeezenet1_1")
    peer = loaded("pretrained", "torchvision/squeezenet1_1", images(64, 1, 1000))
    assert torch.equal(net_of(peer)["1.features.0.weight"], theirs.state_dict()["features.0.weight"])


def test_of_the_published_stem_a_network_with_a_smaller_one_takes_the_middle(torch_hub: Path) -> None:
    theirs = cached(torch_hub, "resnet18").state_dict()
    ours = loaded("pretrained", "resnet18", images(), frozen=False)
    assert torch.equal(net_of(ours)["0.0.weight"], theirs["conv1.weight"][..., 2:5, 2:5])
    assert torch.equal(net_of(ours)["1.7.conv2.weight"], theirs["layer4.1.conv2.weight"])
    assert any("of the first convolution, conv1.weight, the middle is taken" in note for note in ours.notes)


def test_timm_gives_its_weights_for_the_size_and_the_channels_of_the_images(hub: Path) -> None:
    timm = pytest.importorskip("timm")
    with rng.keyed_rng(4):
        theirs = timm.create_model("test_vit").eval()
    put(hub, "timm/test_vit.r160_in1k", {"model.safetensors": theirs.state_dict()})
    peer = loaded("pretrained", "timm/test_vit", images(160, classes=1000))
    mean, std = theirs.pretrained_cfg["mean"], theirs.pretrained_cfg["std"]
    x = rng.uniform(1, (2, 3, 160, 160))
    want = theirs(torchvision.transforms.functional.normalize(x, list(mean), list(std)))
    torch.testing.assert_close(peer.model(x), want, rtol=1e-4, atol=1e-5)
    small_ = loaded("pretrained", "timm/test_vit", images(32, 1), frozen=False)
    assert torch.equal(net_of(small_)["blocks.0.attn.qkv.weight"], theirs.state_dict()["blocks.0.attn.qkv.weight"])
    grey = theirs.state_dict()["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(net_of(small_)["patch_embed.proj.weight"], grey)
    assert any("a new last layer (head.weight, head.bias) for 10 classes" in note for note in small_.notes)


@pytest.mark.parametrize(("model", "kind", "says"), [
    ("torchvision/squeezenet1_1", EnvironmentFault, r"put https://.*\.pth into .*/checkpoints \(TORCH_HOME\)"),
    ("timm/test_vit", EnvironmentFault, r"copy its folder models--timm--test_vit.r160_in1k to .*hub here"),
    ("tiny_cnn", ConfigError, r"no pretrained weights for this network .*write init_from=FILE"),
    ("robustbench/Sehwag2021Proxy_R18", ConfigError, "no pretrained weights for this network"),
    ("timm/resnet18_nothing", ConfigError, "timm has no classifier")])
def test_pretrained_weights_that_cannot_be_had_are_one_line(model: str, kind: type[Exception], says: str, hub: Path,
                                                            torch_hub: Path) -> None:
    with pytest.raises(kind, match=says) as caught:
        loaded("pretrained", model, images(64), False)
    assert "\n" not in str(caught.value)


def test_a_file_is_a_start_for_other_classes_where_that_is_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path, small(7))
    with pytest.raises(CheckpointError, match=r"for 7 classes, the data have 10.*init_from=pretrained:"):
        loaded(file, "tiny_cnn", images(), frozen=False)
    peer = loaded(f"pretrained:{file}", "tiny_cnn", images(), frozen=False)
    assert torch.equal(net_of(peer)["0.0.weight"], small(7)["0.0.weight"])
    assert any("last layer (4.weight, 4.bias) for 10 classes, the weights are for 7" in note for note in peer.notes)
    with pytest.raises(CheckpointError, match="a frozen peer cannot learn"):
        loaded(f"pretrained:{file}", "tiny_cnn", images())
    with pytest.raises(CheckpointError, match="no such file or folder of a run"):
        loaded("pretrained:none.pt", "tiny_cnn", images(), frozen=False)
