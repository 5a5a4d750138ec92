"""A user's own arrays: layouts, ranges, hostile files; and the checks that every data set passes."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mat_dist.config.schema import DataConfig
from mat_dist.data import RawData, load_data
from mat_dist.data.arrays import channels_first, load_npz
from mat_dist.data.load import check_raw
from mat_dist.errors import DataError
from tests.unit.data_files import random_images


def arrays(**changes) -> dict[str, np.ndarray]:
    """A good set of 40 + 10 images of 6x7 pixels in 5 classes, with `changes`."""
    return {"x_train": random_images(40, 6, 7), "y_train": np.arange(40) % 5,
            "x_test": random_images(10, 6, 7, seed=1), "y_test": np.arange(10) % 5, **changes}


def load(path: Path, **changes) -> RawData:
    np.savez_compressed(path / "set.npz", **arrays(**changes))
    return check_raw(load_npz(DataConfig(name="npz", root=str(path / "set.npz"))), "here")


def test_arrays_come_back_as_they_were_stored(tmp_path):
    raw = load(tmp_path)
    assert np.array_equal(raw.train_images.numpy(), arrays()["x_train"][:, None])
    assert raw.train_labels.tolist() == (np.arange(40) % 5).tolist()
    assert raw.train_labels.dtype == torch.int64
    assert raw.classes == ("0", "1", "2", "3", "4")


def test_class_names_are_read(tmp_path):
    assert load(tmp_path, classes=np.array(list("abcde"))).classes == tuple("abcde")


@pytest.mark.parametrize(("shape", "result"), [((5, 8, 9), (5, 1, 8, 9)), ((5, 8, 9, 3), (5, 3, 8, 9)),
                                               ((5, 3, 8, 9), (5, 3, 8, 9)), ((5, 1, 8, 8), (5, 1, 8, 8))])
def test_layouts_become_channels_first(shape, result):
    images = random_images(*shape)
    moved = channels_first(images, "here")
    assert moved.shape == result
    if shape[-1] == 3:
        assert np.array_equal(moved[2, 1], images[2, :, :, 1])


@pytest.mark.parametrize("shape", [(5, 64), (5, 3, 8, 3), (5, 8, 8, 8), (5, 1, 3, 8, 8)])
def test_ambiguous_layouts_are_refused_with_their_shape(shape):
    with pytest.raises(DataError, match="images have shape"):
        channels_first(random_images(*shape), "here")


@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]))
def test_floats_made_from_bytes_become_the_same_bytes(seed, dtype):
    images = random_images(6, 1, 4, 4, seed=seed)
    labels = np.arange(6) % 2
    noise = np.random.default_rng(seed).uniform(-5e-7, 5e-7, images.shape)
    raw = check_raw(RawData((images / 255 + noise).astype(dtype), labels, images / 255, labels, ("a", "b")), "here")
    assert raw.train_images.dtype == torch.uint8
    assert np.array_equal(raw.train_images.numpy(), images)
    assert raw.notes == ()


def test_other_floats_stay_float32_in_both_splits_with_a_note(tmp_path):
    x_train = np.random.default_rng(0).random((40, 6, 7))
    raw = load(tmp_path, x_train=x_train)
    assert raw.train_images.dtype == raw.test_images.dtype == torch.float32
    assert np.array_equal(raw.train_images.numpy()[:, 0], x_train.astype(np.float32))
    assert np.array_equal(raw.test_images.numpy()[:, 0], arrays()["x_test"].astype(np.float32) / 255)
    assert any("float32" in note for note in raw.notes)


def test_rounding_outside_the_unit_interval_is_clamped_up_to_1e_4(tmp_path):
    x_train = np.random.default_rng(0).random((40, 6, 7))
    x_train[3, 0, 0], x_train[4, 0, 0] = -9e-5, 1 + 9e-5
    raw = load(tmp_path, x_train=x_train)
    assert float(raw.train_images.min()) == 0
    assert float(raw.train_images.max()) == 1


@pytest.mark.parametrize("value", [-2e-4, 1 + 2e-4, 255.0, -1.0])
def test_normalised_or_unscaled_images_are_told_where_normalisation_belongs(tmp_path, value):
    x_train = np.random.default_rng(0).random((40, 6, 7))
    x_train[17, 2, 2] = value
    with pytest.raises(DataError, match=r"images outside \[0, 1\]: found .*, first in image 17 \(here, train images\): "
                                        "normalisation is a layer of the model, give images in"):
        load(tmp_path, x_train=x_train)


@pytest.mark.parametrize(("changes", "message"), [
    ({"x_train": np.full((40, 6, 7), np.nan)}, "image 0 has NaN or infinite pixels"),
    ({"x_test": np.full((10, 6, 7), np.inf)}, r"NaN or infinite pixels \(here, test images\)"),
    ({"x_train": random_images(40, 6, 7).astype(np.int64)}, "images are int64"),
    ({"x_test": random_images(10, 6, 8)}, r"train images are \(1, 6, 7\), test images \(1, 6, 8\)"),
    ({"x_train": np.zeros((0, 6, 7), np.uint8)}, "there are no images"),
    ({"y_train": np.arange(39) % 5}, "40 images but 39 labels"),
    ({"y_train": np.eye(5)[np.arange(40) % 5]}, "labels are float64"),
    ({"y_train": np.eye(5, dtype=int)[np.arange(40) % 5]}, r"labels are int64 of shape \(40, 5\).*argmax"),
    ({"y_train": np.r_[0, 1.5, np.arange(38) % 5]}, "label 1.5 of image 1 is no whole number"),
    ({"y_test": np.r_[0, 1, np.full(8, np.nan)]}, r"label nan of image 2 is no whole number \(here, test labels"),
    ({"y_train": np.full(40, 1e300)}, "is no whole number"),
    ({"y_train": np.array(list("ab") * 20)}, "labels are <U1"),
    ({"y_train": np.arange(40) % 5 - 1}, "label -1 of image 0 is out of range"),
    ({"y_test": np.arange(10)}, r"label 5 of image 5 is out of range \(here, test labels\): labels count from 0 to 4"),
    ({"y_train": np.arange(40) % 4 * 2}, "3 of 7 classes have no training image, the first is '1'"),
    ({"y_train": np.full(40, 10**15)}, "label 1000000000000000 among 40 labels"),
    ({"classes": np.array(["a", "b"])}, "label 2 of image 2 is out of range"),
    ({"classes": np.array(["a"] * 5)}, "5 classes, 1 different ones"),
    ({"classes": np.array(list("abcdef"))}, "1 of 6 classes have no training image, the first is 'f'"),
    ({"y_train": np.zeros(40, int), "y_test": np.zeros(10, int)}, "1 classes"),
])
def test_bad_arrays_are_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, **changes)
    assert caught.value.code == 3


@pytest.mark.parametrize(("change", "done"), [
    (lambda y: y[:, None], "labels of shape (40, 1) were taken as a row"),
    (lambda y: y[None], "labels of shape (1, 40) were taken as a row"),
    (lambda y: y.astype(np.float16), "labels are whole numbers in float16"),
    (lambda y: y[None] * 1.0, "labels of shape (1, 40) were taken as a row; labels are whole numbers in float64")])
@pytest.mark.filterwarnings("error")
def test_labels_whose_meaning_is_plain_are_taken_with_a_note(tmp_path, change, done):
    raw = load(tmp_path, y_train=change(np.arange(40) % 5))
    assert raw.train_labels.tolist() == [number % 5 for number in range(40)]
    assert raw.train_labels.dtype == torch.int64
    assert raw.notes == (f"train: {done}",)


def test_arrays_that_are_not_read_are_named(tmp_path):
    raw = load(tmp_path, x_val=np.zeros(3), y_val=np.zeros(3), weights=np.zeros(2), classes=np.array(list("abcde")))
    assert raw.notes == ("arrays that are not read: weights, x_val, y_val; validation images are taken from x_train",)


@pytest.mark.parametrize(("content", "message"), [
    (None, "the file does not exist"), (b"", "File is not a zip file"), (b"PK\x03\x04" + bytes(50), "not a zip file")])
def test_a_file_that_is_no_archive_is_named(tmp_path, content, message):
    path = tmp_path / "set.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_npz(DataConfig(name="npz", root=str(path)))
    assert str(path) in caught.value.where


def test_a_folder_or_no_root_is_named(tmp_path):
    with pytest.raises(DataError, match="not a file"):
        load_npz(DataConfig(name="npz", root=str(tmp_path)))
    with pytest.raises(DataError, match=r"data\.root is not set"):
        load_npz(DataConfig(name="npz"))


def test_missing_arrays_are_listed(tmp_path):
    np.savez(tmp_path / "set.npz", x=np.zeros(3), y_train=np.zeros(3))
    with pytest.raises(DataError, match="no array x_train, found x, y_train"):
        load_npz(DataConfig(name="npz", root=str(tmp_path / "set.npz")))


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_objects_are_refused_and_nothing_runs(tmp_path):
    witness = tmp_path / "witness"
    with pytest.raises(DataError, match="object"):
        load(tmp_path, x_train=np.array([Touch(str(witness))] * 40, dtype=object))
    assert not witness.exists()


def write_members(path: Path, **members: bytes) -> None:
    """An .npz with these members in place of, or besides, the good ones."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays().items():
            if name not in members:
                buffer = io.BytesIO()
                np.save(buffer, array)
                archive.writestr(f"{name}.npy", buffer.getvalue())
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def test_two_members_of_one_name_are_refused(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, **arrays())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x_train", b"numpy would read this one")
    with pytest.raises(DataError, match="two members of one name"):
        load_npz(DataConfig(name="npz", root=str(path)))


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize(("content", "message"), [
    (header((2000, 100, 100)) + bytes(20_000_000), r"20000000 bytes are compressed \d+ to 1"),  # 20 KB on disk
    (header((10**6, 10**6)) + bytes(100), "the header says 1000000000000 bytes, the archive 100"),
    (header((2**40, 2**40)) + bytes(100), "the header says 1208925819614629174706176 bytes"),
    (header((40, 6, 7))[:60], "cannot read the file|header"),
    (header((40, 6, 7)).replace(b")", b"(") + bytes(1680), "cannot read the file"),
    (b"no array at all", "cannot read the file"),
    (header((40, 6, 7), "|O") + bytes(1680), "an array of object"),
])
def test_hostile_archives_are_refused_before_anything_is_allocated(tmp_path, content, message):
    path = tmp_path / "set.npz"
    write_members(path, x_train=content)
    del content
    tracemalloc.start()
    with pytest.raises(DataError, match=message):
        load_npz(DataConfig(name="npz", root=str(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_random_damage_is_an_error_of_the_data_or_harmless(tmp_path):
    path, random = tmp_path / "set.npz", np.random.default_rng(0)
    np.savez_compressed(path, **arrays())
    whole = path.read_bytes()
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged[: random.integers(len(whole)) if random.random() < 0.1 else None])
        try:
            check_raw(load_npz(DataConfig(name="npz", root=str(path))), "here")
        except DataError:
            refused += 1
    assert refused > 200


def test_arrays_beyond_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mat_dist.data.images.available_bytes", lambda: 1000)
    with pytest.raises(DataError, match="GiB are free"):
        load(tmp_path)


def test_a_set_too_small_for_a_batch_is_refused(tmp_path):
    np.savez(tmp_path / "set.npz", **arrays())
    config = DataConfig(name="npz", root=str(tmp_path / "set.npz"))
    assert len(load_data(config, seed=0, batch_size=32).train) == 32  # a fifth is held out
    with pytest.raises(DataError, match="32 training images do not fill one batch of 33"):
        load_data(config, seed=0, batch_size=33)
