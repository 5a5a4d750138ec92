"""The data sets that have a name."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import sys
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch import nn
from torchvision import datasets

from mat_dist.config import load_plugins
from mat_dist.config.schema import DataConfig, ModelConfig
from mat_dist.data import RawData, builtin, dataset_names, load_data, register_dataset
from mat_dist.data.builtin import IDX_FILES, load_digits, load_fashion_mnist, read_idx, scale_levels
from mat_dist.data.images import _LOADERS, find_dataset
from mat_dist.data.load import check_raw
from mat_dist.errors import ConfigError, DataError, OutputError
from mat_dist.models import build_model, register_model
from tests.unit.data_files import random_images

# ---------------------------------------------------------------- digits


def test_levels_are_scaled_by_rounding_to_the_nearest_byte():
    # round(255 v / 16) by hand; 8 is the only tie, 127.5, and goes up
    expected = [0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255]
    assert scale_levels(np.arange(17, dtype=np.uint8)).tolist() == expected


def test_digits_are_the_1797_images_split_by_class_and_the_same_for_every_seed():
    raw = load_digits(DataConfig())
    assert raw.train_images.shape == (1437, 1, 8, 8)
    assert raw.test_images.shape == (360, 1, 8, 8)
    # Class sizes of the test part as the UCI repository lists them.
    sizes = np.bincount(raw.train_labels) + np.bincount(raw.test_labels)
    assert sizes.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.abs(np.bincount(raw.test_labels) - sizes * 360 / 1797).max() < 1
    first, second = (load_data(DataConfig(), seed=seed, batch_size=128) for seed in (0, 1))
    assert first.digest == second.digest
    assert torch.equal(first.test.images, second.test.images)
    assert not torch.equal(first.val.images, second.val.images)
    assert (len(first.train), len(first.val), len(first.test)) == (1150, 287, 360)


# ---------------------------------------------------------------- Fashion-MNIST


@pytest.mark.skipif(not builtin.DEBIAN_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian_has_the_published_sizes():
    raw = check_raw(load_fashion_mnist(DataConfig(name="fashion_mnist"), True), "here")
    assert raw.train_images.shape == (60_000, 1, 28, 28)
    assert torch.bincount(raw.train_labels).tolist() == [6000] * 10
    assert torch.bincount(raw.test_labels).tolist() == [1000] * 10
    # The first training image of the published set is an ankle boot.
    assert raw.classes[int(raw.train_labels[0])] == "Ankle boot"
    assert abs(float(raw.train_images.float().mean()) / 255 - 0.2860) < 1e-4  # the mean in common use


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(folder: Path, *, compressed: bool) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    stored = dict(zip(IDX_FILES, (random_images(20, 28, 28), np.arange(20, dtype=np.uint8) % 10,
                              random_images(10, 28, 28, seed=1), np.arange(10, dtype=np.uint8)), strict=True))
    for name, array in stored.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return stored


@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("compressed", [True, False])
def test_fashion_mnist_is_found_in_root_and_in_torchvisions_place(tmp_path, below, compressed):
    stored = write_fashion(tmp_path / below, compressed=compressed)
    raw = load_fashion_mnist(DataConfig(name="fashion_mnist", root=str(tmp_path)), True)
    assert np.array_equal(raw.train_images[:, 0], stored[IDX_FILES[0]])
    assert np.array_equal(raw.test_labels, stored[IDX_FILES[3]])


def test_a_given_root_without_files_is_an_error_even_where_debian_has_them(tmp_path):
    with pytest.raises(DataError, match=r"no idx files.*data.download=true"):
        load_fashion_mnist(DataConfig(name="fashion_mnist", root=str(tmp_path)), True)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "not an idx file"), (b"\x00\x00\x08\x01" + bytes(4), "not an idx file of bytes with 3 axes"),
    (b"\x00\x00\x0d\x03" + bytes(12), "it starts with 00000d03"),
    (idx(random_images(3, 4, 4))[:-1], "fewer bytes than the 48 of the header"),
    (idx(random_images(3, 4, 4)) + b"x", "more bytes than the 48 of the header"),
    (b"\x00\x00\x08\x03" + struct.pack(">3I", 2**31, 2**31, 2**31), "at most 1073741824 are read"),
    (b"\x00\x00\x08\x03" + bytes(12), "the header says 0 x 0 x 0 bytes"),
])
@pytest.mark.parametrize("compressed", [True, False])
def test_damaged_idx_files_are_refused(tmp_path, content, message, compressed):
    path = tmp_path / ("images.gz" if compressed else "images")
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(DataError, match=message):
        read_idx(path, 3)


def test_damaged_gzip_files_are_refused(tmp_path):
    content = gzip.compress(idx(random_images(30, 8, 8)))
    for number, damaged in enumerate((content[:-9], b"text", content[:40] + b"\xff\xff\xff\xff" + content[44:])):
        path = tmp_path / f"{number}.gz"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{number}.gz"):
            read_idx(path, 3)


# ---------------------------------------------------------------- CIFAR

CIFAR = ("cifar-10-python.tar.gz", "cifar-10-batches-py")


def cifar_archive(root: Path, monkeypatch, *, change: dict[str, bytes] | None = None, known: bool = True) -> None:
    """A small archive laid out as CIFAR-10's; `known`: as if it were the published one."""
    seeds = {f"data_batch_{part}": part for part in range(1, 6)} | {"test_batch": 9}
    members = {name: {"data": random_images(10, 3072, seed=seed), "labels": list(range(10))}
               for name, seed in seeds.items()}
    members["batches.meta"] = {"label_names": [f"c{k}" for k in range(10)]}
    contents = {name: pickle.dumps(value, protocol=4) for name, value in members.items()} | (change or {})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"{CIFAR[1]}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    root.mkdir(parents=True, exist_ok=True)
    (root / CIFAR[0]).write_bytes(buffer.getvalue())
    if known:
        md5 = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
        monkeypatch.setitem(builtin.CIFAR_SHA256, "cifar10", hashlib.sha256(buffer.getvalue()).hexdigest())
        monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, md5[name]] for name in list(seeds)[:5]])
        monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
        monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": md5["batches.meta"]})


