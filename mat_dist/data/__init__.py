"""Data: reading and checking images, splits, batches, augmentation.

Images are stored as bytes; batches are float in [0, 1].
"""

from __future__ import annotations

from mat_dist.data import arrays, builtin, folder  # noqa: F401  (registers these data sets)
from mat_dist.data.batches import Batches, steps_per_epoch, training_batches
from mat_dist.data.images import (
           DataSets,
           ImageSet,
           RawData,
           as_float,
           channel_stats,
           dataset_names,
           find_dataset,
           register_dataset,
)
from mat_dist.data.load import load_data, place

__all__ = ["Batches", "DataSets", "ImageSet", "RawData", "as_float", "channel_stats", "dataset_names", "find_dataset",
           "load_data", "place", "register_dataset", "steps_per_epoch", "training_batches"]
