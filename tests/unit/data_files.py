"""Small data sets on disk for the tests of mat_dist.data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def random_images(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    """uint8 noise of (count, *shape)."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_folder(root: Path, *, train: int = 12, test: int = 4, side: int = 8,
                 classes: tuple[str, ...] = ("cat", "dog"), held_out: str = "test") -> dict[str, np.ndarray]:
    """train/CLASS/*.png and test/CLASS/*.png, lossless -> path below the root: image (H, W, 3)."""
    written = {}
    for split, count in (("train", train), (held_out, test)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            images = random_images(count, side, side, 3, seed=100 * label + count)
            for number, image in enumerate(images):
                path = f"{split}/{name}/{number:04d}.png"
                Image.fromarray(image).save(root / path)
                written[path] = image
    return written
