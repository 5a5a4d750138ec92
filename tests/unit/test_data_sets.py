"""The data sets that have a name."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import struct
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

from mat_dist.config.schema import DataConfig
from mat_dist.data import RawData, cifar, dataset_names, fashion_mnist, load_data, register_dataset, svhn
from mat_dist.data.checks import check_raw
from mat_dist.data.digits import load_digits, scale_levels
from mat_dist.data.fashion_mnist import FILES, load_fashion_mnist, read_idx
from mat_dist.data.registry import _LOADERS, find_dataset
from mat_dist.errors import ConfigError, DataError, EnvironmentFault
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


@pytest.mark.skipif(not fashion_mnist.DEBIAN_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
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
    stored = dict(zip(FILES, (random_images(20, 28, 28), np.arange(20, dtype=np.uint8) % 10,
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
    assert np.array_equal(raw.train_images[:, 0], stored[FILES[0]])
    assert np.array_equal(raw.test_labels, stored[FILES[3]])


def test_a_given_root_without_files_is_an_error_even_where_debian_has_them(tmp_path):
    with pytest.raises(DataError, match=r"no idx files.*data.download=true"):
        load_fashion_mnist(DataConfig(name="fashion_mnist", root=str(tmp_path)), True)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "not an idx file"), (b"\x00\x00\x08\x01" + bytes(4), "not an idx file of bytes with 3 axes"),
    (b"\x00\x00\x0d\x03" + bytes(12), "it starts with 00000d03"),
    (idx(random_images(3, 4, 4))[:-1], "47 bytes after the header, which says 48"),
    (idx(random_images(3, 4, 4)) + b"x", "more than 48 bytes after the header"),
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


def cifar_archive(root: Path, *, change: dict[str, bytes] | None = None) -> cifar.Archive:
    """A small archive laid out as CIFAR-10's, and its description."""
    seeds = {f"data_batch_{part}": part for part in range(1, 6)} | {"test_batch": 9}
    members = {name: {b"data": random_images(10, 3072, seed=seed), b"labels": list(range(10))}
               for name, seed in seeds.items()}
    members["batches.meta"] = {b"label_names": [b"c%d" % k for k in range(10)]}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, value in members.items():
            content = (change or {}).get(name, pickle.dumps(value, protocol=4))
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("cifar-10-batches-py/../../evil")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    content = buffer.getvalue()
    root.mkdir(parents=True, exist_ok=True)
    (root / cifar.CIFAR10.filename).write_bytes(content)
    return replace(cifar.CIFAR10, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def test_cifar_images_labels_and_names_are_those_of_the_archive(tmp_path):
    archive = cifar_archive(tmp_path)
    for root in (tmp_path, tmp_path / archive.filename):
        raw = cifar.load_archive(archive, DataConfig(name="cifar10", root=str(root)), True)
        assert raw.train_images.shape == (50, 3, 32, 32)
        assert np.array_equal(raw.train_images[10:20], random_images(10, 3072, seed=2).reshape(10, 3, 32, 32))
        assert raw.test_labels.tolist() == list(range(10))
        assert raw.classes[3] == "c3"
    assert sorted(path.name for path in tmp_path.iterdir()) == [archive.filename]  # nothing is unpacked


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("known", [False, True])
def test_pickles_that_run_code_are_refused_and_nothing_runs(tmp_path, known):
    witness = tmp_path / "witness"
    changed = cifar_archive(tmp_path / "set", change={"data_batch_1": pickle.dumps(Touch(str(witness)))})
    archive = changed if known else replace(changed, sha256=cifar.CIFAR10.sha256)
    message = "io.open is not allowed" if known else "not the published cifar-10-python.tar.gz: its SHA-256 is"
    with pytest.raises(DataError, match=message):
        cifar.load_archive(archive, DataConfig(name="cifar10", root=str(tmp_path / "set")), True)
    assert not witness.exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1]), pickle.dumps({b"data": np.zeros(3)}),
                                     pickle.dumps({b"data": np.zeros((2, 3072), object), b"labels": [0, 1]}),
                                     pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [0, 1]})])
def test_members_that_are_no_image_batches_are_refused(tmp_path, content):
    archive = cifar_archive(tmp_path, change={"test_batch": content})
    with pytest.raises(DataError, match="cannot read the archive"):
        cifar.load_archive(archive, DataConfig(name="cifar10", root=str(tmp_path)), True)


def test_members_of_unexpected_size_are_not_read(tmp_path, monkeypatch):
    archive = cifar_archive(tmp_path)
    monkeypatch.setattr(cifar, "MOST_MEMBER_BYTES", 1000)
    with pytest.raises(DataError, match="too many for this data set"):
        cifar.load_archive(archive, DataConfig(name="cifar10", root=str(tmp_path)), True)


