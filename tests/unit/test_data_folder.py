"""Images on disk: layout, decoding, bad files."""

from __future__ import annotations

import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from mat_dist.config.schema import DataConfig
from mat_dist.data import folder as module
from mat_dist.data.folder import list_images, load_folder, read_image
from mat_dist.data.images import RawData
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


def test_sixteen_bit_images_are_refused_instead_of_cut_off_at_255(tmp_path):
    write_folder(tmp_path)
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(tmp_path / "train/cat/0001.png")
    with pytest.raises(DataError, match=r"pixels of type I;16.*train/cat/0001.png"):
        load(tmp_path)


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
    assert any(note.startswith("1 files in train/ are no images") for note in raw.notes)


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
@pytest.mark.parametrize("extension", ["jpg", "png", "bmp", "webp"])
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


def thousand_images(root: Path) -> None:
    """1000 training images, all links to one."""
    write_folder(root, train=1, test=2, side=4)
    for name in ("cat", "dog"):
        for number in range(1, 500):
            os.link(root / f"train/{name}/0000.png", root / f"train/{name}/{number:04d}.png")


def test_one_corrupt_jpeg_in_a_thousand_is_skipped_and_listed_a_second_one_is_refused(tmp_path):
    thousand_images(tmp_path)
    truncated = tmp_path / "train/dog/0123x.jpg"
    Image.fromarray(random_images(1, 4, 4, 3)[0]).save(truncated)
    truncate(truncated)
    raw = load(tmp_path, on_bad="skip")
    assert len(raw.train_images) == len(raw.train_labels) == 1000
    assert raw.train_labels.tolist() == [0] * 500 + [1] * 500
    assert raw.notes == ("1 unreadable images were left out: train/dog/0123x.jpg",)
    (tmp_path / "train/cat/0003.png").unlink()
    (tmp_path / "train/cat/0003.png").write_text("no image")
    with pytest.raises(DataError, match=r"2 or more of 1001 images cannot be read, at most 1 \(0.1 %\).*0003.png"):
        load(tmp_path, on_bad="skip")


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it has width x height pixels."""
    def part(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(bytes(1000))) + part(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 30_000])  # Pillow only warns of the first
def test_pixel_bombs_are_refused_before_any_pixel_is_allocated(tmp_path, side):
    write_folder(tmp_path)
    (tmp_path / "train/cat/0000.png").write_bytes(png_bomb(side, side))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"pixels.*train/cat/0000.png"):
        load(tmp_path, image_size=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


def test_a_thin_image_that_would_be_resized_to_billions_of_pixels_is_refused(tmp_path):
    write_folder(tmp_path)
    Image.new("L", (60_000, 1)).save(tmp_path / "train/cat/0000.png")
    with pytest.raises(DataError, match=r"60000 x 1 pixels, at most 89478485 are decoded.*train/cat/0000.png"):
        load(tmp_path, image_size=224)


def test_formats_other_than_the_named_ones_are_not_opened(tmp_path):
    write_folder(tmp_path)
    Image.fromarray(random_images(1, 8, 8, 3)[0]).save(tmp_path / "train/cat/0002.png", format="TIFF")
    with pytest.raises(DataError, match=r"cannot identify image file.*0002.png"):
        load(tmp_path)


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
