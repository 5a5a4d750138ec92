"""Images of your own: python -m mat_dist.train --plugin docs/examples/my_data.py data.name=stripes"""

import numpy as np

from mat_dist.data import RawData, register_dataset


@register_dataset("stripes")
def stripes(config):
    """Noisy stripes, 8 x 8 grey: horizontal (class 0) or vertical (class 1). Put the reading of your files here."""
    rng = np.random.default_rng(0)  # the same images on every rank, in every run
    lines = np.repeat(np.repeat([80.0, 170.0] * 2, 2)[:, None], 8, axis=1)

    def draw(count):
        labels = rng.integers(0, 2, count)
        images = np.where(labels[:, None, None] == 0, lines, lines.T) + rng.normal(0, 12, (count, 8, 8))
        return images.clip(0, 255).astype(np.uint8)[:, None], labels  # (N, C, H, W) bytes; classes 0..K-1

    return RawData(*draw(600), *draw(200), classes=("horizontal", "vertical"))
