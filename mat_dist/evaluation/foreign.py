"""A state dict becomes the folder of a run with one peer, which all commands then treat like any other run."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from traceback import print_exception
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist import checkpoints
from mat_dist.attacks.norms import Threat
from mat_dist.checkpoints.foreign import StateDict, fitted, read_state_dict
from mat_dist.cli import tell
from mat_dist.config import dump_config, with_absolute_paths
from mat_dist.config.rules import RESERVED_NAMES
from mat_dist.config.schema import Config, ThreatConfig
from mat_dist.data import DataSets, ImageSet, channel_stats, load_data
from mat_dist.distributed.agreement import Agreement
from mat_dist.distributed.groups import Mesh, device_name
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import CheckpointError, ConfigError, MatError, OutputError
from mat_dist.evaluation.attacks import correct
from mat_dist.evaluation.chunks import pixels
from mat_dist.evaluation.settings import Importing
from mat_dist.models.registry import Images, make_model
from mat_dist.runs.files import write_text
from mat_dist.runs.folder import RunFolder, create_or_open
from mat_dist.runs.lock import RunLock
from mat_dist.runs.record import write_environment, write_exit

STEP, ATTEMPT = 0, 1
CLEAN_IMAGES = 512  # are classified before anything is attacked
_BATCH = 128


@dataclass(frozen=True)
class Imported:
    """A file's weights in our model, and what identifies them."""

    name: str
    model: nn.Module
    images: Images
    identity: dict[str, Any]
    notes: tuple[str, ...]


def import_files(files: list[Path], config: Config, importing: Importing, threats: tuple[Threat, ...], split: str,
                 command: list[str], mesh: Mesh, launch: Launch, stop: StopFlag) -> list[RunFolder]:
    """The run folders of some files, on all ranks; made by rank 0 where they are not there yet.

    Args:
        config: of the new runs, see `Importing.config`.
        threats: the first one becomes the peer's threat, for which there is no training to ask.
        split: whose images are classified, to say how good the model is without an attack.
        command: for environment.json.

    Raises, on all ranks with one text: CheckpointError for a file that cannot be read or does not fit, ConfigError,
    DataError, OutputError for a folder that holds something else.
    """
    agree = Agreement(mesh, "reading a checkpoint")
    data = agree.run("data", load_data, config.data, seed=config.run.seed, batch_size=config.train.batch_size,
                     build_cache=launch.local_rank == 0, stop=stop)
    agree.sync("data")
    paths: list[str] = []
    if mesh.placement.is_lead:
        config = _with_threat(config, threats)
        for file in files:
            folder = agree.run(f"reading {file.name}", _import_file, file, config, importing, data,
                               getattr(data, split), command, mesh.device)
            paths.append(str(folder.path) if folder else "")
    if agree.failure is not None and not isinstance(agree.failure, MatError):
        print_exception(agree.failure)  # a bug of ours; there may be no run folder yet with a log to look into
    agree.sync("import")
    return [RunFolder(Path(path)) for path in mesh.from_lead(paths)]


def _with_threat(config: Config, threats: tuple[Threat, ...]) -> Config:
    threat = ThreatConfig.model_validate({"norm": threats[0].norm, "eps": threats[0].eps})
    return config.model_copy(update={"peers": (config.peers[0].model_copy(update={"threat": threat}),)})


def _import_file(file: Path, config: Config, importing: Importing, data: DataSets, shown: ImageSet,
                 command: list[str], device: torch.device) -> RunFolder:
    found = read(file, config, importing, data)
    for note in found.notes:
        tell(f"{file.name}: {note}")
    tell_accuracy(found.model.to(device), shown, len(data.classes), config, device)
    name = found.name[:31]
    peer = config.peers[0].model_copy(update={"name": f"{name[:25]}-model" if name in RESERVED_NAMES else name})
    folder = write_run(found, config.model_copy(update={"peers": (peer,)}), data,
                       importing.options.out if file == importing.subject else None, command, device)
    tell(f"{file.name}: run folder {folder.path}")
    return folder


def read(file: Path, config: Config, importing: Importing, data: DataSets) -> Imported:
    """The model with the file's weights. Raises CheckpointError, ConfigError."""
    state = read_state_dict(file)
    mean, std, told = normalisation(state, importing, data)
    images = Images(data.train.shape, len(data.classes), mean, std)
    spec = config.peers[0]
    model = make_model(spec, images, seed=config.run.seed, step=config.step, device=torch.device("cpu"))
    tensors, how = fitted(state, model.get_submodule("net"), channels=images.shape[0], classes=images.classes)
    model.load_state_dict({f"net.{key}": value for key, value in tensors.items()}
                          | {key: value for key, value in model.state_dict().items() if not key.startswith("net.")})
    model.eval().requires_grad_(False)
    sizes = {"name", "image_size", "train_size", "val_size", "test_size"}
    identity = {"sha256": state.sha256, "model": spec.model.model_dump(mode="json"), "seed": config.run.seed,
                "data_digest": data.digest, "mean": list(mean), "std": list(std),
                "data": config.data.model_dump(mode="json", include=sizes), "precision": config.step.precision}
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).lstrip("._-")[:40] or "model"
    return Imported(stem, model, images, identity, (*state.notes, f"weights {how}", told))


