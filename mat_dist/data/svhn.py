"""`svhn`: Street View House Numbers, cropped digits of 32x32 pixels (Netzer et al., 2011), as MATLAB files.

A MATLAB file can unpack to a thousand times its size, whatever its header says. So only the published files are read:
their MD5 is known (for a given file nobody can make another one with the same MD5).
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np

from mat_dist.config.schema import DataConfig
from mat_dist.data.download import MOST_BYTES, fetch_once
from mat_dist.data.images import RawData
from mat_dist.data.registry import register_dataset
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import DataError, EnvironmentFault

FILES = ("train_32x32.mat", "test_32x32.mat")


@register_dataset("svhn", shared=True, stoppable=True)
def load_svhn(config: DataConfig, build: bool, stop: StopFlag | None = None) -> RawData:
    """73 257 training and 26 032 test images (N, 3, 32, 32); label 10 of the files is the digit 0.

    Raises:
        DataError: the files are missing or damaged.
        EnvironmentFault: scipy is not installed.
    """
    if config.root is None:
        raise DataError("data.root is not set", "data.name=svhn", f"set it to the folder of {' and '.join(FILES)}")
    root = Path(os.path.expanduser(config.root))

    def found() -> tuple[Path, ...] | None:
        paths = tuple(root / name for name in FILES)
        return paths if all(path.is_file() for path in paths) else None

    paths = found()
    if paths is None and config.download:
        paths = fetch_once(found, _sources(), root, build=build, name="svhn", stop=stop)
    if paths is None:
        raise DataError(f"{' or '.join(FILES)} not found", f"data.root={root}",
                        "put both from http://ufldl.stanford.edu/housenumbers/ there, or add data.download=true")
    (train_images, train_labels), (test_images, test_labels) = (
        _read_mat(path, md5) for path, (_, _, md5) in zip(paths, _sources(), strict=True))
    return RawData(train_images, train_labels, test_images, test_labels, tuple(str(digit) for digit in range(10)))


def _sources() -> list[tuple[str, str, str]]:
    """Where torchvision gets the files: url, name, MD5."""
    from torchvision.datasets import SVHN

    return [tuple(SVHN.split_list[split]) for split in ("train", "test")]


def _read_mat(path: Path, md5: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) and labels (N,) of a file with X (32, 32, 3, N) and y (N, 1)."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as problem:
        raise EnvironmentFault("reading MATLAB files needs scipy, which is not installed", "data.name=svhn",
                               "pip install scipy") from problem
    try:
        content = path.read_bytes() if path.stat().st_size <= MOST_BYTES else b""
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise DataError(f"not the published {path.name}: its MD5 is {found} instead of {md5}", str(path),
                            "it may be incomplete or changed and is not opened; get it again from "
                            "http://ufldl.stanford.edu/housenumbers/")
        stored = loadmat(io.BytesIO(content), variable_names=["X", "y"])
        images, labels = stored["X"], stored["y"].astype(np.int64).reshape(-1)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != (32, 32, 3):
            raise ValueError(f"X is {images.dtype} of shape {images.shape}")
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError, MatReadError) as problem:
        raise DataError(f"cannot read the file ({type(problem).__name__}: {problem})", str(path),
                        "copy the file again") from problem
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), np.where(labels == 10, 0, labels)