def load_cifar(root: Path, **other) -> RawData:
    return builtin.load_cifar(DataConfig(name="cifar10", root=str(root), **other), True)


def test_cifar_images_labels_and_names_are_those_of_the_archive(tmp_path, monkeypatch):
    cifar_archive(tmp_path / "set", monkeypatch)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    for root in (tmp_path / "set", tmp_path / "set" / CIFAR[0]):
        raw = load_cifar(root)
        assert raw.train_images.shape == (50, 3, 32, 32)
        assert np.array_equal(raw.train_images[10:20], random_images(10, 3072, seed=2).reshape(10, 3, 32, 32))
        assert raw.test_labels.tolist() == list(range(10))
        assert raw.classes[3] == "c3"
    assert [path.name for path in (tmp_path / "set").iterdir()] == [CIFAR[0]]  # nothing is left unpacked
    assert list((tmp_path / "temporary").iterdir()) == []


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_an_archive_that_is_not_the_published_one_is_refused_and_nothing_in_it_runs(tmp_path, monkeypatch):
    witness = tmp_path / "witness"
    cifar_archive(tmp_path / "set", monkeypatch, change={"data_batch_1": pickle.dumps(Touch(str(witness)))},
                  known=False)
    monkeypatch.setattr("tarfile.open", None)  # not even unpacked: calling it would be an error
    with pytest.raises(DataError, match=r"not the published cifar-10-python.tar.gz: its SHA-256 is .*is not opened"):
        load_cifar(tmp_path / "set")
    assert not witness.exists()


def test_a_damaged_archive_is_refused(tmp_path, monkeypatch):
    cifar_archive(tmp_path, monkeypatch)
    path = tmp_path / CIFAR[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"not the published .*it may be incomplete"):
        load_cifar(tmp_path)


