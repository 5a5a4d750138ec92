"""The data set, and the first batch of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mat_dist import rng
from mat_dist.attacks.pgd import likeliest
from mat_dist.config.schema import Config, DataConfig
from mat_dist.data import as_float, load_data, training_batches
from mat_dist.data.arrays import generated_images
from mat_dist.data.folder import preview_folder
from mat_dist.errors import DataError
from mat_dist.models.registry import DTYPES, Images
from mat_dist.tools.check.findings import Answer
from mat_dist.tools.dryrun import KNOWN_IMAGES

DARK = 2.5 / 255  # a batch whose largest value is below this was probably scaled twice
SHOWN = 64  # images that are decoded of a folder whose cache is not built yet
GIB = 1 << 30


@dataclass(frozen=True)
class Sample:
    """Images as a run would see them.

    Attributes:
        images: what the models must fit; mean and deviation are rough.
        x_BCHW: some images in [0, 1].
        y_B: their labels.
        nbytes: bytes of all splits as they are stored.
        mapped: they lie in a file that processes share.
        train, val, test: images of these splits; None where they are not known yet.
    """

    images: Images
    x_BCHW: Tensor
    y_B: Tensor
    nbytes: int = 0
    mapped: bool = False
    train: int | None = None
    val: int | None = None
    test: int | None = None


def rough(shape: tuple[int, int, int], classes: int) -> Images:
    """Images of that shape, normalised with 0.5 and 0.25."""
    return Images(shape, classes, (0.5,) * shape[0], (0.25,) * shape[0])


def check_data(config: Config) -> Answer[Sample]:
    """Read the data set as a run does, but download nothing and build no cache; take the batch of step 0.

    Raises what loading raises, and DataError for a batch outside [0, 1] or labels that do not fit.
    """
    wanted = config.data
    if wanted.name == "folder":
        preview = preview_folder(wanted, SHOWN)
        if preview is not None:
            shown, listing, cache = preview
            x_BCHW, classes = as_float(shown.images, DTYPES[config.step.precision]), len(listing.classes)
            sample = Sample(rough(shown.shape, classes), x_BCHW, shown.labels, cache.nbytes, mapped=True)
            _check_sample(sample, wanted)
            if wanted.generated is not None:
                generated_images(wanted.generated, shown.shape, classes)
            return Answer(sample, f"{listing.count} images of {classes} classes, {_size(shown.shape)}; "
                                  f"{len(x_BCHW)} of them decode; the run will build a cache of "
                                  f"{cache.nbytes / GIB:.1f} GiB in {cache.folder}")
    try:
        data = load_data(wanted.model_copy(update={"download": False}), seed=config.run.seed,
                         batch_size=config.train.batch_size)
    except DataError as error:
        noise = known_sample(config) if wanted.download else None
        if noise is None:
            raise
        return Answer(noise, f"not there yet: {error.what} ({error.where})",
                      "the run will download it, so its first rank needs a network")
    batches = training_batches(config, data, "cpu", DTYPES[config.step.precision])
    sample = Sample(rough(data.train.shape, len(data.classes)), *batches.at(0), mapped=data.train.mapped,
                    nbytes=sum(split.nbytes for split in (data.train, data.val, data.test)),
                    train=len(data.train), val=len(data.val), test=len(data.test))
    dark = _check_sample(sample, wanted)
    steps = min(batches.steps_per_epoch * config.train.replays * config.train.epochs, config.train.max_steps or 1 << 62)
    found = (f"{len(data.train)} + {len(data.val)} + {len(data.test)} images (training, validation, test) of "
             f"{len(data.classes)} classes, {_size(data.train.shape)}; {steps} steps")
    return Answer(sample, "; ".join([found, *data.notes]), dark)


def known_sample(config: Config) -> Sample | None:
    """Noise in the shape of a data set whose shape is known without reading it; None for others."""
    if config.data.name not in KNOWN_IMAGES:
        return None
    shape, classes, count = KNOWN_IMAGES[config.data.name]
    rows = min(SHOWN, config.train.batch_size)
    x_BCHW = rng.uniform(rng.key(config.run.seed, "check"), (rows, *shape), dtype=DTYPES[config.step.precision])
    return Sample(rough(shape, classes), x_BCHW, torch.arange(rows) % classes,
                  count * shape[0] * shape[1] * shape[2])


def _check_sample(sample: Sample, config: DataConfig) -> str:
    """A warning or nothing. Raises DataError where the images or labels do not fit."""
    x_BCHW, y_B, where = sample.x_BCHW, sample.y_B, f"data.name={config.name}, first batch"
    low, high = float(x_BCHW.min()), float(x_BCHW.max())
    if not bool(x_BCHW.isfinite().all()) or low < 0 or high > 1:
        raise DataError(f"pixels from {low:.4g} to {high:.4g}", where, "images must be finite and in [0, 1]")
    y_B = likeliest(y_B)
    if int(y_B.min()) < 0 or int(y_B.max()) >= sample.images.classes:
        raise DataError(f"labels from {int(y_B.min())} to {int(y_B.max())}", where,
                        f"labels count from 0 to {sample.images.classes - 1}")
    if high < DARK:
        return f"the brightest pixel of a batch is {high:.4f}: give bytes in 0 to 255, or floats in 0 to 1"
    return ""


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]} x {shape[2]} x {shape[0]}"
