"""Rows 23 to 29: data that is missing, wrong, damaged, hostile, too small, or changes under the run."""

from __future__ import annotations

import io
import os
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.faults.inject import Fault
from tests.faults.lab import INTERVAL, End, Lab
from tests.faults.launching import fork_one
from tests.faults.registry import case

CONFIG, DATA = 2, 3
MOST_GROWTH = 200 << 10  # KiB of memory that a refused file may cost


def train_on(lab: Lab, *more: str, name: str = "run", growth: bool = False) -> End:
    """Train on one process with other data; with `growth`, the memory that it cost is checked."""
    kept = [word for word in lab.words(name=name) if not word.startswith("data.")]

    def body() -> int:
        from mat_dist import train

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code = train.main([*kept, *more])
        if growth:
            (lab.folder / "growth").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
        return code

    group = fork_one(body, lab.folder / f"out_{name}")
    lab.kinds.append(group.kind)
    end = lab.end(group, name=name, since=group.send(0))  # type: ignore[arg-type]
    if growth:
        grown = int((lab.folder / "growth").read_text())
        lab.expect(grown < MOST_GROWTH, f"memory grew by {grown >> 10} MiB")
    return end


def save_npz(path: Path, *, count: int = 60, **arrays: np.ndarray) -> Path:
    """A small sound data set of 8 x 8 images, with some arrays exchanged."""
    images = np.random.default_rng(0).random((count, 8, 8, 1), dtype=np.float32)
    labels = np.arange(count) % 3
    np.savez(path, **{"x_train": images, "y_train": labels, "x_test": images[:20], "y_test": labels[:20], **arrays})
    return path


def save_folder(root: Path, *, count: int = 8) -> Path:
    """Two classes of 16 x 16 JPEG files, in train/ and test/."""
    for split in ("train", "test"):
        for number, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.random.default_rng(index + 100 * number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index:03}.jpg", quality=95)
    return root


@case(23, "wrong data folder", code=DATA, bound=5)
def wrong_folder(lab: Lab, code: int) -> None:
    """Missing, empty, a file in its place, not readable: the path is printed with the layout that is expected."""
    empty, file, closed = lab.folder / "empty", lab.folder / "file", lab.folder / "closed"
    empty.mkdir()
    file.touch()
    save_folder(closed)
    os.chmod(closed / "train", 0)
    wrong = [lab.folder / "missing", empty, file]
    if os.geteuid() != 0:  # root may read everything
        wrong.append(closed)
    for path in wrong:
        end = train_on(lab, "data.name=folder", f"data.root={path}", name=f"run-{path.name}")
        lab.expect_end(end, code, says=[str(path)])
    os.chmod(closed / "train", 0o755)


@case(24, "pixels outside [0, 1], NaN, not scaled", code=DATA, bound=5)
def wrong_pixels(lab: Lab, code: int) -> None:
    """The first bad image and the range that was found."""
    good = np.random.default_rng(0).random((60, 8, 8, 1), dtype=np.float32)
    spoiled, normalised = good.copy(), (good - 0.5) / 0.3
    spoiled[7, 0, 0, 0] = np.nan
    late = good.copy()
    late[41, 3, 3, 0] = 1.5
    for name, images, says in (("nan", spoiled, ["image 7", "NaN"]), ("late", late, ["image 41", "1.5"]),
                               ("normalised", normalised, ["outside [0, 1]", "normalis"]),
                               ("bytes", (good * 255).astype(np.float32), ["outside [0, 1]", "255"]),
                               ("int", (good * 255).astype(np.int64), ["int64"])):
        file = save_npz(lab.folder / f"{name}.npz", x_train=images)
        end = train_on(lab, "data.name=npz", f"data.root={file}", "train.batch_size=10", name=f"run-{name}")
        lab.expect_end(end, code, says=[str(file), *says])


@case(25, "labels out of range, empty class", code=DATA, bound=5)
def wrong_labels(lab: Lab, code: int) -> None:
    """The label, where it is, and how many classes there are."""
    labels = np.arange(60) % 3
    beyond, negative, gap = labels.copy(), labels.copy(), np.where(labels == 1, 2, labels)
    beyond[5], negative[5] = 9, -1
    names = np.array(["a", "b", "c"])
    for name, arrays, says in (("beyond", {"y_train": beyond, "classes": names}, ["label 9 of image 5", "3 classes"]),
                               ("negative", {"y_train": negative, "classes": names}, ["label -1 of image 5"]),
                               ("test", {"y_test": labels[:20] + 3}, ["label", "test"]),
                               ("empty", {"y_train": gap}, ["no training image"]),
                               ("length", {"y_train": labels[:-1]}, ["59"])):
        file = save_npz(lab.folder / f"{name}.npz", **arrays)
        end = train_on(lab, "data.name=npz", f"data.root={file}", "train.batch_size=10", name=f"run-{name}")
        lab.expect_end(end, code, says=[str(file), *says])


