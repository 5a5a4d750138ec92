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
from mat_dist.checkpoints.foreign import Network, find_network, moments_text, read_tensors
from mat_dist.checkpoints.load import FinishedRun
from mat_dist.cli import tell
from mat_dist.config import dump_config, with_absolute_paths
from mat_dist.config.rules import RESERVED_NAMES
from mat_dist.config.schema import Config, ThreatConfig
from mat_dist.data import DataSets, ImageSet, channel_stats, load_data
from mat_dist.data.shared import Voice
from mat_dist.distributed.agreement import Agreement
from mat_dist.distributed.groups import Mesh, device_name
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import CheckpointError, ConfigError, MatError, OutputError
from mat_dist.evaluation.attacks import correct
from mat_dist.evaluation.chunks import pixels
from mat_dist.evaluation.results import AS_TRAINED, Verdict
from mat_dist.evaluation.settings import FileOptions, Importing
from mat_dist.models.registry import DTYPES, Images, Normalize, make_model, of_plugins
from mat_dist.runs.files import write_json, write_text
from mat_dist.runs.folder import RunFolder, create_or_open
from mat_dist.runs.lock import RunLock
from mat_dist.runs.record import write_environment, write_exit

STEP, ATTEMPT = 0, 1
CONFIRMED = "confirmed.json"  # in the run folder of a file: how it is known that its network is the trained one
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
        threat = ThreatConfig.model_validate({"norm": threats[0].norm, "eps": threats[0].eps})
        config = config.model_copy(update={"peers": (config.peers[0].model_copy(update={"threat": threat}),)})
        for note in data.notes:
            tell(note)
        for file in files:
            folder = agree.run(f"reading {file.name}", _import_file, file, config, importing, data,
                               getattr(data, split), command, mesh.device)
            paths.append(str(folder.path) if folder else "")
    if agree.failure is not None and not isinstance(agree.failure, MatError):
        print_exception(agree.failure)  # a bug of ours; there may be no run folder yet with a log to look into
    agree.sync("import")
    return [RunFolder(Path(path)) for path in mesh.from_lead(paths)]


def _import_file(file: Path, config: Config, importing: Importing, data: DataSets, shown: ImageSet,
                 command: list[str], device: torch.device) -> RunFolder:
    found = read(file, config, importing, data)
    for note in found.notes:
        tell(f"{file.name}: {note}")
    options = importing.options if file == importing.subject else FileOptions()
    confirmed = check_accuracy(found.model.to(device), shown, len(data.classes), config, device, options)
    name = found.name[:31]
    peer = config.peers[0].model_copy(update={"name": f"{name[:25]}-model" if name in RESERVED_NAMES else name})
    folder = write_run(found, config.model_copy(update={"peers": (peer,)}), data,
                       options.out, command, device)
    if confirmed:
        write_json(folder.path / CONFIRMED, confirmed)
    tell(f"{file.name}: run folder {folder.path}")
    return folder


def read(file: Path, config: Config, importing: Importing, data: DataSets) -> Imported:
    """The model with the file's weights. Raises CheckpointError, ConfigError."""
    shape, classes, spec = data.train.shape, len(data.classes), config.peers[0]
    plain = Images(shape, classes, (0.0,) * shape[0], (1.0,) * shape[0])
    model = make_model(spec, plain, seed=config.run.seed, step=config.step, device=torch.device("cpu"))
    net = model.get_submodule("net")
    entry = importing.options.entry if file == importing.subject else None
    network = find_network(read_tensors(file), net, channels=shape[0], classes=classes, entry=entry)
    net.load_state_dict(network.state(net))
    mean, std, told = normalisation(network, importing, data)
    model.add_module("normalize", Normalize(mean, std).to(DTYPES[config.step.precision]))
    model.eval().requires_grad_(False)
    sizes = {"name", "image_size", "train_size", "val_size", "test_size"}
    identity = {"sha256": network.source.sha256, "model": spec.model.model_dump(mode="json"), "seed": config.run.seed,
                "data_digest": data.digest, "mean": list(mean), "std": list(std), "network": network.label,
                "data": config.data.model_dump(mode="json", include=sizes), "precision": config.step.precision,
                **of_plugins([spec])}
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).lstrip("._-")[:40] or "model"
    return Imported(stem, model, Images(shape, classes, mean, std), identity, (*network.notes, told))


