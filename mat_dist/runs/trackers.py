"""TensorBoard and Weights & Biases: the numbers of metrics.jsonl, and pictures of AEs, sent on by rank 0.

Both are optional and imported on use. The files of the run folder stay the record: a tracker that fails while the run
goes on is left out with a warning.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mat_dist.runs.files import reported, write_text
from mat_dist.config.schema import LogConfig
from mat_dist.errors import EnvironmentFault

SIDE = 96  # smaller pictures are enlarged by a whole factor to about this many pixels
PER_RANK = frozenset({"phases_s", "wait_share"})  # lists with an entry per rank; all others are per peer
NO_SERIES = frozenset({"step", "attempt"})


@dataclass(frozen=True)
class Picture:
    """A clean image, a perturbation as an image (grey: no change), and the AE; (C, H, W) in [0, 1], and in words."""

    clean: Tensor
    perturbation: Tensor
    adversarial: Tensor
    caption: str

    def side_by_side(self) -> Tensor:
        """The three in a row -> uint8 (1 or 3, H, 3 W), enlarged."""
        row = torch.cat([self.clean, self.perturbation, self.adversarial], dim=2)
        image_CHW = row.detach().to("cpu", torch.float32)
        if len(image_CHW) not in (1, 3):
            image_CHW = image_CHW.mean(0, keepdim=True)
        factor = max(round(SIDE / max(self.clean.shape[1:])), 1)
        levels = (image_CHW.clamp(0, 1) * 255).round().to(torch.uint8)
        return levels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


class Tracker(Protocol):
    """Where numbers go besides the run folder."""

    name: str

    def start(self, first_step: int) -> None:
        """Begin after `first_step` steps: what an earlier attempt sent of later ones does not count."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name."""

    def pictures(self, step: int, group: str, pictures: Sequence[Picture]) -> None:
        """Pictures of one evaluation."""

    def close(self) -> None:
        """Everything is out. May be called without `start`."""


class TensorBoard:
    """Event files in `<run>/tensorboard/`."""

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writer: Any = None

    def start(self, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Points of later steps that an earlier attempt wrote are left out by readers.
        self._writer = SummaryWriter(str(self._folder), purge_step=first_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def pictures(self, step: int, group: str, pictures: Sequence[Picture]) -> None:
        for number, one in enumerate(pictures):
            self._writer.add_image(f"{group}/{number}", one.side_by_side().numpy(), step)
        self._writer.add_text(group, "\n".join(f"{number}. {one.caption}" for number, one in enumerate(pictures)), step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB:
    """A run of a Weights & Biases project, continued by a resumed run: its id is kept in `<run>/wandb/`."""

    name = "W&B"

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        self._folder, self._project, self._settings = folder, project, settings
        self._library: Any = None
        self._run: Any = None

    def start(self, first_step: int) -> None:
        self._library = importlib.import_module("wandb")
        try:
            # Steps that an earlier attempt sent are not taken again: a W&B run only goes forward.
            self._run = self._library.init(project=self._project, name=self._folder.resolve().name, id=self._id(),
                                           resume="allow", dir=str(self._folder), config=dict(self._settings),
                                           settings=self._library.Settings(console="off"))  # the screen is ours
        except Exception as error:  # not logged in, no network, no such project: all types of the library's own
            raise EnvironmentFault(f"W&B cannot begin: {error}", f"log.wandb={self._project}",
                                   "run wandb login, set WANDB_MODE=offline, or log.wandb=null") from error

    def _id(self) -> str:
        file = self._folder / "wandb" / "mat_dist_id"
        with reported(file):
            file.parent.mkdir(exist_ok=True)
            if file.exists():
                return file.read_text().strip()
        found = secrets.token_hex(8)
        write_text(file, found + "\n")
        return found

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def pictures(self, step: int, group: str, pictures: Sequence[Picture]) -> None:
        images = [self._library.Image(one.side_by_side().permute(1, 2, 0).numpy(), caption=one.caption)
                  for one in pictures]
        self._run.log({group: images}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def require_trackers(settings: LogConfig) -> None:
    """Raises EnvironmentFault where a tracker is asked for whose library cannot be imported."""
    for asked, setting, package, command in (
            (settings.tensorboard, "log.tensorboard", "tensorboard", "pip install 'mat_dist[logging]'"),
            (settings.wandb is not None, "log.wandb", "wandb", "pip install wandb")):
        if asked:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise EnvironmentFault(f"the package {package} cannot be imported: {error}", setting,
                                       f"{command}, or leave {setting} out") from None


def choose_trackers(folder: Path, settings: LogConfig, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers that are asked for. `config`: what W&B shows of the run's settings."""
    found: list[Tracker] = [TensorBoard(folder)] if settings.tensorboard else []
    return found + ([WandB(folder, settings.wandb, config)] if settings.wandb is not None else [])


def series(record: Mapping[str, Any], peers: Sequence[str]) -> dict[str, float]:
    """The numbers of a record by name: `loss/<peer>`, `transfer/<peer>/<source>`, `phases_s/rank0/attack`, ...

    What is no number (None where nothing was measured) is left out.
    """
    return {tag: value for key, content in record.items() if key not in NO_SERIES
            for tag, value in _numbers(key, content, peers, key in PER_RANK)}


def _numbers(tag: str, value: Any, peers: Sequence[str], per_rank: bool) -> Iterator[tuple[str, float]]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield tag, float(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(f"{tag}/{key}", item, peers, per_rank)
    elif isinstance(value, (list, tuple)):
        names = [f"rank{index}" for index in range(len(value))] if per_rank else [*peers, "clean"]
        for index, item in enumerate(value):  # a row of the transfer table ends with the clean accuracy
            yield from _numbers(f"{tag}/{names[index] if index < len(names) else index}", item, peers, per_rank)