@case(26, "damaged image file", code=DATA, bound=5)
def damaged_image(lab: Lab, code: int) -> None:
    """Half a JPEG, no image at all, another size: the run stops with the file's name."""
    def half(file: Path) -> None:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    def larger(file: Path) -> None:
        Image.new("RGB", (20, 16)).save(file)

    spoils: dict[str, Callable[[Path], object]] = {"half": half, "text": lambda file: file.write_text("not an image"),
                                                   "empty": lambda file: file.write_bytes(b""), "larger": larger}
    for name, spoil in spoils.items():
        root = save_folder(lab.folder / name)
        bad = root / "train" / "dog" / "003.jpg"
        spoil(bad)
        end = train_on(lab, "data.name=folder", f"data.root={root}", "train.batch_size=4", name=f"run-{name}")
        lab.expect_end(end, code, says=[str(bad)])


@case(26, "damaged image file", "skipped on all ranks", code=0)
def skipped_image(lab: Lab, code: int) -> None:
    """data.on_bad=skip leaves ten of 1000 out, on all ranks the same; eleven are too many."""
    root = save_folder(lab.folder / "images", count=500)
    bad = [root / "train" / "dog" / f"{number:03}.jpg" for number in range(3, 14)]
    for count in (10, 11):
        for file in bad[:count]:
            file.write_bytes(b"")
        words = [word for word in lab.words(name=f"run-{count}") if not word.startswith("data.")]
        group = lab.start((), [*words, "data.name=folder", f"data.root={root}", "data.on_bad=skip", "train.max_steps=2",
                               "data.image_size=8"])
        end = lab.end(group, name=f"run-{count}")
        if count == 10:
            lab.expect_end(end, code)
            lab.expect("10 unreadable images were left out: train/dog/003.jpg" in end.text, "they are not told")
        else:
            lab.expect(end.code == DATA and "at most 10" in end.message, f"11 of 1000 were skipped: {end.message}")


@case(27, "pixel bomb, npz bomb", code=DATA, bound=5)
def bombs(lab: Lab, code: int) -> None:
    """Refused before anything large is allocated."""
    root = save_folder(lab.folder / "pixels")
    bomb = root / "train" / "cat" / "000.jpg"
    bomb.unlink()
    _png_header(bomb.with_suffix(".png"), 60_000, 60_000)
    end = train_on(lab, "data.name=folder", f"data.root={root}", "data.image_size=16", name="run-pixels", growth=True)
    lab.expect_end(end, code, says=["000.png", "pixels"])
    for name, data in (("zeros", _npz_bomb()), ("liar", _npz_liar())):
        file = lab.folder / f"{name}.npz"
        file.write_bytes(data)
        end = train_on(lab, "data.name=npz", f"data.root={file}", name=f"run-{name}", growth=True)
        lab.expect_end(end, code, says=[str(file)])


def _png_header(path: Path, width: int, height: int) -> None:
    """A valid PNG of almost no bytes that says it is huge."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))


def _npz_bomb() -> bytes:
    """200 MiB of zeros in some 200 KiB."""
    file = io.BytesIO()
    images = np.zeros((50_000, 64, 64, 1), np.uint8)
    np.savez_compressed(file, x_train=images, y_train=np.zeros(50_000, int), x_test=images[:9], y_test=np.zeros(9, int))
    return file.getvalue()


def _npz_liar() -> bytes:
    """A header that promises a terabyte."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40,)})
            archive.writestr(f"{name}.npy", header.getvalue() + bytes(64))
    return file.getvalue()


@case(28, "too few images for a batch", code=DATA, bound=5)
def too_few(lab: Lab, code: int) -> None:
    """Clear text; a batch of one image, which batch norm cannot take, is refused with the settings."""
    file = save_npz(lab.folder / "small.npz", count=30)
    end = train_on(lab, "data.name=npz", f"data.root={file}", "train.batch_size=64")
    lab.expect_end(end, code, says=["do not fill one batch of 64"])
    one = train_on(lab, "data.name=npz", f"data.root={file}", "train.batch_size=1", name="one")
    lab.expect(one.code == CONFIG and "a batch of one image" in one.message, f"batch of one: {one.code} {one.message}")


@case(29, "the data cache changes under the run", "truncated", code=DATA, bound=5, kind="truncate")
@case(29, "the data cache changes under the run", "overwritten", code=DATA, bound=5, kind="overwrite")
def changing_cache(lab: Lab, code: int, kind: str) -> None:
    """All ranks map one file of decoded images; a rank that finds it changed stops all, before the bytes are used."""
    root, cache = save_folder(lab.folder / "images", count=20), lab.folder / "cache"  # 32 for training: 8 steps
    words = ["data.name=folder", f"data.root={root}", "data.residency=mmap", f"data.cache={cache}",
             "train.batch_size=4"]
    kept = [word for word in lab.words(*words) if word.startswith("data.train_size") is False]
    first = lab.end(lab.start((), [*kept, "train.max_steps=1", "run.name=first"]), name="first")
    lab.expect(first.code == 0, f"first run: {first.message or first.text[-300:]}")
    images = next(cache.glob("*.u8"))
    end = lab.end(lab.start([Fault(kind, "batch", rank=0, at=2 * INTERVAL, text=str(images), size=64)], kept))
    lab.expect_end(end, code, says=[images.name], survivors=[0, 1])
    lab.expect_lost(end, most=8)
