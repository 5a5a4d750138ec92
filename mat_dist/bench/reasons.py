"""Why mutual training of a finished run gains or not: what its peers do with each other's AEs.

python -m mat_dist.bench reasons RUN [images=500] [key=value ...]

  images=N            validation images, and as many training images (default 500)
  checkpoint=LABEL    best, last or step_N (default last)
  weights=WHICH       raw, ema, auto (default auto: averaged weights where they are kept)
  key=value           settings that python -m mat_dist.evaluate may change: run.device, data.root, ...

Writes eval/reasons/<digest>.json of the run, and prints a table. The test split is never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mat_dist import checkpoints
from mat_dist.config import load_config, load_plugins
from mat_dist.config.schema import Config
from mat_dist.config.tree import COMMAND_LINE
from mat_dist.errors import ConfigError
from mat_dist.evaluation.attacks import EMA, RAW
from mat_dist.evaluation.request import Request, parse
from mat_dist.evaluation.runs import find_run, refuse_unfinished
from mat_dist.runs.files import parse_json, reported, write_json
from mat_dist.runs.folder import RunFolder

IMAGES = 500
OWN = ("images", "checkpoint", "weights")
SHOWN = {"right": "right", "confidence": "confidence", "teacher_confidence": "of teachers", "agreement": "agreement",
         "teacher_right": "teacher right, student wrong", "some_teacher_right": "some teacher right, student wrong"}


def main(words: Sequence[str]) -> None:
    """The command. Raises ConfigError, CheckpointError, DataError, OutputError."""
    arguments = parse(words)
    if foreign := sorted(arguments.request.model_fields_set - set(OWN)):
        raise ConfigError(f"{', '.join(foreign)} cannot be chosen here", COMMAND_LINE, f"choose {', '.join(OWN)}")
    label = arguments.request.checkpoint if "checkpoint" in arguments.request.model_fields_set else "last"
    request = arguments.request.model_copy(update={"images": arguments.request.images or IMAGES, "checkpoint": label})
    folder = find_run(arguments.runs[0])
    refuse_unfinished(folder)
    config = load_config(str(folder.config), arguments.settings)
    if len(config.peers) < 2:
        raise ConfigError("a run of one peer, which has nobody to learn from", str(folder.path), "give a cohort's")
    load_plugins(arguments.plugins)
    document = make(folder, config, request)
    show(document)


def make(folder: RunFolder, config: Config, request: Request) -> dict[str, Any]:
    """Measure, and write the file."""
    from mat_dist.bench.study.reasons import measured
    from mat_dist.data import load_data, place
    from mat_dist.distributed.device import choose_device, prepare_torch
    from mat_dist.distributed.stopping import watching
    from mat_dist.evaluation.attacks import load_models
    from mat_dist.evaluation.evaluation import Subject, check_images

    device = choose_device(config, local_rank=0, local_world=1)
    prepare_torch(config)
    subject = Subject.find(folder, config, request)
    with watching() as stop:
        data = load_data(config.data, seed=config.run.seed, batch_size=config.train.batch_size, stop=stop)
    check_images(data, subject)
    data = place(data, config.data.residency, device)
    models = load_models(config, subject.manifest, subject.images, subject.weights, device)
    assert request.images is not None
    about = identity(subject.manifest, subject.weights, request.images)
    document = {**about, "step": subject.manifest.step,
                **measured(models, config, data.val, data.train, request.images, device)}
    file = place_of(folder, about)
    with reported(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, document)
    return document


def identity(manifest: checkpoints.Manifest, weights: str, images: int) -> dict[str, Any]:
    """What a file of this command belongs to: weights of a checkpoint, and how many images were asked for."""
    return {"asked": images, "weights": weights, "files": {entry.name: entry.sha256 for entry in manifest.files}}


def place_of(folder: RunFolder, about: dict[str, Any]) -> Path:
    """The file that belongs to an `identity`."""
    return folder.eval / "reasons" / f"{checkpoints.json_digest(about)[:12]}.json"


def find(folder: RunFolder, config: Config, images: int) -> dict[str, Any] | None:
    """What was measured of the last checkpoint of a run, None where it was not."""
    weights = EMA if any(peer.optim.averages for peer in config.peers) else RAW
    file = place_of(folder, identity(checkpoints.load_manifest(folder), weights, images))
    if not file.is_file():
        return None
    document: dict[str, Any] = parse_json(file.read_bytes())
    return document


def show(document: dict[str, Any]) -> None:
    """A line per student and source of the AEs."""
    found, names = document["validation"], [*document["peers"], "clean"]
    table = Table("student", "AEs of", *SHOWN.values(), "KL", title_justify="left",
                  title=f"{found['images']} validation images, {document['weights']} weights, per cent; KL in nats")
    for student in document["students"]:
        for source, name in enumerate(names):
            table.add_row(names[student], name, *(f"{100 * found[key][student][source]:.1f}" for key in SHOWN),
                          f"{found['kl'][student][source]:.3f}")
    screen = Console()
    (screen if screen.is_terminal else Console(width=140)).print(table)
    learned = document["training"]["right"]
    for student in document["students"]:
        print(f"{names[student]}: {100 * learned[student][0]:.1f} % right on own AEs of "
              f"{document['training']['images']} training images, {100 * found['right'][student][student]:.1f} % of "
              f"{found['images']} validation images")