def normalisation(network: Network, importing: Importing,
                  data: DataSets) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """(mean, std, in words): the file's own, or those of the command line. Raises ConfigError where there are none."""
    options, channels, file = importing.options, data.train.shape[0], str(network.source.file)
    if options.mean is not None and options.std is not None:
        mean, std, by = options.mean, options.std, "as given"
    elif own := network.normalisation(channels, "give mean=... and std=... of the network that is meant; divide those "
                                      "for bytes by 255"):
        name, mean, std = own
        by = network.origin(own)
        if options.normalise is not None:
            raise ConfigError(f"the {'file' if name else 'architecture'} has a normalisation of its own{name and ', '}"
                              f"{name}", file, "leave normalise out; mean=... and std=... overrule it")
    elif options.normalise == "data":
        (mean, std), by = channel_stats(data.train), "of the training images"
    elif options.normalise == "none":
        mean, std, by = (0.0,) * channels, (1.0,) * channels, "none"
    else:
        raise ConfigError("the file does not tell how images were normalised", file,
                          "write mean=0.4914,0.4822,0.4465 std=0.2471,0.2435,0.2616 (those of its training), or "
                          "normalise=data for this data set's own, or normalise=none")
    if not len(mean) == len(std) == channels:
        raise ConfigError(f"mean has {len(mean)} and std {len(std)} values, the images {channels} channels",
                          "mean, std", "give one mean and one std per channel")
    shown = moments_text(mean, std)
    others = [f"; the file has {name}: {text}" for name, *own in network.normalisations(channels)
              if (text := moments_text(*own)) != shown]
    return mean, std, f"normalisation {by}: {shown}{''.join(others)}"


def assumed(model: nn.Module) -> str:
    """What no file of weights tells, as this model has it, in words."""
    plain = [one for one in model.modules() if not list(one.children())]
    acts = dict.fromkeys(type(one).__name__ for one in plain if type(one).__module__ == "torch.nn.modules.activation")
    eps = dict.fromkeys(f"{type(one).__name__} with eps {one.eps:g}" for one in plain if isinstance(
        getattr(one, "eps", None), float))
    return ", ".join([*acts, *eps, "strides, padding and shortcuts of the architecture"])


def unconfirmed(run: FinishedRun, model: nn.Module) -> list[Verdict]:
    """The verdict on the network of a file that nobody has confirmed, or of a plug-in that is not the one of the
    training; none where the network is known."""
    if "imported" not in run.manifest.meta.extra:
        return [Verdict(AS_TRAINED, "", False, told) for told in [run.other_network] if told]
    if (run.folder.path / CONFIRMED).is_file():
        return []
    return [Verdict(AS_TRAINED, "", False, f"a file of weights does not tell its network; assumed: {assumed(model)}. "
                    "Evaluate the file with clean=ACCURACY, one that you know for these weights, or confirmed=true")]


def check_accuracy(model: nn.Module, images: ImageSet, classes: int, config: Config, device: torch.device,
                   options: FileOptions) -> dict[str, Any] | None:
    """Say how many images are right without an attack, and if that is no better than guessing.

    Returns what confirms that the network computes what the weights were trained for; None where nothing does. Raises
    CheckpointError where it does not reach the accuracy that the user knows.
    """
    n = len(images) if options.clean is not None else min(CLEAN_IMAGES, len(images))
    right, voice = 0, Voice(speaks=True)
    for rows in torch.arange(n).split(_BATCH):
        x_BCHW, y_B = pixels(images, rows, device, config)
        right += int(correct(model, x_BCHW, y_B).sum())
        voice.tell(f"clean accuracy: {int(rows[-1]) + 1} of {n} images")
    tell(f"clean accuracy on the first {n} images: {100 * right / n:.1f} %")
    chance = 1 / classes
    if right / n <= chance + 2 * (chance * (1 - chance) / n) ** 0.5:
        tell(f"hint: that is no better than chance ({100 * chance:.3g} %): another mean and std, another order of the "
             "classes, or another architecture with the same shapes?")
    known = options.clean
    if known is None:
        return {"by": "the user"} if options.confirmed else None
    # Half a unit of its last digit, five images of 10,000 for other arithmetic, and chance for a subset of the images.
    spread = 2 * (known.share * (1 - known.share) / n) ** 0.5 if config.data.test_size else 0
    if abs(right / n - known.share) > known.rounding + 0.0005 + spread:
        raise CheckpointError(
            f"{100 * right / n:.2f} % of the {n} images are right without an attack, clean says {100 * known.share:g} "
            f"%: the network computes something else than the one that was trained ({assumed(model)})", "clean",
            "give the activation (model.activation=silu), the mean and std of its training, or the original code: "
            "--plugin FILE.py")
    return {"by": "clean accuracy", "known": known.share, "found": right / n, "n": n}


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