def test_a_temporary_folder_that_is_full_is_named(tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    cifar_archive(tmp_path, monkeypatch)
    monkeypatch.setattr(tarfile.TarFile, "extractall", fail)
    with pytest.raises(OutputError, match=r"cannot unpack .*No space left on device.*TMPDIR"):
        load_cifar(tmp_path)


@pytest.mark.parametrize(("name", "sha256"), [
    ("cifar10", "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),
    ("cifar100", "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7")])
def test_the_real_digests_are_demanded(tmp_path, name, sha256):
    assert builtin.CIFAR_SHA256[name] == sha256
    (tmp_path / getattr(datasets, name.upper()).filename).write_bytes(b"something else")
    with pytest.raises(DataError, match=r"\(14 bytes\)"):
        find_dataset(name)(DataConfig(name=name, root=str(tmp_path)), True)


def test_an_unpacked_folder_alone_is_refused_with_the_way_out(tmp_path):
    (tmp_path / CIFAR[1]).mkdir()
    with pytest.raises(DataError, match=r"only the unpacked folder.*put https://.*/cifar-10-python.tar.gz"):
        load_cifar(tmp_path)
    with pytest.raises(DataError, match=r"data\.root is not set"):
        builtin.load_cifar(DataConfig(name="cifar10"), True)


def test_a_download_is_read(tmp_path, monkeypatch):
    cifar_archive(tmp_path / "source", monkeypatch)
    content = (tmp_path / "source" / CIFAR[0]).read_bytes()
    monkeypatch.setattr("torchvision.datasets.utils.download_url",
                        lambda url, root, filename, md5: (Path(root) / filename).write_bytes(content))
    assert len(load_cifar(tmp_path / "new", download=True).train_labels) == 50


@pytest.mark.parametrize("problem", [URLError("no route"), RuntimeError("File not found or corrupted.")])
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "fashion_mnist"])
def test_a_failed_download_says_which_file_to_copy_where(tmp_path, monkeypatch, problem, name):
    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fail)
    with pytest.raises(DataError, match=r"cannot download http.*copy .* into that folder"):
        find_dataset(name)(DataConfig(name=name, root=str(tmp_path), download=True), True)
    assert not any(path.is_file() and path.suffix != ".lock" for path in tmp_path.rglob("*"))


# ---------------------------------------------------------------- SVHN

SVHN_FILES = ("train_32x32.mat", "test_32x32.mat")


