"""Generated images from a mapped file; the plug-in for poisoned ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mat_dist import rng
from mat_dist.config import load_config
from mat_dist.config.plugins import load_plugins
from mat_dist.config.schema import AugmentConfig, DataConfig
from mat_dist.data import Batches, ImageSet, load_data, place, steps_per_epoch
from mat_dist.data.arrays import generated_images
from mat_dist.distributed.launch import Launch
from mat_dist.errors import DataError
from mat_dist.tools.check.models import check_data
from mat_dist.tools.dryrun import describe_run
from tests.documents import POISONED
from tests.small_runs import SMALL, run_small
from tests.unit.data_files import random_images

COUNT = 50


def write(path: Path, count: int = COUNT, side: int = 8, **other: Any) -> str:
    """`image` (count, side, side, 1) and `label` 0..9, or other arrays."""
    arrays = {"image": random_images(count, side, side, 1, seed=5), "label": np.arange(count) % 10, **other}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


def load(**settings: Any) -> Any:
    return load_data(DataConfig(**settings), seed=0, batch_size=20)


def image_set(count: int, first: int) -> ImageSet:
    """Images whose pixels and labels are their number plus `first`."""
    number = torch.arange(first, first + count)
    return ImageSet(number.to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous(), number)


def mixed(rows: slice | None = None, share: float = 0.7) -> Batches:
    return Batches(image_set(31, 0), seed=2, batch_size=20, augment=AugmentConfig(pad=1), rows=rows,
                   generated=image_set(60, 100), share=share)


def test_a_mapped_archive_is_what_numpy_reads(tmp_path):
    name = write(tmp_path / "a.npz")
    images, digest = generated_images(name, (1, 8, 8), 10)
    with np.load(name) as stored:
        assert np.array_equal(images.store.numpy(), stored["image"].transpose(0, 3, 1, 2))
        assert np.array_equal(images.labels, stored["label"])
    assert images.mapped and images.file is not None and len(digest) == 64


def test_each_batch_has_its_share_of_generated_images_and_an_epoch_shows_each_real_image_once():
    batches = mixed()
    assert batches.real == 6
    assert batches.steps_per_epoch == steps_per_epoch(31, 20, 0.7) == 5
    labels = torch.stack([batches.at(step)[1] for step in range(10)])
    for number, epoch in enumerate(labels.split(5)):
        assert torch.equal(epoch[epoch < 100], rng.permutation(rng.key(2, "order", number), 31)[:30])
    assert ((labels >= 100).sum(1) == 14).all()
    assert len(labels[labels >= 100].unique()) > 50  # of 60, in 140 draws
    assert torch.equal(labels[0] < 100, labels[7] < 100)  # the same places in each batch


def test_generated_images_keep_their_labels():
    batches = Batches(image_set(31, 0), seed=2, batch_size=20, augment=AugmentConfig(), generated=image_set(60, 100),
                      share=0.3)
    x, y = batches.at(3)
    assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), y)
    assert y.dtype == torch.int64


def test_replicas_see_bitwise_the_rows_of_the_whole_batch_with_equal_shares():
    whole, parts = mixed(), [mixed(slice(first, first + 10)) for first in (0, 10)]
    for step in (0, 3, 7):
        x, y = whole.at(step)
        shards = [part.at(step) for part in parts]
        assert torch.equal(x, torch.cat([shard[0] for shard in shards]))
        assert torch.equal(y, torch.cat([shard[1] for shard in shards]))
        assert all(int((shard[1] >= 100).sum()) == 7 for shard in shards)


def test_a_set_with_generated_images_has_another_digest_and_the_same_splits(tmp_path):
    plain = load()
    data = load(generated=write(tmp_path / "a.npz"), generated_share=0.5)
    other = load(generated=write(tmp_path / "b.npz", label=np.arange(COUNT) % 9), generated_share=0.5)
    assert len({plain.digest, data.digest, other.digest}) == 3
    assert torch.equal(data.train.images, plain.train.images)
    assert torch.equal(data.test.images, plain.test.images)
    assert len(data.generated) == COUNT and data.generated.mapped
    assert "50% of each batch are drawn from the 50 generated images" in data.notes[-1]
    assert place(data, "auto", "cpu").generated is data.generated


def poisoned(path: Path, images: np.ndarray) -> DataConfig:
    np.savez(path, image=images)
    return DataConfig(name="poisoned", root=str(path), val_size=100)


def test_the_plugin_replaces_the_training_images_and_no_others(tmp_path):
    load_plugins([POISONED])
    plain, images = load(val_size=100), random_images(1437, 8, 8, 1, seed=9)
    data = load_data(poisoned(tmp_path / "a.npz", images), seed=0, batch_size=20)
    for split in ("train", "val"):
        rows = getattr(plain, split).rows
        assert torch.equal(getattr(data, split).images, torch.from_numpy(images.transpose(0, 3, 1, 2))[rows])
        assert torch.equal(getattr(data, split).labels, getattr(plain, split).labels)
    assert torch.equal(data.test.images, plain.test.images)
    assert data.digest != plain.digest
    with pytest.raises(DataError, match=r"\(50, 1, 8, 8\), the training images \(1437, 1, 8, 8\)"):
        load_data(poisoned(tmp_path / "b.npz", images[:50]), seed=0, batch_size=20)


@pytest.mark.parametrize(("change", "told"), [
    ({"side": 6}, "generated images are (C, H, W) = (1, 6, 6), the training images (1, 8, 8)"),
    ({"label": np.arange(COUNT) % 11}, "label 10 of image 10 is out of range"),
    ({"label": np.arange(COUNT - 1) % 10}, "50 images but 49 labels"),
    ({"label": np.arange(COUNT) / 50}, "label 0.02 of image 1 is no whole number"),
    ({"label": None}, "no array label"),
    ({"image": None}, "no array image, found label"),
    ({"image": np.zeros((COUNT, 8, 8, 1), np.float32)}, "images are float32"),
    ({"image": np.asfortranarray(random_images(COUNT, 8, 8, 1))}, "column by column"),
])
def test_generated_images_that_do_not_fit_are_one_clear_error(change, told, tmp_path):
    with pytest.raises(DataError) as caught:
        load(generated=write(tmp_path / "a.npz", **change), generated_share=0.5)
    assert told in str(caught.value) and "data.generated=" in str(caught.value) and "\n" not in str(caught.value)


def test_a_compressed_missing_or_damaged_file_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, image=random_images(COUNT, 8, 8, 1), label=np.arange(COUNT) % 10)
    with pytest.raises(DataError, match=r"compressed.*zip -0"):
        load(generated=str(path), generated_share=0.5)
    write(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot read the file"):
        load(generated=str(path), generated_share=0.5)
    with pytest.raises(DataError, match="does not exist"):
        load(generated=str(tmp_path / "none.npz"), generated_share=0.5)


def test_a_file_that_changes_under_the_run_stops_it(tmp_path):
    path = tmp_path / "a.npz"
    data = load(generated=write(path), generated_share=0.5)
    path.open("ab").write(b"more")
    with pytest.raises(DataError, match="has changed"):
        data.generated.batch(torch.tensor([0]))


def test_preflight_and_dry_run_know_generated_images(tmp_path):
    name = write(tmp_path / "a.npz")
    config = load_config(None, [*SMALL, f"data.generated={name}", "data.generated_share=0.5"])
    found = check_data(config).found
    assert "50 generated images" in found and "; 8 steps" in found
    told = describe_run(config, Launch(0, 1), torch.device("cpu"))
    assert f"50% of a batch from {name}" in told and "schedule: 8 steps, 8 per epoch" in told


def test_runs_on_generated_images_train_and_resume_only_on_the_same(tmp_path, capsys):
    path = tmp_path / "a.npz"
    generated = (f"data.generated={write(path)}", "data.generated_share=0.5")
    assert run_small(tmp_path, "a", "train.max_steps=2", *generated).steps() == [2]
    write(path, label=np.zeros(COUNT, int))
    assert run_small(tmp_path, "a", "train.max_steps=3", *generated).code == 4
    assert "not those that the run was trained on" in capsys.readouterr().err


def test_a_run_on_poisoned_images_is_tested_on_clean_ones(tmp_path):
    config = poisoned(tmp_path / "b.npz", random_images(1437, 8, 8, 1))
    done = run_small(tmp_path, "b", f"--plugin={POISONED}", "data.name=poisoned", f"data.root={config.root}",
                     "eval.every=1", "eval.test_steps=1", "eval.size=20")
    assert done.code == 0 and done.result("test_last_step_00000004")
