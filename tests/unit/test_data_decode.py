"""Pixel types, formats and sizes of single images: what becomes of each, and what is told."""

from __future__ import annotations

import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mat_dist.config.schema import DataConfig
from mat_dist.data import decode
from mat_dist.data import folder as module
from mat_dist.data.decode import read_image
from mat_dist.data.folder import load_folder
from mat_dist.data.images import RawData
from mat_dist.errors import DataError
from tests.unit.data_files import random_images, write_folder


def load(root: Path, **settings) -> RawData:
    return load_folder(DataConfig(name="folder", root=str(root), **settings), True)


def chunk(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, lines: bytes, bits: int = 8, colours: int = 2, more: bytes = b"") -> bytes:
    """A PNG of raw scan lines; `more` are chunks before them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND")


def deep_png(channels: int, colours: int) -> bytes:
    values = np.random.default_rng(0).integers(0, 4096, (8, 8 * channels)).astype(">u2")  # 12 bits, as cameras give
    return png(8, 8, b"".join(b"\0" + row.tobytes() for row in values), 16, colours)


def tiff(channels: int, bits: int) -> bytes:
    """An uncompressed TIFF of 8 x 8 pixels, as its specification has it."""
    pixels = bytes(8 * 8 * channels * bits // 8)
    start = 8 + 2 * channels
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, channels, bits if channels == 1 else 8), (259, 3, 1, 1),
            (262, 3, 1, 1 if channels == 1 else 2), (273, 4, 1, start), (277, 3, 1, channels), (278, 3, 1, 8),
            (279, 4, 1, len(pixels))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", start + len(pixels)) + struct.pack("<H", bits) * channels + pixels + directory


@pytest.mark.parametrize("content", [
    deep_png(1, 0), deep_png(3, 2), deep_png(2, 4), deep_png(4, 6), tiff(1, 16), tiff(3, 16),
    b"P5 8 8 4095\n" + bytes(128), b"P6 8 8 65535\n" + bytes(384), b"Pf 8 8 1.0\n" + bytes(256)],
    ids=["grey", "RGB", "grey and alpha", "RGBA", "TIFF grey", "TIFF RGB", "PGM of 12 bits", "PPM", "floats"])
def test_more_than_8_bits_in_any_channel_are_refused_with_the_file(tmp_path, content):
    write_folder(tmp_path)
    (tmp_path / "train/cat/0001.png").write_bytes(content)
    with pytest.raises(DataError, match=r"pixels of type .*, 8 bits per channel are needed\).*train/cat/0001.png"):
        load(tmp_path)


def lab(path: Path) -> None:
    Image.new("LAB", (8, 8)).save(path, format="TIFF")


@pytest.mark.parametrize(("save", "said"), [(lab, "pixels of type LAB"),
                                            (lambda path: path.write_bytes(tiff(6, 8)), "6 channels|cannot identify")])
def test_pixels_without_a_stated_conversion_are_refused_with_the_file(tmp_path, save, said):
    write_folder(tmp_path)
    save(tmp_path / "train/cat/0001.png")
    with pytest.raises(DataError, match=rf"cannot read the image .*({said}).*train/cat/0001.png"):
        load(tmp_path)


def half_seen(mode: str) -> Image.Image:
    """8 x 8 pixels of the value 200, whose left half is invisible."""
    image, alpha = Image.new("L", (8, 8), 200), np.zeros((8, 8), np.uint8)
    alpha[:, 4:] = 255
    image.putalpha(Image.fromarray(alpha))
    return image.convert(mode)


ONE_COLOUR = png(8, 8, (b"\0" + bytes((9, 9, 9)) * 4 + bytes((200,)) * 12) * 8,
                 more=chunk(b"tRNS", bytes((0, 9, 0, 9, 0, 9))))


@pytest.mark.filterwarnings("error")  # a warning of Pillow names no file
@pytest.mark.parametrize("save", [
    lambda path: half_seen("LA").save(path), lambda path: half_seen("RGBA").save(path),
    lambda path: half_seen("RGBA").quantize(16).save(path), lambda path: half_seen("RGBA").save(path, format="TIFF"),
    lambda path: half_seen("RGBA").save(path, format="WEBP", lossless=True),
    lambda path: half_seen("RGBA").save(path, format="GIF"), lambda path: path.write_bytes(ONE_COLOUR)],
    ids=["LA", "RGBA", "palette", "TIFF", "WebP", "GIF", "one colour"])
def test_what_nobody_sees_is_white_in_every_format_and_counted(tmp_path, save):
    write_folder(tmp_path)
    save(tmp_path / "train/cat/0000.png")
    image = read_image(tmp_path / "train/cat/0000.png", None)
    assert (image[:, :4] == 255).all()
    assert np.abs(image[:, 4:].astype(int) - 200).max() <= 2, "a palette rounds"
    assert any("1 x transparent, blended onto white" in note for note in load(tmp_path).notes)


def test_pixels_that_are_partly_transparent_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 100, 255, 51)).save(tmp_path / "image.png")
    assert (read_image(tmp_path / "image.png", None) == (204, 224, 255)).all()  # 0.2 of the colour, 0.8 of white


def test_what_is_converted_is_counted_by_kind_also_when_the_cache_is_opened(tmp_path):
    write_folder(tmp_path / "set")
    images = [Image.fromarray(image) for image in random_images(9, 8, 8, 3)]
    for number, mode in enumerate(["L", "L", "1", "P", "CMYK", "LA", "RGBA"]):
        images[number].convert(mode).save(tmp_path / f"set/train/cat/{number:04d}.png",
                                          format="TIFF" if mode == "CMYK" else "PNG")
    images[7].save(tmp_path / "set/train/dog/0000.png", format="GIF", save_all=True, append_images=images[:2])
    images[8].save(tmp_path / "set/test/dog/0000.PNG")
    told = ("images that were converted: 1 x CMYK without its colour profile; 1 x GIF named .png; 1 x TIFF named .png; "
            "1 x black and white; 3 x grey; 2 x palette; 1 x several frames or pages, the first one taken")
    assert told in load(tmp_path / "set").notes
    for _ in range(2):
        assert told in load(tmp_path / "set", residency="mmap", cache=str(tmp_path / "cache")).notes


@pytest.mark.parametrize("ending", ["gif", "tif", "TIFF", "ppm", "pgm", "JPG", "Webp", "bmp"])
def test_all_named_endings_are_read_in_either_case(tmp_path, ending):
    write_folder(tmp_path)
    image = Image.fromarray(random_images(1, 8, 8, 3)[0])
    (image.convert("L") if ending == "pgm" else image).save(tmp_path / f"train/cat/x.{ending}")
    raw = load(tmp_path)
    assert raw.train_labels.tolist() == [0] * 13 + [1] * 12
    with Image.open(tmp_path / f"train/cat/x.{ending}") as written:
        assert np.array_equal(raw.train_images[12].transpose(1, 2, 0), np.asarray(written.convert("RGB")))


@pytest.mark.parametrize(("name", "head"), [(b"iCCP", b"name\0\0"), (b"zTXt", b"key\0\0"),
                                            (b"iTXt", b"key\0\1\0\0\0")])
def test_a_large_colour_profile_or_text_does_not_make_an_image_unreadable(tmp_path, name, head):
    large = chunk(name, head + zlib.compress(os.urandom(1 << 10) * (3 << 10)))
    (tmp_path / "image.png").write_bytes(png(8, 8, (b"\0" + bytes((10, 20, 30)) * 8) * 8, more=large))
    assert (read_image(tmp_path / "image.png", None) == (10, 20, 30)).all()


@pytest.mark.parametrize("problem", [MemoryError(), UserWarning("Palette"), RecursionError("deep"), RuntimeError("?")])
def test_whatever_one_image_raises_is_told_with_its_name_and_skipped_on_demand(tmp_path, monkeypatch, problem):
    write_folder(tmp_path)

    def read(path: Path, side: int | None, tell) -> np.ndarray:
        if path == tmp_path / "train/cat/0004.png":
            raise problem
        return read_image(path, side, tell)

    monkeypatch.setattr(module, "read_image", read)
    with pytest.raises(DataError, match=rf"cannot read the image \({type(problem).__name__}.*train/cat/0004.png"):
        load(tmp_path)
    assert "1 unreadable images were left out: train/cat/0004.png" in load(tmp_path, on_bad="skip").notes


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 30_000])  # Pillow only warns of the first
def test_pixel_bombs_are_refused_before_any_pixel_is_allocated(tmp_path, side):
    write_folder(tmp_path)
    (tmp_path / "train/cat/0000.png").write_bytes(png(side, side, bytes(1000)))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"pixels.*train/cat/0000.png"):
        load(tmp_path, image_size=8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


@pytest.mark.parametrize("size", [(300, 3), (2, 400), (1, 65_000), (65_000, 1)])
def test_a_thin_image_costs_no_more_than_its_square_and_gives_the_same_pixels(tmp_path, size, monkeypatch):
    path = tmp_path / "image.png"
    Image.fromarray(random_images(1, size[1], size[0], 3)[0]).save(path)
    resize, made = Image.Image.resize, list[int]()

    def counted(image, wanted, *args):
        made.append(wanted[0] * wanted[1])
        return resize(image, wanted, *args)

    monkeypatch.setattr(Image.Image, "resize", counted)
    if max(size) > 1000:
        assert read_image(path, 224).shape == (224, 224, 3)
        assert made == [224 * 224]
    else:
        whole = read_image(path, 64).astype(int)
        monkeypatch.setattr(decode, "MOST_RESIZED", 64 * 64)
        assert np.abs(read_image(path, 64) - whole).max() <= 1
        assert made[0] > made[1] == 64 * 64
