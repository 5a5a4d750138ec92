"""TensorBoard, Weights & Biases, MLflow, trackio: the numbers of metrics.jsonl, and pictures of AEs, sent on by rank 0.

All are optional and imported on use. The files of the run folder stay the record: a tracker that fails while the run
goes on is left out with a warning.
"""

from __future__ import annotations

import importlib
import io
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from mat_dist.config.load import flat_settings
from mat_dist.config.schema import Config, LogConfig, parse_trackers
from mat_dist.errors import optional
from mat_dist.runs.files import reported, write_text
from mat_dist.runs.metrics import Callbacks, Picture, Reporter, RunReporter, Tracker
from mat_dist.runs.session import Run


class TensorBoard(Tracker):
    """Event files in `<run>/tensorboard/`."""

    name, help = "TensorBoard", "check the folder's permissions and the package, or leave tensorboard out"

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


class Service(Tracker):
    """A library with an entry for each run, whose id is kept in `<run>/<package>/`. A resumed run continues its entry,
    and what an earlier attempt sent stays: steps that are done again are not sent."""

    package, _newest = "", -1
    _run: Any = None

    def __init__(self, folder: Path, project: str, config: Config) -> None:
        self._folder, self._name, self._project, self._config = folder, folder.resolve().name, project, config
        self._library: Any = importlib.import_module(self.package)

    def _id(self, make: Callable[[], str] = lambda: secrets.token_hex(8)) -> str:
        file, records = self._folder / self.package / "mat_dist_id", self._folder / "metrics.jsonl"
        with reported(file):
            file.parent.mkdir(exist_ok=True)
            if file.exists():
                text = records.read_text() if records.exists() else ""
                self._newest = max(map(int, re.findall(r'^{.*?"step":(\d+)', text, re.MULTILINE)), default=-1)
                return file.read_text().strip()
        found = make()
        write_text(file, found + "\n")
        return found

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._newest:
            self._run.log(dict(values), step=step)

    def pictures(self, step: int, group: str, pictures: Sequence[Picture]) -> None:
        images = [self._library.Image(one.side_by_side().permute(1, 2, 0).numpy(), caption=one.caption)
                  for one in pictures]
        self._run.log({f"{group}/{number}": image for number, image in enumerate(images)}, step=step)

    def close(self) -> None:
        if self._run is not None:
            with redirect_stdout(io.StringIO()):  # the screen is ours
                self._library.finish()


class WandB(Service):
    """A run of a Weights & Biases project."""

    name, package, help = "W&B", "wandb", "run wandb login, set WANDB_MODE=offline, or leave wandb out"

    def start(self, first_step: int) -> None:
        self._run = self._library.init(project=self._project, name=self._name, id=self._id(), resume="allow",
                                       dir=str(self._folder), config=self._config.model_dump(mode="json"),
                                       settings=self._library.Settings(console="off"))  # the screen is ours


class Trackio(Service):
    """A run of a trackio project. It is found again by its name, to which an id is added, since folders share names."""

    name, package, help = "trackio", "trackio", "check the project's name and TRACKIO_SPACE_ID, or leave trackio out"

    def start(self, first_step: int) -> None:
        with redirect_stdout(io.StringIO()):  # the screen is ours
            self._run = self._library.init(project=self._project, name=f"{self._name}-{self._id()}", resume="allow",
                                           embed=False, config=self._config.model_dump(mode="json"))


class MLflow(Service):
    """A run of an MLflow experiment, at MLFLOW_TRACKING_URI. Its parameters are the settings by their keys."""

    name, package, help = "MLflow", "mlflow", "set MLFLOW_TRACKING_URI to a server that answers, or leave mlflow out"

    def start(self, first_step: int) -> None:
        self._client = self._library.MlflowClient()
        self._run = self._id(self._create)
        self._client.update_run(self._run, status="RUNNING")

    def _create(self) -> str:
        found = self._client.get_experiment_by_name(self._project)
        experiment = found.experiment_id if found else self._client.create_experiment(self._project)
        run: str = self._client.create_run(experiment, run_name=self._name).info.run_id
        settings, one = flat_settings(self._config).items(), self._library.entities.Param
        self._client.log_batch(run, params=[one(key, str(value)[:500]) for key, value in settings])
        return run

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step >= self._newest:
            now, one = int(time.time() * 1000), self._library.entities.Metric
            self._client.log_batch(self._run, [one(tag, value, now, step) for tag, value in values.items()])

    def pictures(self, step: int, group: str, pictures: Sequence[Picture]) -> None:
        for number, one in enumerate(pictures):
            image = one.side_by_side().permute(1, 2, 0).numpy()
            self._client.log_image(self._run, image, f"{group}/{step}/{number} {one.caption}.png")

    def close(self) -> None:
        if self._run is not None:
            self._client.set_terminated(self._run)


SERVICES = {kind.package: kind for kind in (WandB, MLflow, Trackio)}


def require_trackers(settings: LogConfig) -> None:
    """Raises EnvironmentFault where a tracker is asked for whose library cannot be imported."""
    for package in parse_trackers(settings.trackers):  # they have the names of their libraries
        command = {"tensorboard": "pip install 'mat_dist[logging]'"}.get(package, f"pip install {package}")
        optional(package, "log.trackers", f"{command}, or leave {package} out")


def open_reporter(run: Run, config: Config, callbacks: Callbacks | None = None) -> Reporter:
    """The reporter of a rank. Rank 0: files and console, the trackers of the section `log`, and a program's callbacks;
    others: none."""
    if not run.mesh.placement.is_lead:
        return Reporter()
    run.check_owner()
    folder = run.folder.path
    trackers = [TensorBoard(folder) if name == "tensorboard" else SERVICES[name](folder, told, config)
                for name, told in parse_trackers(config.log.trackers).items()]
    found = RunReporter(folder, trackers, console=config.log.console, attempt=run.attempt)
    found.callbacks = callbacks or {}
    return found
