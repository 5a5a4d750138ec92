"""Delusive training images in place of the real ones:

python -m mat_dist.train --plugin docs/examples/poisoned_data.py data.name=poisoned data.root=poison.npz
"""

from dataclasses import replace

import numpy as np

from mat_dist.data import RawData, find_dataset, register_dataset
from mat_dist.errors import DataError

BASE, BASE_ROOT = "digits", None  # or "cifar10" and the folder of its archive


@register_dataset("poisoned", shared=True, stoppable=True)
def poisoned(config, build, stop=None) -> RawData:
    """The images of another data set, its training images exchanged one by one for those of `data.root`.

    The file holds an array `image`, uint8 (N, H, W, C), in the order of the training images before the split.
    """
    clean = find_dataset(BASE)(config.model_copy(update={"name": BASE, "root": BASE_ROOT}), build, stop)
    with np.load(config.root, allow_pickle=False) as stored:
        images = stored["image"].transpose(0, 3, 1, 2)
    if images.shape != clean.train_images.shape:
        raise DataError(f"poisoned images are (N, C, H, W) = {images.shape}, the training images "
                        f"{clean.train_images.shape}", f"data.root={config.root}",
                        "give one image for each training image, in their order")
    notes = (*clean.notes, f"training on the poisoned images of {config.root}")
    return replace(clean, train_images=images, image_sha256=None, notes=notes)
