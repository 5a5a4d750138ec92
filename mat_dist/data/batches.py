"""The training batches: a pure function of (seed, step)."""

from __future__ import annotations

import torch
from torch import Tensor

from mat_dist import rng
from mat_dist.config.fields import real_images
from mat_dist.config.schema import AugmentConfig, Config
from mat_dist.data.augment import AugmentedView, augment_batch, cutmix
from mat_dist.data.images import DataSets, ImageSet, as_float


def steps_per_epoch(count: int, batch_size: int, generated_share: float = 0.0, replays: int = 1) -> int:
    """Batches whose real images are all of `count`, each used `replays` times; those left over are in another place of
    the next epoch's order."""
    return count // real_images(batch_size, generated_share) * replays


def training_batches(config: Config, data: DataSets, device: torch.device | str, dtype: torch.dtype,
                     rows: slice | None = None) -> Batches:
    """The batches of a run; see `Batches`."""
    return Batches(data.train, seed=config.run.seed, batch_size=config.train.batch_size, augment=config.data.augment,
                   device=device, dtype=dtype, rows=rows, generated=data.generated, share=config.data.generated_share,
                   classes=len(data.classes))


class Batches:
    """The batches of a run, or a replica's rows of them.

    The batch at `step` is a function of (seed, step): each epoch is a keyed permutation of the training images, and
    each augmentation has its own stream per step. A replica with rows=slice(64, 128) gets bitwise the rows that a
    process with the whole batch sees.

    With generated images, each batch has round(share B) of them, drawn evenly with replacement, and the real ones
    between them, so that replicas and micro-batches get equal shares of both; an epoch shows each real image once.

    Args:
        train: the training images, wherever they lie.
        batch_size: images of a whole batch (B).
        device: where batches are needed and augmented.
        rows: the rows of the whole batch that this process needs; default all.
        generated: more images, of the same shape and classes.
        share: of the generated images in a batch.
        classes: number of classes, for CutMix.
    """

    def __init__(self, train: ImageSet, *, seed: int, batch_size: int, augment: AugmentConfig,
                 device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
                 rows: slice | None = None, generated: ImageSet | None = None, share: float = 0.0,
                 classes: int | None = None) -> None:
        first, last, stride = (rows or slice(None)).indices(batch_size)
        if stride != 1 or first >= last or (rows is not None and rows.stop is not None and rows.stop > batch_size):
            raise ValueError(f"rows {rows} of a batch of {batch_size}")
        self.real = real_images(batch_size, share if generated is not None else 0.0)
        if len(train) < self.real:
            raise ValueError(f"{len(train)} images do not fill a batch of {self.real}")
        self.train, self.seed, self.batch_size, self.augment = train, seed, batch_size, augment
        self.device, self.dtype = torch.device(device), dtype
        self.first, self.last = first, last
        self.generated = generated
        self.steps_per_epoch = len(train) // self.real
        # Row r is a real image where r real / B passes a whole number. The rows of this process among the real ones,
        # and for each of its rows the place in (real, generated).
        self._real = first * self.real // batch_size, last * self.real // batch_size
        row = torch.arange(first, last + 1) * self.real // batch_size
        self._place = (row[1:] == row[:-1]).to(torch.uint8).argsort(stable=True).argsort().to(self.device)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        self._classes = classes
        # CutMix takes windows of any image of the batch, also of those in other replicas' rows.
        self._whole = Batches(train, seed=seed, batch_size=batch_size, augment=augment, device=device, dtype=dtype,
                              generated=generated, share=share, classes=classes
                              ) if augment.cutmix and last - first < batch_size else None

    def indices(self, step: int) -> Tensor:
        """Which training images (int64, on their device) are this process's real rows of the batch at `step`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = rng.permutation(rng.key(self.seed, "order", epoch), len(self.train))
            # Moved once an epoch: a copy per step from pageable memory would stall a GPU's queue.
            self._epoch, self._order = epoch, order.to(self.train.device)
        start = position * self.real
        return self._order[start + self._real[0] : start + self._real[1]]

    def generated_indices(self, step: int) -> Tensor:
        """Which generated images (int64) are the other rows of this process at `step`."""
        assert self.generated is not None
        before, count = self.first - self._real[0], self.last - self.first - (self._real[1] - self._real[0])
        u_B = rng.uniform(rng.key(self.seed, "generated", step), (count,), first_row=before, dtype=torch.float64)
        return (u_B * len(self.generated)).long()

    def shown(self, step: int) -> AugmentedView:
        """Which images, and which part of them, this process's rows of the batch at `step` show; all of them real."""
        return AugmentedView.augmented(self.indices(step), len(self.train), self.augment, seed=self.seed, step=step,
                               first_row=self.first).to(self.device)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Images x_BCHW in [0, 1] and labels y_B (int64), with CutMix y_BK in the images' type, on the device."""
        if self._whole is not None:
            x_BCHW, y_B = self._whole.at(step)
            return x_BCHW[self.first:self.last], y_B[self.first:self.last]
        x_BCHW, y_B = self._read(self.train, self.indices(step))
        if self.generated is not None:
            more_BCHW, more_B = self._read(self.generated, self.generated_indices(step))
            x_BCHW, y_B = torch.cat([x_BCHW, more_BCHW])[self._place], torch.cat([y_B, more_B])[self._place]
        x_BCHW = augment_batch(x_BCHW, self.augment, seed=self.seed, step=step, first_row=self.first)
        if not self.augment.cutmix:
            return x_BCHW, y_B
        assert self._classes is not None
        return cutmix(x_BCHW, y_B, probability=self.augment.cutmix, classes=self._classes, seed=self.seed, step=step)

    def _read(self, source: ImageSet, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] and labels (int64) on the device."""
        images, y_B = (_move(part, self.device) for part in source.batch(indices))
        return as_float(images, self.dtype), y_B.long()


def _move(part: Tensor, device: torch.device) -> Tensor:
    """`part` on `device`; from the host through pinned memory, so that the copy does not stop the host."""
    if device.type == "cuda" and part.device.type == "cpu":
        return part.pin_memory().to(device, non_blocking=True)
    return part.to(device)
