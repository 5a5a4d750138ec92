"""The training batches: a pure function of (seed, step)."""

from __future__ import annotations

import torch
from torch import Tensor

from mat_dist import streams
from mat_dist.config.schema import AugmentConfig
from mat_dist.data.augment import augment_batch
from mat_dist.data.images import ImageSet, as_float


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Whole batches in `count` images; the images left over are in another place of the next epoch's order."""
    return count // batch_size


class Batches:
    """The batches of a run, or a replica's rows of them.

    The batch at `step` is a function of (seed, step): each epoch is a keyed permutation of the training images, and
    each augmentation has its own stream per step. A replica with rows=slice(64, 128) gets bitwise the rows that a
    process with the whole batch sees.

    Args:
        train: the training images, wherever they lie.
        seed: the run's seed.
        batch_size: images of a whole batch (B).
        augment: which augmentations are on.
        device: where batches are needed and augmented.
        dtype: float32 or float64.
        rows: the rows of the whole batch that this process needs; default all.
    """

    def __init__(self, train: ImageSet, *, seed: int, batch_size: int, augment: AugmentConfig,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
                 rows: slice | None = None) -> None:
        first, last, stride = (rows or slice(None)).indices(batch_size)
        if stride != 1 or first >= last or (rows is not None and rows.stop is not None and rows.stop > batch_size):
            raise ValueError(f"rows {rows} of a batch of {batch_size}")
        if len(train) < batch_size:
            raise ValueError(f"{len(train)} images do not fill a batch of {batch_size}")
        self.train, self.seed, self.batch_size, self.augment = train, seed, batch_size, augment
        self.device, self.dtype = torch.device(device), dtype
        self.first, self.last = first, last
        self.steps_per_epoch = steps_per_epoch(len(train), batch_size)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """Which training images (int64, on the device of the images) are this process's rows of the batch at `step`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = streams.permutation(streams.key(self.seed, "order", epoch), len(self.train))
            # Moved once an epoch: a copy per step from pageable memory would stall a GPU's queue.
            self._epoch, self._order = epoch, order.to(self.train.device)
        start = position * self.batch_size
        return self._order[start + self.first : start + self.last]

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Images x_BCHW in [0, 1] and labels y_B (int64) at `step`, on the device."""
        images, y_B = (_move(part, self.device) for part in self.train.batch(self.indices(step)))
        x_BCHW = as_float(images, self.dtype)
        return augment_batch(x_BCHW, self.augment, seed=self.seed, step=step, first_row=self.first), y_B


def _move(part: Tensor, device: torch.device) -> Tensor:
    """`part` on `device`; from the host through pinned memory, so that the copy does not stop the host."""
    if device.type == "cuda" and part.device.type == "cpu":
        return part.pin_memory().to(device, non_blocking=True)
    return part.to(device)
