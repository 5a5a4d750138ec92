"""`digits`: 1797 handwritten digits of 8x8 pixels, part of the package. A toy: results say little about real images.

Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0
(digits.LICENSE.txt).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mat_dist import rng
from mat_dist.config.schema import DataConfig
from mat_dist.data.images import RawData
from mat_dist.data.registry import register_dataset
from mat_dist.data.split import complement, stratified

TEST_SIZE = 360  # a fifth


def scale_levels(levels: np.ndarray) -> np.ndarray:
    """Counts 0..16 as bytes: round(255 v / 16), so 0 stays 0 and 16 becomes 255."""
    return ((levels.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)


@register_dataset("digits")
def load_digits(config: DataConfig) -> RawData:
    """1437 training and 360 test images (N, 1, 8, 8), a stratified split that is the same for every seed."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        images, labels = scale_levels(stored["images"])[:, None], stored["labels"].astype(np.int64)
    test = stratified(torch.from_numpy(labels), TEST_SIZE, rng.key(0, "digits-test"))
    train = complement(test, len(labels)).numpy()
    test_rows = test.numpy()
    return RawData(images[train], labels[train], images[test_rows], labels[test_rows],
                   tuple(str(digit) for digit in range(10)))