def normalisation(state: StateDict, importing: Importing,
                  data: DataSets) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """(mean, std, in words): the file's own, or those of the command line. Raises ConfigError where there are none."""
    options, channels = importing.options, data.train.shape[0]
    if state.mean is not None and state.std is not None:
        if options.mean is not None or options.normalise is not None:
            raise ConfigError("the file has a normalisation of its own", str(state.file),
                              "leave mean, std and normalise out")
        found = state.mean, state.std, "of the file"
    elif options.mean is not None and options.std is not None:
        found = options.mean, options.std, "as given"
    elif options.normalise == "data":
        found = *channel_stats(data.train), "of the training images"
    elif options.normalise == "none":
        found = (0.0,) * channels, (1.0,) * channels, "none"
    else:
        raise ConfigError("a state dict does not tell how images were normalised", "mean, std",
                          "write mean=0.4914,0.4822,0.4465 std=0.2471,0.2435,0.2616 (those of its training), or "
                          "normalise=data for this data set's own, or normalise=none")
    if not len(found[0]) == len(found[1]) == channels:
        raise ConfigError(f"mean has {len(found[0])} and std {len(found[1])} values, the images {channels} channels",
                          "mean, std", "give one mean and one std per channel")
    shown = ["/".join(f"{value:.4g}" for value in values) for values in found[:2]]
    return found[0], found[1], f"normalisation {found[2]}: mean {shown[0]}, std {shown[1]}"


def tell_accuracy(model: nn.Module, images: ImageSet, classes: int, config: Config, device: torch.device) -> None:
    """Say how many of the first images are right without an attack, and if that is no better than guessing."""
    n = min(CLEAN_IMAGES, len(images))
    right = 0
    for rows in torch.arange(n).split(_BATCH):
        x_BCHW, y_B = pixels(images, rows, device, config)
        right += int(correct(model, x_BCHW, y_B).sum())
    tell(f"clean accuracy on the first {n} images: {100 * right / n:.1f} %")
    chance = 1 / classes
    if right / n <= chance + 2 * (chance * (1 - chance) / n) ** 0.5:
        tell(f"hint: that is no better than chance ({100 * chance:.3g} %): another mean and std, another order of the "
             "classes, or another architecture with the same shapes?")


# ------------------------------------------------------------------------------------------------ the folder


def write_run(found: Imported, config: Config, data: DataSets, out: str | None, command: list[str],
              device: torch.device) -> RunFolder:
    """Make the run folder, or find it: the same file with the same settings has the same one.

    config.yaml comes last: a folder without it is no run, and is completed by the next call.

    Raises OutputError for a folder that holds something else.
    """
    digest = checkpoints.json_digest(found.identity)
    root, name = (config.run.root, f"{found.name}-{digest[:12]}") if out is None else (Path(out).parent, Path(out).name)
    folder = create_or_open(root, name, config_name=found.name, resume="auto", job_id=None, now=datetime.now(UTC))
    with RunLock(folder, None):
        if not _is_there(folder, digest):
            meta = checkpoints.Meta(epoch=0, peers=(str(config.peers[0].name),), config_digest=digest,
                                   data_digest=data.digest, extra={
                "classes": list(data.classes), "imported": found.identity,
                "images": asdict(found.images)})
            partial = checkpoints.begin(folder, STEP, ATTEMPT)
            state: dict[str, Tensor] = found.model.state_dict()
            entry = checkpoints.save_peer(partial, 0, {"name": config.peers[0].name, "model": state, "ema": None})
            checkpoints.commit(folder, STEP, ATTEMPT, [entry], meta)
        if not folder.config.exists():
            write_environment(folder, attempt=ATTEMPT, argv=command, devices=[device_name(device)],
                              seed=config.run.seed, placement={"peers": 1, "ranks": 1}, job_id=None)
            write_exit(folder, ATTEMPT, None, "done")
            write_text(folder.config, dump_config(with_absolute_paths(config)))
    return folder


def _is_there(folder: RunFolder, digest: str) -> bool:
    """Whether the folder has these weights already. Raises OutputError where it has anything else."""
    try:
        manifest = checkpoints.load_manifest(folder, "latest")
    except CheckpointError as error:
        if folder.config.exists() or folder.environment.exists():
            raise OutputError(f"the folder holds another run: {error.what}", str(folder.path),
                              "choose another out=FOLDER") from error
        return False
    if manifest.meta.config_digest != digest:
        raise OutputError("the folder holds another run, or this file read in another way", str(folder.path),
                          "choose another out=FOLDER")
    return True
