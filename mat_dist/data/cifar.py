"""`cifar10`, `cifar100`: 60 000 colour images of 32x32 pixels (Krizhevsky, 2009), from the published archive.

The archive holds pickles, which can run code. It is read only when its SHA-256 is the published one, from memory (so
nobody can swap it in between), and even then by an unpickler that knows arrays and plain values only.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mat_dist.config.schema import DataConfig
from mat_dist.data.download import fetch_once
from mat_dist.data.images import RawData
from mat_dist.data.registry import register_dataset
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import DataError

MOST_MEMBER_BYTES = 200 << 20  # the largest member, CIFAR-100's train, has 155 MB


@dataclass(frozen=True)
class Archive:
    """A published archive: file name, bytes, digests, and what its members are called."""

    name: str
    filename: str
    size: int
    sha256: str
    md5: str  # torchvision's downloader checks it; we trust the SHA-256 only
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    label_key: bytes
    classes_key: bytes

    @property
    def url(self) -> str:
        """Where it is published."""
        return f"https://www.cs.toronto.edu/~kriz/{self.filename}"


# The SHA-256 values are those in Keras and in torchvision's prototype data sets.
CIFAR10 = Archive(
    name="cifar10", filename="cifar-10-python.tar.gz", size=170498071,
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce", md5="c58f30108f718f92721af3b95e74349a",
    folder="cifar-10-batches-py", train=tuple(f"data_batch_{part}" for part in range(1, 6)), test="test_batch",
    meta="batches.meta", label_key=b"labels", classes_key=b"label_names")
CIFAR100 = Archive(
    name="cifar100", filename="cifar-100-python.tar.gz", size=169001437,
    sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7", md5="eb9058c3a382ffc7106e4002c42a8d85",
    folder="cifar-100-python", train=("train",), test="test", meta="meta", label_key=b"fine_labels",
    classes_key=b"fine_label_names")


@register_dataset("cifar10", shared=True, stoppable=True)
def load_cifar10(config: DataConfig, build: bool, stop: StopFlag | None = None) -> RawData:
    """50 000 training and 10 000 test images (N, 3, 32, 32) in 10 classes. Raises DataError."""
    return load_archive(CIFAR10, config, build, stop)


@register_dataset("cifar100", shared=True, stoppable=True)
def load_cifar100(config: DataConfig, build: bool, stop: StopFlag | None = None) -> RawData:
    """50 000 training and 10 000 test images (N, 3, 32, 32) in 100 classes. Raises DataError."""
    return load_archive(CIFAR100, config, build, stop)


def load_archive(archive: Archive, config: DataConfig, build: bool, stop: StopFlag | None = None) -> RawData:
    """The images of a verified archive in `data.root` (its folder, or the file itself), downloaded where asked for."""
    if config.root is None:
        raise DataError("data.root is not set", f"data.name={archive.name}",
                        f"set it to the folder of {archive.url}, or to where data.download=true may put it")
    root = Path(os.path.expanduser(config.root))

    def found() -> Path | None:
        return next((path for path in (root / archive.filename, root) if path.is_file()), None)

    path = found()
    if path is None and config.download:
        path = fetch_once(found, [(archive.url, archive.filename, archive.md5)], root, build=build, name=archive.name,
                          stop=stop)
    if path is None:
        unpacked = (root / archive.folder).is_dir() or root.name == archive.folder
        why = "only the unpacked folder, whose pickles cannot be verified" if unpacked else "the archive is not there"
        raise DataError(f"{archive.filename} not found: {why}", f"data.root={root}",
                        f"put {archive.url} into that folder, or add data.download=true")
    return read_archive(archive, _verified_bytes(archive, path), str(path))


def _verified_bytes(archive: Archive, path: Path) -> bytes:
    """The whole archive in memory (170 MB), if it is the published one."""
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size == archive.size else b""
    except OSError as problem:
        raise DataError(f"cannot read the archive ({problem.strerror})", str(path), "make it readable") from problem
    digest = hashlib.sha256(content).hexdigest()
    if digest != archive.sha256:
        found = f"its SHA-256 is {digest}" if content else f"it has {size} bytes instead of {archive.size}"
        raise DataError(f"not the published {archive.filename}: {found}", str(path),
                        f"it may be incomplete or changed and is not opened; get it again from {archive.url}")
    return content


class _PlainUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain values; any other name in a pickle is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return np.empty(0).__reduce__()[0]  # the same function under both names of numpy's module
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def read_archive(archive: Archive, content: bytes, where: str) -> RawData:
    """The images in the bytes of an archive; nothing is unpacked to disk.

    Raises:
        DataError: members are missing, too large, or not what they should be.
    """
    wanted = (*archive.train, archive.test, archive.meta)
    how = f"get it again from {archive.url}"
    members: dict[str, dict] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            for info in tar:
                name = info.name.removeprefix(f"{archive.folder}/")
                if name not in wanted or not info.isreg():
                    continue
                if info.size > MOST_MEMBER_BYTES:
                    raise DataError(f"{info.name} has {info.size} bytes, too many for this data set", where, how)
                file = tar.extractfile(info)
                assert file is not None  # a regular file
                members[name] = _PlainUnpickler(io.BytesIO(file.read()), encoding="bytes").load()
        train = [_images_and_labels(archive, members[name]) for name in archive.train]
        test_images, test_labels = _images_and_labels(archive, members[archive.test])
        classes = tuple(name.decode() for name in members[archive.meta][archive.classes_key])
    except (tarfile.TarError, pickle.UnpicklingError, OSError, EOFError, ValueError, KeyError, TypeError,
            AttributeError, IndexError) as problem:
        raise DataError(f"cannot read the archive ({type(problem).__name__}: {problem})", where, how) from problem
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return RawData(images, labels, test_images, test_labels, classes)


def _images_and_labels(archive: Archive, batch: dict) -> tuple[np.ndarray, np.ndarray]:
    """Rows of 1024 red, 1024 green, 1024 blue bytes as (N, 3, 32, 32), and the labels (N,)."""
    data = batch[b"data"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2:
        raise ValueError("images are no rows of bytes")
    return data.reshape(-1, 3, 32, 32), np.array(batch[archive.label_key], np.int64)