@pytest.mark.parametrize(("name", "sha256"), [
    ("cifar10", "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),
    ("cifar100", "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7")])
def test_the_real_digests_are_demanded_and_agree_with_torchvisions_md5(tmp_path, name, sha256):
    from torchvision import datasets

    archive = getattr(cifar, name.upper())
    assert archive.sha256 == sha256
    published = getattr(datasets, name.upper())
    assert (archive.url, archive.filename, archive.md5) == (published.url, published.filename, published.tgz_md5)
    (tmp_path / archive.filename).write_bytes(b"something else")
    with pytest.raises(DataError, match=f"it has 14 bytes instead of {archive.size}"):
        find_dataset(name)(DataConfig(name=name, root=str(tmp_path)), True)


def test_an_unpacked_folder_alone_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(DataError, match=r"only the unpacked folder.*put https://.*/cifar-10-python.tar.gz"):
        cifar.load_cifar10(DataConfig(name="cifar10", root=str(tmp_path)), True)
    with pytest.raises(DataError, match=r"data\.root is not set"):
        cifar.load_cifar10(DataConfig(name="cifar10"), True)


# ---------------------------------------------------------------- downloads


def test_a_download_comes_into_place_whole_and_is_made_once(tmp_path, monkeypatch):
    source = tmp_path / "source"
    archive = cifar_archive(source)
    seen = []

    def download(url: str, root: Path, filename: str, md5: str) -> None:
        seen.append((url, md5))
        assert filename != archive.filename  # a reader must not see half a file
        (Path(root) / filename).write_bytes((source / archive.filename).read_bytes())

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    config = DataConfig(name="cifar10", root=str(tmp_path / "new"), download=True)
    for _ in range(2):
        assert len(cifar.load_archive(archive, config, True).train_labels) == 50
    assert seen == [(archive.url, archive.md5)]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [archive.filename]


@pytest.mark.parametrize("problem", [URLError("no route"), RuntimeError("File not found or corrupted.")])
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "fashion_mnist"])
def test_a_failed_download_says_which_file_to_copy_where(tmp_path, monkeypatch, problem, name):
    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr("torchvision.datasets.utils.download_url", fail)
    with pytest.raises(DataError, match=r"cannot download http.*copy .* into that folder"):
        find_dataset(name)(DataConfig(name=name, root=str(tmp_path), download=True), True)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


# ---------------------------------------------------------------- SVHN


def test_svhn_without_scipy_says_how_to_get_it(tmp_path, monkeypatch):
    for name in svhn.FILES:
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(EnvironmentFault, match="pip install scipy") as caught:
        svhn.load_svhn(DataConfig(name="svhn", root=str(tmp_path)), True)
    assert caught.value.code == 6


def test_svhn_maps_label_ten_to_the_digit_zero(tmp_path, monkeypatch):
    io_module = pytest.importorskip("scipy.io", reason="scipy is not installed")
    images, labels = random_images(20, 32, 32, 3), np.arange(20) % 10 + 1
    for name in svhn.FILES:
        io_module.savemat(tmp_path / name, {"X": images.transpose(1, 2, 3, 0), "y": labels[:, None].astype(np.uint8)},
                          do_compression=True)
    known = [("", name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest()) for name in svhn.FILES]
    monkeypatch.setattr(svhn, "_sources", lambda: known)
    raw = svhn.load_svhn(DataConfig(name="svhn", root=str(tmp_path)), True)
    assert np.array_equal(raw.train_images, images.transpose(0, 3, 1, 2))
    assert raw.test_labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0] * 2
    (tmp_path / svhn.FILES[1]).write_bytes((tmp_path / svhn.FILES[1]).read_bytes()[:500])
    with pytest.raises(DataError, match=rf"not the published {svhn.FILES[1]}.*is not opened"):
        svhn.load_svhn(DataConfig(name="svhn", root=str(tmp_path)), True)
    for name in svhn.FILES:
        (tmp_path / name).write_bytes(b"no MATLAB file")
    known[:] = [("", name, hashlib.md5(b"no MATLAB file").hexdigest()) for name in svhn.FILES]
    with pytest.raises(DataError, match=f"cannot read the file.*{svhn.FILES[0]}"):
        svhn.load_svhn(DataConfig(name="svhn", root=str(tmp_path)), True)


def test_svhn_without_files_names_them(tmp_path):
    with pytest.raises(DataError, match=r"train_32x32.mat or test_32x32.mat not found"):
        svhn.load_svhn(DataConfig(name="svhn", root=str(tmp_path)), True)


# ---------------------------------------------------------------- registry


def test_a_plugin_registers_its_own_data_set_and_passes_the_same_checks(monkeypatch):
    monkeypatch.setattr("mat_dist.data.registry._LOADERS", dict(_LOADERS))
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
