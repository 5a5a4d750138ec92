"""From settings to splits on a device; channel statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mat_dist.config.schema import AugmentConfig, DataConfig
from mat_dist.data import Batches, DataSets, ImageSet, RawData, channel_stats, load_data, place
from mat_dist.data import images as images_module
from mat_dist.data.images import _LOADERS
from mat_dist.data.load import data_digest
from mat_dist.errors import ConfigError, DataError
from tests.unit.data_files import random_images


def raw(**changes) -> RawData:
    """12 + 4 images of 4x4 pixels in 2 classes, with `changes`."""
    fields = {"train_images": torch.from_numpy(random_images(12, 1, 4, 4)), "train_labels": torch.arange(12) % 2,
              "test_images": torch.from_numpy(random_images(4, 1, 4, 4, seed=1)), "test_labels": torch.arange(4) % 2,
              "classes": ("a", "b")}
    return RawData(**(fields | changes))


def test_the_digest_changes_with_everything_that_is_in_the_data():
    moved = torch.from_numpy(random_images(12, 1, 4, 4)).clone()
    moved[3, 0, 2, 1] ^= 1
    digests = [data_digest("x", raw()), data_digest("y", raw()), data_digest("x", raw(classes=("a", "c"))),
               data_digest("x", raw(classes=("ab", ""))), data_digest("x", raw(train_images=moved)),
               data_digest("x", raw(test_labels=torch.tensor([0, 1, 1, 1]))),
               data_digest("x", raw(train_images=raw().train_images.reshape(12, 1, 2, 8)))]
    assert len(set(digests)) == len(digests)
    assert data_digest("x", raw()) == digests[0]
    assert len(digests[0]) == 64


def test_sizes_are_those_asked_for_and_a_shorter_set_does_not_change_validation_or_test():
    whole = load_data(DataConfig(), seed=3, batch_size=8)
    few = load_data(DataConfig(train_size=100, test_size=50), seed=3, batch_size=8)
    assert (len(few.train), len(few.val), len(few.test)) == (100, 287, 50)
    assert torch.equal(whole.val.images, few.val.images)
    assert torch.bincount(few.train.labels).tolist() == [10] * 10
    other_seed = load_data(DataConfig(test_size=50), seed=4, batch_size=8)
    assert torch.equal(few.test.images, other_seed.test.images)
    assert len(load_data(DataConfig(val_size=60), seed=3, batch_size=8).val) == 60


def test_no_image_is_in_two_splits():
    data = load_data(DataConfig(), seed=0, batch_size=8)
    rows = torch.cat([data.train.rows, data.val.rows])
    assert len(rows.unique()) == len(rows) == 1437
    assert data.train.store is data.val.store  # splitting copies nothing


@pytest.mark.parametrize("settings", [{"image_size": 16}, {"residency": "mmap"}])
def test_settings_that_a_data_set_would_ignore_are_refused(settings):
    with pytest.raises(ConfigError, match=r"only data\.name=folder"):
        load_data(DataConfig(**settings), seed=0, batch_size=8)


def test_a_path_that_may_not_be_entered_is_an_error_of_the_data(monkeypatch):
    def refuse(*_: object) -> RawData:
        raise PermissionError(13, "Permission denied", "/data/secret")

    monkeypatch.setitem(_LOADERS, "refused", refuse)
    with pytest.raises(DataError, match=r"cannot read the data: Permission denied \(/data/secret\)"):
        load_data(DataConfig(name="refused"), seed=0, batch_size=8)


# ---------------------------------------------------------------- place


class FakeCuda:
    """Counts moves instead of making them."""

    def __init__(self, monkeypatch, free: int) -> None:
        self.moved = 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
        monkeypatch.setattr(ImageSet, "to", self.to)

    def to(self, device: torch.device) -> str:
        assert device.type == "cuda"
        self.moved += 1
        return "moved"


def small() -> DataSets:
    part = ImageSet(torch.zeros(100, 1, 10, 10, dtype=torch.uint8), torch.zeros(100, dtype=torch.int64))
    return DataSets(part, part, part, ("a", "b"), "0" * 64, ())  # 30 000 bytes


@pytest.mark.parametrize("residency", ["auto", "device", "host", "mmap"])
def test_on_the_cpu_nothing_is_moved(residency):
    data = small()
    assert place(data, residency, "cpu") is data


@pytest.mark.parametrize(("residency", "free", "sharing", "moves"), [
    ("auto", 120_001, 1, 3), ("auto", 120_000, 1, 0), ("auto", 240_001, 2, 3), ("auto", 240_000, 2, 0),
    ("device", 30_001, 1, 3), ("host", 10**12, 1, 0), ("mmap", 10**12, 1, 0)])
def test_images_move_to_a_gpu_when_they_fill_under_a_quarter_of_it(monkeypatch, residency, free, sharing, moves):
    cuda = FakeCuda(monkeypatch, free)
    place(small(), residency, "cuda", sharing=sharing)
    assert cuda.moved == moves


def test_images_that_do_not_fit_on_the_device_are_refused(monkeypatch):
    FakeCuda(monkeypatch, 30_000)
    with pytest.raises(DataError, match=r"device memory.*set data\.residency=host"):
        place(small(), "device", "cuda")


@pytest.mark.gpu
def test_batches_of_a_set_on_the_gpu_equal_those_of_a_set_on_the_host():
    data = load_data(DataConfig(), seed=0, batch_size=32)
    moved = place(data, "device", "cuda")
    augment = AugmentConfig(pad=1, flip=True)
    reference = Batches(data.train, seed=0, batch_size=32, augment=augment)
    for train in (data.train, moved.train):
        batches = Batches(train, seed=0, batch_size=32, augment=augment, device="cuda")
        for step in (0, 1, 40):
            for here, there in zip(batches.at(step), reference.at(step), strict=True):
                assert torch.equal(here.cpu(), there)


# ---------------------------------------------------------------- statistics


def test_channel_statistics_equal_float64_mean_and_deviation():
    images = random_images(700, 3, 5, 6)  # more than one chunk
    train = ImageSet(torch.from_numpy(images), torch.zeros(700, dtype=torch.int64)).select(torch.arange(3, 690))
    mean, std = channel_stats(train)
    values = images[3:690].astype(np.float64) / 255
    assert np.allclose(mean, values.mean((0, 2, 3)), rtol=1e-12)
    assert np.allclose(std, values.std((0, 2, 3)), rtol=1e-12)


def test_channel_statistics_of_float_images_agree_to_1e_5():
    images = np.random.default_rng(0).random((50, 2, 6, 6), dtype=np.float32)
    mean, std = channel_stats(ImageSet(torch.from_numpy(images), torch.zeros(50, dtype=torch.int64)))
    assert np.allclose(mean, images.mean((0, 2, 3)), atol=1e-5)
    assert np.allclose(std, images.std((0, 2, 3)), atol=1e-5)


def test_channel_statistics_do_not_depend_on_the_order_of_images():
    images = torch.from_numpy(random_images(600, 1, 5, 5))
    labels = torch.zeros(600, dtype=torch.int64)
    assert channel_stats(ImageSet(images, labels)) == channel_stats(ImageSet(images.flip(0), labels))


def test_a_constant_channel_has_a_deviation_that_can_be_divided_by():
    grey = ImageSet(torch.full((4, 1, 3, 3), 7, dtype=torch.uint8), torch.zeros(4))
    assert channel_stats(grey) == ((7 / 255,), (1 / 255,))


def test_large_mapped_sets_use_a_keyed_sample_and_a_note_says_so(monkeypatch):
    monkeypatch.setattr(images_module, "MAPPED_IMAGES", 40)
    images = torch.from_numpy(random_images(200, 1, 4, 4))
    loaded, mapped = (ImageSet(images, torch.arange(200) % 2, mapped=flag) for flag in (False, True))
    assert images_module.sampled_rows(loaded) == 200
    assert images_module.sampled_rows(mapped) == 40
    assert channel_stats(mapped) == channel_stats(mapped) != channel_stats(loaded)
    mapped_raw = raw(train_images=images, train_labels=torch.arange(200) % 2, mapped=True)
    monkeypatch.setitem(_LOADERS, "mapped", lambda *_: mapped_raw)
    data = load_data(DataConfig(name="mapped"), seed=0, batch_size=8)
    assert data.notes == ("channel means and deviations are those of 40 of 160 training images",)
