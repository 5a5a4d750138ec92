"""`mat_dist.evaluate`: the whole evaluator on any model."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn

from mat_dist.api.inputs import TRIED, Threats, asked, borrowed, checked_images, checked_labels, home
from mat_dist.api.run import frame, result_rows
from mat_dist.config.schema import Config
from mat_dist.data import ImageSet, load_data
from mat_dist.distributed.groups import Mesh, device_name, prepared_torch
from mat_dist.distributed.placement import Placement
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import DataError
from mat_dist.evaluation.attacks import Target
from mat_dist.evaluation.chunks import Work, pixels, run_chunks
from mat_dist.evaluation.command import as_table, asked_images, attacks_table, check_package
from mat_dist.evaluation.results import FORMAT, Result, as_result
from mat_dist.evaluation.survivors import Chunks, about_job, document_of, image_rows
from mat_dist.evaluation.targets import make_job
from mat_dist.models.registry import try_images
from mat_dist.runs.console import choose_screen, show_table
from mat_dist.runs.files import reported
from mat_dist.runs.record import versions

if TYPE_CHECKING:
    from pandas import DataFrame

RAW = "raw"


@dataclass(frozen=True)
class Results:
    """What an evaluation found: for each chunk of images, image by image, and as a result file has it. `print` shows
    its tables."""

    chunks: Chunks
    result: Result

    @property
    def accuracy(self) -> dict[str, float]:
        """Shares in [0, 1]: clean, under each threat (the worst attack counts), and under all threats (union)."""
        return self.result.targets[0].accuracy

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that were not passed."""
        return self.result.targets[0].failed

    @property
    def reportable(self) -> bool:
        """Whether all checks were made and passed."""
        return not self.failed

    def __str__(self) -> str:
        text = io.StringIO()
        for table in (attacks_table(self.result.targets), as_table("Accuracy under all attacks", self.result.targets)):
            show_table(table, Console(file=text))
        return text.getvalue()

    def to_json(self, path: str | Path | None = None) -> str:
        """The text of a result file, also written to a new file. Raises OutputError where that cannot be."""
        text = json.dumps(self.result.document, indent=1) + "\n"
        if path is not None:
            with reported(Path(path)), open(path, "x", encoding="utf-8") as file:
                file.write(text)
        return text

    def to_pandas(self, images: bool = False) -> DataFrame:
        """A row for each accuracy; with `images` one for each image, threat and attack. Raises EnvironmentFault without
        pandas."""
        rows = csv.DictReader(io.StringIO(image_rows({RAW: self.chunks}))) if images else result_rows(self.result)
        return frame(list(rows))


def evaluate(model: nn.Module, images: Tensor | str | Iterable[Any], labels: Tensor | None = None, *,
             threats: Threats = "linf:8/255", attacks: str | Sequence[str] = ("pgd", "cw", "autoattack"),
             size: int | None = None, name: str = "model", **settings: Any) -> Results:
    """Attack a model as `python -m mat_dist.evaluate` does, with its soundness checks, in this process.

    Args:
        model: as for `mat_dist.attack`.
        images: float images (N, C, H, W) in [0, 1]; or batches of (images, labels), such as those of a DataLoader; or
            the name of a data set, whose `split` counts.
        labels: (N,), 0 to K - 1, beside images.
        threats, attacks: one or several; the worst counts per image.
        size: a random subset of so many images, the same in every call.
        name: of the model, in the results.
        settings: mean, std, steps, restarts, seed, checks, data={"root": ...}, ... of that command.

    Raises as `mat_dist.attack`.
    """
    data = {"data.name": images} if isinstance(images, str) else {}
    precision = home(model)[1] if isinstance(model, nn.Module) else torch.float32
    request, config, options = asked(threats, attacks, precision, {"images": size, **data, **settings})
    with prepared_torch(config):
        split, labels = _given(images, labels, config, request.split)
        with borrowed(model, options, split.shape[0]) as lent:
            device = home(lent)[0] or split.device
            samples_N = asked_images(request, split)
            classes = try_images(lent, pixels(split, samples_N[:TRIED], device, config)[0], "model").shape[1]
            split = replace(split, labels=checked_labels(labels, len(split), classes).to(split.device))
            job = make_job(request, config)
            check_package(job, classes, config)
            work = Work(config, job, [Target(name, lent, (lent,))], split, samples_N, f"evaluation of {name}",
                        checked=-(-request.checks // config.eval.chunk))
            with closing(choose_screen("auto")) as screen:
                screen.start(0, (), 0)
                chunks = run_chunks(work, Mesh(Placement.place(1, 1, 0), device), StopFlag(), screen)
    about = about_job(job, config.eval.chunk) | {
        "format": FORMAT, "run": name, "step": 0, "split": request.split if data else "given", "files": {},
        "device": device_name(device), "versions": versions(), "config": config.model_dump(mode="json")}
    return Results(chunks, as_result(document_of(about, {RAW: chunks}, checked=True)))


def _given(images: Any, labels: Any, config: Config, split: str) -> tuple[ImageSet, Any]:
    """The images, and labels that may still be anything. Raises DataError."""
    if isinstance(images, str):
        if labels is not None:
            raise DataError(f"labels beside the data set {images}", "labels", "leave them out: it has its own")
        found = getattr(load_data(config.data, seed=config.run.seed, batch_size=config.train.batch_size), split)
        return found, found.labels
    if labels is None and not isinstance(images, Tensor):
        try:
            pairs = [(torch.as_tensor(batch[0]), torch.as_tensor(batch[1])) for batch in images]
            images, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
            raise DataError(f"no batches of (images, labels): {type(error).__name__}: {error}", "images",
                            "give tensors (images, labels), a DataLoader, or the name of a data set") from error
    if labels is None:
        raise DataError("there are no labels", "labels", "give them beside the images")
    images = checked_images(images)
    return ImageSet(images, images.new_zeros(len(images), dtype=torch.int64)), labels
