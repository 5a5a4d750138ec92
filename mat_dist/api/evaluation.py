"""`mat_dist.attack` and `mat_dist.evaluate`: adversarial examples of any model, and the whole evaluator on it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mat_dist import rng
from mat_dist.api.run import frame, result_rows
from mat_dist.attacks.norms import Threat
from mat_dist.config.load import of_a_call, setting_words
from mat_dist.config.schema import Config
from mat_dist.data import ImageSet, load_data
from mat_dist.data.arrays import check_labels
from mat_dist.data.load import check_range
from mat_dist.distributed.arithmetic import without_autocast
from mat_dist.distributed.groups import Mesh, device_name, prepared_torch
from mat_dist.distributed.placement import Placement
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import ConfigError, DataError, EnvironmentFault, OutputError
from mat_dist.evaluation.attacks import Target, attack_one
from mat_dist.evaluation.chunks import Work, pixels, run_chunks
from mat_dist.evaluation.command import as_table, asked_images, attacks_table, check_package
from mat_dist.evaluation.results import FORMAT, Result, as_result
from mat_dist.evaluation.settings import SEARCH, SQUARE, FileOptions, Request, one_peer, parse
from mat_dist.evaluation.survivors import Chunks, about_job, document_of, image_rows
from mat_dist.evaluation.targets import make_job
from mat_dist.models.modes import frozen, spared_buffers
from mat_dist.models.registry import Normalize, check_moments, try_images
from mat_dist.runs.console import choose_screen, show_table
from mat_dist.runs.record import versions

if TYPE_CHECKING:
    from pandas import DataFrame

RAW = "raw"
TRIED = 8  # images that a model is shown before it is attacked
OF_RUNS = ("targets", "weights", "checkpoint", "save", "entry", "clean", "confirmed", "normalise", "out", "sources")
NEEDLESS = ("images", "split", "checks", "transfer", "threats", "attacks")  # for an attack alone
Threats = str | Threat | Sequence[str | Threat]


def attack(model: nn.Module, x: Tensor, y: Tensor, threat: str | Threat = "linf:8/255", method: str = "pgd", *,
           steps: int | None = None, restarts: int | None = None, **settings: Any) -> Tensor:
    """Adversarial examples of a batch -> (B, C, H, W), in [0, 1] and in the ball, of x's type and device.

    Args:
        model: any module over images in [0, 1] -> raw logits (B, K), over normalised ones with `mean` and `std`;
            attacked in eval mode, and left as it was.
        x, y: images (B, C, H, W), float32 or float64 in [0, 1], and labels (B,), 0 to K - 1.
        threat, method: norm:radius or a `Threat`, and an attack of `python -m mat_dist.evaluate --help`.
        steps, restarts: of restarts the first one counts that the model gets wrong, image by image.
        settings: mean, std (a value per channel), step_size, seed, queries, ... of that command.

    Raises ConfigError, DataError, EnvironmentFault for what cannot be used; NotReportable for a model without gradient.
    """
    x_BCHW = checked_images(x, "x")
    request, config, options = asked(threat, method, x_BCHW.dtype, {"steps": steps, "restarts": restarts, **settings},
                                     NEEDLESS)
    job = make_job(request, config)
    if len(job.threats) != 1 or len(job.attacks) != 1:
        raise ConfigError(f"{len(job.threats)} threats and {len(job.attacks)} methods", "threat, method",
                          "give one of each; mat_dist.evaluate takes several")
    with borrowed(model, options, x_BCHW.shape[1]) as lent:
        device = home(lent)[0] or x_BCHW.device
        if device != x_BCHW.device:
            raise EnvironmentFault(f"the model is on {device}, the images are on {x_BCHW.device}", "model, x",
                                   f"write model.to({str(x_BCHW.device)!r}) or x.to({str(device)!r})")
        x_BCHW = x_BCHW.clone()  # which an inference mode around this call has not seen
        classes = try_images(lent, x_BCHW[:TRIED], "model").shape[1]
        y_B = checked_labels(y, len(x_BCHW), classes, "y").to(device)
        check_package(job, classes, config)
        (name,) = job.attacks
        searches = name in (SEARCH, SQUARE)
        found = attack_one(Target("model", lent, () if searches else (lent,)), x_BCHW, y_B, y_B, job.threats[0], job, 0)
    return found.advs[name].detach()


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
            try:
                with open(path, "x", encoding="utf-8") as file:
                    file.write(text)
            except OSError as error:
                raise OutputError(f"cannot write: {error.strerror or error}", str(path),
                                  "give the path of a new file in a folder that is there") from error
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


# ------------------------------------------------------------------------------------------------ what is handed over


def asked(threats: Threats, attacks: str | Sequence[str], precision: torch.dtype,
          settings: Mapping[str, Any], needless: Sequence[str] = ()) -> tuple[Request, Config, FileOptions]:
    """The settings as the command reads them for a file of weights, whose place the model takes. Raises ConfigError,
    also for those of runs and the `needless` ones."""
    for key in settings.keys() & {*OF_RUNS, *needless}:
        raise ConfigError(f"{key} has no effect here", key, "leave it out")
    own = {"threats": _listed(threats), "attacks": _listed(attacks),
           **{key: value for key, value in settings.items() if value is not None}}
    with of_a_call():
        found = parse(["model.pt", *setting_words(own)])
        assert found.importing is not None
        words = [*found.settings, *found.importing.settings, *(["step.precision=fp64"] * (precision == torch.float64))]
        return found.request, one_peer(*words), found.importing.options


def _listed(values: Any) -> str:
    """One or several names or threats as on the command line."""
    several = values if isinstance(values, (list, tuple)) else [values]
    return ",".join(f"{one.norm}:{one.eps!r}" if isinstance(one, Threat) else str(one) for one in several)


def checked_images(images: Any, where: str = "images") -> Tensor:
    """Float images (B, C, H, W) in [0, 1]. Raises DataError for anything else."""
    if not isinstance(images, Tensor) or images.ndim != 4 or 0 in images.shape or images.is_meta or images.is_sparse:
        found = f"{images.device}, shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise DataError(f"images are of {found}", where, "give a dense tensor (B, C, H, W) with at least one image")
    if images.dtype not in (torch.float32, torch.float64):
        how = "images.float()" if images.is_floating_point() else "images.float() / 255 for bytes"
        raise DataError(f"images are {images.dtype}", where, f"give float32 or float64 in [0, 1]: {how}")
    images = images.detach()
    check_range(images, where, "give images in [0, 1]; a model for normalised ones takes mean=, std= beside it")
    return images.clamp(0, 1)


def checked_labels(labels: Any, count: int, classes: int, where: str = "labels") -> Tensor:
    """Labels 0 to classes - 1 as int64 (B,). Raises DataError for anything else."""
    try:
        labels_B = torch.as_tensor(labels).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"labels are no numbers: {error}", where, "give one class per image, int64 (B,)") from error
    if labels_B.is_floating_point():
        labels_B = labels_B.double()  # numpy has no bfloat16
    if labels_B.ndim != 1 or labels_B.dtype == torch.bool:
        raise DataError(f"labels are {labels_B.dtype} of shape {tuple(labels_B.shape)}", where,
                        "give one class per image, int64 (B,); of one-hot rows y.argmax(1)")
    return check_labels(labels_B.numpy(), count, classes, where)[0]


@contextmanager
def borrowed(model: nn.Module, options: FileOptions, channels: int) -> Iterator[nn.Module]:
    """The model over images in [0, 1], in eval mode. Afterwards it is as it was: the mode of each module, gradients and
    who needs them, buffers; and so are the global generators, which it may draw from. Raises ConfigError."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model is {type(model).__name__}", "model", "give a torch.nn.Module")
    device, dtype = home(model)
    normalise = []
    if options.mean is not None and options.std is not None:
        check_moments(channels, options.mean, options.std)
        normalise = [Normalize(options.mean, options.std).to(device, dtype)]
    with (torch.inference_mode(False), torch.enable_grad(), without_autocast(), frozen(model), spared_buffers(model),
          rng.keyed_rng(0)):
        yield nn.Sequential(*normalise, model).eval() if normalise else model


def home(model: nn.Module) -> tuple[torch.device | None, torch.dtype]:
    """Where a model's weights are, None without any, and their type. Raises EnvironmentFault."""
    values = [value for value in chain(model.parameters(), model.buffers()) if not is_lazy(value)]
    devices = {value.device for value in values}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise EnvironmentFault(f"the model's weights are on {', '.join(sorted(map(str, devices)))}", "model",
                               "put all of it on one device, with model.to(device)")
    if any(value.is_inference() for value in values):
        raise ConfigError("the model was made in inference mode, where nothing has a gradient", "model",
                          "make it, or load its weights, outside of torch.inference_mode()")
    floats = [value.dtype for value in values if value.is_floating_point()]
    return next(iter(devices), None), floats[0] if floats else torch.float32
