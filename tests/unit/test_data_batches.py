"""Batches as a function of (seed, step), and image sets."""

from __future__ import annotations

import pytest
import torch

from mat_dist import rng
from mat_dist.config.schema import AugmentConfig
from mat_dist.data import Batches, ImageSet, as_float, steps_per_epoch
from tests.unit.data_files import random_images

AUGMENT = AugmentConfig(pad=1, flip=True, random_resized_crop=0.5)


def image_set(count: int = 37) -> ImageSet:
    return ImageSet(torch.from_numpy(random_images(count, 3, 8, 8)), torch.arange(count) % 5)


def test_an_epoch_shows_each_image_once_in_the_keyed_order_and_drops_the_rest():
    train = image_set()
    batches = Batches(train, seed=3, batch_size=8, augment=AugmentConfig())
    assert batches.steps_per_epoch == steps_per_epoch(37, 8) == 4
    for epoch in (0, 1):
        order = rng.permutation(rng.key(3, "order", epoch), 37)
        seen = torch.cat([batches.indices(4 * epoch + step) for step in range(4)])
        assert torch.equal(seen, order[:32])
        assert len(seen.unique()) == 32


def test_batches_hold_the_images_divided_by_255_and_their_labels():
    train = image_set()
    batches = Batches(train, seed=0, batch_size=8, augment=AugmentConfig())
    x, y = batches.at(6)
    chosen = batches.indices(6)
    assert torch.equal(x, train.store[chosen].float() / 255)
    assert torch.equal(y, train.labels[chosen])
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64


def test_steps_can_be_asked_in_any_order():
    batches = Batches(image_set(), seed=0, batch_size=8, augment=AUGMENT)
    forward = [batches.at(step) for step in range(12)]
    for step in (11, 0, 5, 4, 7):
        assert all(torch.equal(a, b) for a, b in zip(batches.at(step), forward[step], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replicas_see_bitwise_the_rows_of_the_whole_batch(dtype):
    train = image_set()
    whole = Batches(train, seed=1, batch_size=12, augment=AUGMENT, dtype=dtype)
    shards = [Batches(train, seed=1, batch_size=12, augment=AUGMENT, dtype=dtype, rows=slice(first, first + 4))
              for first in (0, 4, 8)]
    for step in (0, 2, 5):
        x, y = whole.at(step)
        parts = [shard.at(step) for shard in shards]
        assert torch.equal(x, torch.cat([part[0] for part in parts]))
        assert torch.equal(y, torch.cat([part[1] for part in parts]))
        assert x.dtype == dtype


@pytest.mark.parametrize("rows", [slice(0, 16), slice(4, 4), slice(0, 8, 2)])
def test_rows_outside_the_batch_are_our_bug(rows):
    with pytest.raises(ValueError, match="rows"):
        Batches(image_set(), seed=0, batch_size=8, augment=AugmentConfig(), rows=rows)


def test_a_subset_shares_storage_and_behaves_like_a_copy():
    whole = image_set()
    rows = torch.tensor([30, 2, 2, 11])
    subset = whole.select(rows).select(torch.tensor([3, 0]))
    assert subset.store is whole.store
    assert len(subset) == 2
    assert subset.shape == (3, 8, 8)
    assert subset.nbytes == 2 * 192
    assert torch.equal(subset.images, whole.store[[11, 30]])
    x, y = subset.batch(torch.tensor([1]))
    assert torch.equal(x, whole.store[[30]])
    assert y.tolist() == [0]


def test_to_the_same_device_is_the_set_itself():
    train = image_set()
    assert train.to("cpu") is train
    moved = train.select(torch.tensor([4, 5])).to("meta")
    assert moved.store.shape == (2, 3, 8, 8)  # only the subset is moved


def test_float_images_are_not_scaled_again():
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(as_float(x), x)
    assert torch.equal(as_float(torch.tensor([0, 51, 255], dtype=torch.uint8)), torch.tensor([0.0, 0.2, 1.0]))
