"""Images on disk: layout, decoding, bad files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from mat_dist.config.schema import DataConfig
from mat_dist.data import folder as module
from mat_dist.data.decode import read_image
from mat_dist.data.folder import load_folder
from mat_dist.data.images import RawData
from mat_dist.data.listing import list_images
from mat_dist.errors import DataError
from tests.unit.data_files import random_images, write_folder


def load(root: Path, **settings) -> RawData:
    return load_folder(DataConfig(name="folder", root=str(root), **settings), True)


def test_images_and_labels_are_those_of_the_files_in_class_order(tmp_path):
    written = write_folder(tmp_path)
    raw = load(tmp_path)
    assert raw.classes == ("cat", "dog")
    assert raw.train_labels.tolist() == [0] * 12 + [1] * 12
    names = [name for name in sorted(written) if name.startswith("train/")]
    assert np.array_equal(raw.train_images, np.stack([written[name].transpose(2, 0, 1) for name in names]))
    assert raw.test_images.shape == (8, 3, 8, 8)


@pytest.mark.parametrize("held_out", ["val", "valid"])
def test_val_serves_as_test_where_there_is_no_test_and_a_note_says_so(tmp_path, held_out):
    write_folder(tmp_path, held_out=held_out)
    raw = load(tmp_path)
    assert len(raw.test_labels) == 8
    assert any(f"test images come from {held_out}/" in note for note in raw.notes)


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (24, 24), (9, 100)])
@pytest.mark.parametrize("extension", ["png", "jpg", "bmp", "webp"])
def test_resizing_equals_torchvision_resize_and_centre_crop(tmp_path, size, extension):
    path = tmp_path / f"image.{extension}"
    smooth = random_images(1, 6, 5, 3)[0]
    Image.fromarray(smooth).resize(size, Image.Resampling.BICUBIC).save(path)
    reference = transforms.Compose([transforms.Resize(16), transforms.CenterCrop(16)])
    with Image.open(path) as image:
        expected = np.asarray(reference(image.convert("RGB")))
    assert np.array_equal(read_image(path, 16), expected)


def test_images_of_the_right_size_are_left_untouched(tmp_path):
    image = random_images(1, 16, 16, 3)[0]
    Image.fromarray(image).save(tmp_path / "image.png")
    assert np.array_equal(read_image(tmp_path / "image.png", 16), image)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK"])
def test_other_pixel_types_become_rgb(tmp_path, mode):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.fromarray(random_images(1, 8, 8, 3)[0]).convert(mode).save(path)
    assert read_image(path, None).shape == (8, 8, 3)


@pytest.mark.parametrize(("change", "message"), [
    (lambda root: None, "the folder does not exist"),
    (lambda root: root.write_text("x"), "the folder is a file"),
    (lambda root: root.mkdir(), "no folder train, found nothing"),
    (lambda root: (root / "train/cat").mkdir(parents=True), "no folder test"),
    (lambda root: [(root / name).mkdir(parents=True) for name in ("train", "test")], "0 class folders"),
    (lambda root: [(root / name).mkdir(parents=True) for name in ("train/a", "train/b", "test/a")],
     "class 'a' has no image"),
])
def test_a_wrong_layout_says_what_was_found_and_what_is_expected(tmp_path, change, message):
    root = tmp_path / "set"
    change(root)
    with pytest.raises(DataError, match=message) as caught:
        load(root)
    assert caught.value.code == 3
    assert str(root) in caught.value.where


def test_a_root_that_is_not_set_is_named():
    with pytest.raises(DataError, match=r"data\.root is not set"):
        load_folder(DataConfig(name="folder"), True)


def test_a_test_class_that_is_not_trained_is_refused(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "test/cow").mkdir()
    with pytest.raises(DataError, match="class 'cow' is not in train/"):
        load(tmp_path)


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    write_folder(tmp_path)
    real = os.scandir

    def refuse(path):
        if str(path).endswith("train"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(module.os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot list the folder: Permission denied \(.*train\)"):
        load(tmp_path)


def test_files_that_are_no_images_are_ignored_with_a_note(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train/cat/readme.txt").write_text("cats")
    (tmp_path / "train/.hidden").mkdir()
    raw = load(tmp_path)
    assert len(raw.train_labels) == 24
    assert "train/: 1 files are no images and were not read: 1 .txt" in raw.notes


def test_images_of_several_sizes_need_image_size(tmp_path):
    write_folder(tmp_path)
    Image.fromarray(random_images(1, 20, 10, 3)[0]).save(tmp_path / "train/dog/0003.png")
    with pytest.raises(DataError, match=r"this one is 10 x 20, the first 8 x 8 \(.*train/dog/0003.png\).*image_size"):
        load(tmp_path)
    assert load(tmp_path, image_size=8).train_images.shape == (24, 3, 8, 8)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b""),
                                    lambda path: path.write_text("no image"),
                                    lambda path: (path.unlink(), path.symlink_to("missing"))])
def test_one_unreadable_image_stops_with_its_name(tmp_path, damage):
    write_folder(tmp_path)
    damage(tmp_path / "train/dog/0005.png")
    with pytest.raises(DataError, match=r"cannot read the image .*train/dog/0005.png.*on_bad=skip"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("extension", ["jpg", "png", "bmp", "webp", "tif", "gif", "ppm"])
def test_random_damage_of_a_file_is_an_unreadable_image_or_harmless(tmp_path, extension):
    write_folder(tmp_path, train=1, test=1)
    path, random = tmp_path / f"train/cat/0000.{extension}", np.random.default_rng(0)
    (tmp_path / "train/cat/0000.png").unlink()
    Image.fromarray(random_images(1, 8, 8, 3)[0]).save(path)
    whole = path.read_bytes()
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for place in random.integers(0, min(80, len(whole)), 3):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            load(tmp_path, image_size=8)
        except DataError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(("count", "allowed"), [(6, 1), (30, 3), (600, 10)])
def test_on_bad_skip_leaves_out_a_few_images_of_a_set_of_any_size_but_no_more(tmp_path, count, allowed):
    write_folder(tmp_path, train=1, test=2, side=4)
    for name in ("cat", "dog"):
        for number in range(1, count):
            os.link(tmp_path / f"train/{name}/0000.png", tmp_path / f"train/{name}/{number:04d}.png")
    whole = (tmp_path / "train/dog/0000.png").read_bytes()
    bad = [f"train/dog/{number:04d}.png" for number in range(1, allowed + 1)]
    for name in bad:
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(whole[:-30])
    raw = load(tmp_path, on_bad="skip")
    assert raw.train_labels.tolist() == [0] * count + [1] * (count - allowed)
    assert len(raw.train_images) == len(raw.train_labels)
    assert raw.notes == (f"{allowed} unreadable images were left out: {', '.join(bad)}",)
    (tmp_path / "train/cat/0003.png").unlink()
    (tmp_path / "train/cat/0003.png").write_text("no image")
    with pytest.raises(DataError, match=rf"of {2 * count} images cannot be read, at most {allowed} may be skipped"):
        load(tmp_path, on_bad="skip")


def test_a_set_beyond_memory_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    write_folder(tmp_path)
    monkeypatch.setattr("mat_dist.data.images.available_bytes", lambda: 1000)
    with pytest.raises(DataError, match=r"GiB are free .*data.residency=mmap"):
        load(tmp_path)


def test_the_digest_of_a_listing_follows_names_sizes_and_times(tmp_path):
    write_folder(tmp_path)
    first = list_images(tmp_path).digest
    assert list_images(tmp_path).digest == first
    os.utime(tmp_path / "train/cat/0000.png", (1, 1))
    second = list_images(tmp_path).digest
    (tmp_path / "train/cat/0000.png").rename(tmp_path / "train/cat/000.png")
    assert len({first, second, list_images(tmp_path).digest}) == 3