def test_svhn_maps_label_ten_to_the_digit_zero(tmp_path, monkeypatch):
    images, labels = random_images(20, 32, 32, 3), np.arange(20) % 10 + 1
    known = {}
    for split, name in zip(("train", "test"), SVHN_FILES, strict=True):
        savemat(tmp_path / name, {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None].astype(np.uint8)},
                do_compression=True)
        known[split] = ["", name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", known)
    raw = builtin.load_svhn(DataConfig(name="svhn", root=str(tmp_path)), True)
    assert np.array_equal(raw.train_images, images.transpose(0, 3, 1, 2))
    assert raw.test_labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2
    (tmp_path / SVHN_FILES[1]).write_bytes((tmp_path / SVHN_FILES[1]).read_bytes()[:500])
    with pytest.raises(DataError, match=rf"not the published {SVHN_FILES[1]}.*is not opened"):
        builtin.load_svhn(DataConfig(name="svhn", root=str(tmp_path)), True)


def test_svhn_without_files_names_them(tmp_path):
    with pytest.raises(DataError, match=r"train_32x32.mat or test_32x32.mat not found"):
        builtin.load_svhn(DataConfig(name="svhn", root=str(tmp_path)), True)


# ---------------------------------------------------------------- registry


def test_a_plugin_registers_its_own_data_set_and_passes_the_same_checks(monkeypatch):
    monkeypatch.setattr("mat_dist.data.images._LOADERS", dict(_LOADERS))
    labels = np.arange(60) % 3

    @register_dataset("mine")
    def mine(config: DataConfig) -> RawData:
        images = random_images(60, 2, 5, 6)
        return RawData(images, labels, images[:9], labels[:9] + (config.root is not None), ("a", "b", "c"))

    assert "mine" in dataset_names()
    data = load_data(DataConfig(name="mine"), seed=0, batch_size=8)
    assert data.train.shape == (2, 5, 6)
    assert data.classes == ("a", "b", "c")
    with pytest.raises(DataError, match=r"label 3 .*data.name=mine, data.root=x, test labels"):
        load_data(DataConfig(name="mine", root="x"), seed=0, batch_size=8)
    with pytest.raises(ConfigError, match="registered twice"):
        register_dataset("mine")(mine)


def test_an_unknown_name_gets_the_nearest_known_one():
    with pytest.raises(ConfigError, match=r"unknown data set 'cifar_10'.*did you mean cifar10.*fashion_mnist"):
        load_data(DataConfig(name="cifar_10"), seed=0, batch_size=8)


@pytest.mark.parametrize("code", [0, "no licence"])
def test_a_reader_or_a_builder_that_exits_is_an_error_with_its_name(monkeypatch, code):
    monkeypatch.setattr("mat_dist.data.images._LOADERS", dict(_LOADERS))
    monkeypatch.setattr("mat_dist.models.registry._BUILDERS", {})

    @register_dataset("leaves")
    @register_model("leaves")
    def leave(*_: object) -> None:
        sys.exit(code)

    with pytest.raises(DataError, match=rf"its reader left with sys.exit\({code!r}\) \(data.name=leaves\)"):
        load_data(DataConfig(name="leaves"), seed=0, batch_size=8)
    class Leaves(nn.Linear):
        forward = leave

    register_model("leaves later")(lambda *_: Leaves(2, 2))
    for name in ("leaves", "leaves later"):
        with pytest.raises(ConfigError, match=rf"its builder left with sys.exit\({code!r}\) \(model.name={name}\)"):
            build_model(ModelConfig(name=name), shape=(1, 8, 8), classes=2, mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize(("body", "error", "told"), [
    ("@register_dataset('faulty')\ndef read(config):\n    return RawData(1)", DataError,
     "raised TypeError.*mine.py, line 5"),
    ("@register_dataset('faulty')\ndef read(config):\n    raise OSError('gone')", DataError, "the data: gone"),
    ("@register_model('faulty')\ndef net(config, shape, classes):\n    return config.hidden", ConfigError,
     "raised AttributeError.*mine.py, line 5"),
    ("@register_model('faulty')\nclass Net(nn.Module):\n    def __init__(self):\n        pass", ConfigError,
     "raised TypeError.*a builder takes"),
    ("@register_model('faulty')\ndef net(config, shape, classes):\n    nn.Flatten()", ConfigError, "returned NoneType"),
    ("@register_model('faulty')\nclass Net(nn.Module):\n    def __init__(self, *_):\n        super().__init__()\n"
     "    def forward(self, x):\n        return self.nope", ConfigError, "cannot take images.*AttributeError.*line 8")])
def test_what_a_plug_in_raises_is_its_error_with_the_line_and_no_bug_of_ours(tmp_path, monkeypatch, body, error, told):
    monkeypatch.setattr("mat_dist.data.images._LOADERS", dict(_LOADERS))
    monkeypatch.setattr("mat_dist.models.registry._BUILDERS", {})
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\nfrom mat_dist.data import RawData, register_dataset; "
                    f"from mat_dist.models import register_model\n{body}\n")
    load_plugins([str(file)])
    with pytest.raises(error, match=told):
        if error is DataError:
            load_data(DataConfig(name="faulty"), seed=0, batch_size=8)
        build_model(ModelConfig(name="faulty"), shape=(1, 8, 8), classes=2, mean=(0.5,), std=(0.5,))


def test_a_folder_for_digits_is_refused_since_no_image_of_it_would_be_read():
    with pytest.raises(ConfigError, match=r"data.root=pets has no meaning for digits.*--config own_images"):
        load_data(DataConfig(name="digits", root="pets"), seed=0, batch_size=8)


def test_a_file_in_place_of_the_folder_is_told_which_data_set_reads_it(tmp_path):
    (tmp_path / "mine.npz").touch()
    with pytest.raises(DataError, match=r"data\.name=npz reads an \.npz file"):
        load_data(DataConfig(name="folder", root=str(tmp_path / "mine.npz")), seed=0, batch_size=8)


def test_a_lack_of_memory_while_reading_is_an_error_of_the_data(monkeypatch):
    monkeypatch.setattr("mat_dist.data.images._LOADERS", dict(_LOADERS))

    @register_dataset("large")
    def large(config: DataConfig) -> RawData:
        raise MemoryError("Unable to allocate 9 TiB")

    with pytest.raises(DataError, match=r"do not fit into memory \(Unable to allocate 9 TiB\) \(data.name=large\)"):
        load_data(DataConfig(name="large"), seed=0, batch_size=8)
