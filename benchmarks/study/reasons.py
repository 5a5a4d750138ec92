"""What the peers of a run do with each other's AEs: how strong those are, and what there is to learn from whom.

Measured on the validation split (and own AEs on training images too) with one attack for all rows, PGD on
cross-entropy with as many steps as in training; never on the test split.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks.command import Watch
from mat_dist import checkpoints
from mat_dist.attacks.norms import Threat
from mat_dist.checkpoints.load import EMA, RAW, FinishedRun, candidates
from mat_dist.cli import tell
from mat_dist.config import load_config, load_plugins
from mat_dist.config.schema import Config
from mat_dist.config.tree import COMMAND_LINE
from mat_dist.core.losses import kl_per_image
from mat_dist.data import DataSets, ImageSet, load_data, place
from mat_dist.distributed.arithmetic import strict_arithmetic
from mat_dist.distributed.groups import choose_device, prepare_torch
from mat_dist.distributed.stopping import watching
from mat_dist.errors import ConfigError
from mat_dist.evaluation.attacks import AttackPlan, crafted
from mat_dist.evaluation.chunks import chosen_images, pixels
from mat_dist.evaluation.command import check_images, open_asked
from mat_dist.evaluation.settings import find_run, parse, refuse_unfinished
from mat_dist.runs.console import show_table
from mat_dist.runs.files import parse_json, reported, write_json
from mat_dist.runs.folder import RunFolder

MEASURES = ("right", "confidence", "teacher_confidence", "agreement", "teacher_right", "some_teacher_right", "kl")
IMAGES = 500
OWN = ("images", "checkpoint", "weights")
SHOWN = {"right": "right", "confidence": "confidence", "teacher_confidence": "of teachers", "agreement": "agreement",
         "teacher_right": "teacher right, student wrong", "some_teacher_right": "some teacher right, student wrong"}


def main(options: Namespace) -> None:
    """The command, by the options of `__main__.py`; its settings are those of `mat_dist.evaluate`.

    Raises ConfigError, CheckpointError, DataError, OutputError.
    """
    if not options.words:
        raise ConfigError("no run is named", COMMAND_LINE, "give the folder of a finished run, e.g. runs/NAME")
    load_plugins(options.plugin)
    run, images = opened(options.words)
    folder, config = run.folder, run.config
    if len(config.peers) < 2:
        raise ConfigError("a run of one peer, which has nobody to learn from", str(folder.path), "give a cohort's")
    file = place_of(run, images)
    if options.dry_run:
        steps = sum(spec.attack.steps for spec in config.peers)
        print(f"{folder.name}, step {run.manifest.step}: at most {images} validation and {images} training images, "
              f"{4 * steps * images} forward and backward passes of one image in the attacks; "
              f"{'measured already, and measured again' if file.is_file() else 'not measured yet'} ({file})")
        return
    document = make(run, images)
    with reported(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, document)
    show(document)


def opened(words: Sequence[str]) -> tuple[FinishedRun, int]:
    """The finished run that a command line names, its newest checkpoint where none is named, and how many images are
    asked for. Raises ConfigError, CheckpointError, OutputError."""
    arguments = parse(words)
    request = arguments.request
    if foreign := sorted(request.model_fields_set - set(OWN)):
        raise ConfigError(f"{', '.join(foreign)} cannot be chosen here", COMMAND_LINE, f"choose {', '.join(OWN)}")
    if "checkpoint" not in request.model_fields_set:
        request = request.model_copy(update={"checkpoint": "latest"})
    folder = find_run(arguments.runs[0])
    refuse_unfinished(folder)
    run, _ = open_asked(folder, load_config(str(folder.config), arguments.settings), request)
    return run, request.images or IMAGES


def loaded(run: FinishedRun) -> tuple[DataSets, torch.device]:
    """A run's images, and the device to measure it on."""
    config = run.config
    device = choose_device(config, local_rank=0)
    prepare_torch(config)
    with watching() as stop:
        data = load_data(config.data, seed=config.run.seed, batch_size=config.train.batch_size, stop=stop)
    check_images(data, run)
    return place(data, config.data.residency, device), device


def make(run: FinishedRun, images: int) -> dict[str, Any]:
    """Measure a run, at most so many images of each split -> JSON values."""
    watch, config = Watch(tell=tell), run.config
    data, device = loaded(run)
    watch.say(f"{len(config.peers)} peers, {images} validation and {images} training images, {device}")
    return {**identity(run, images), "step": run.manifest.step,
            **measured(run.models(device), config, data.val, data.train, images, device, watch)}


def identity(run: FinishedRun, images: int) -> dict[str, Any]:
    """What a file of this command belongs to: weights of a checkpoint, and how many images were asked for."""
    return {"asked": images, "weights": run.weights,
            "files": {entry.name: entry.sha256 for entry in run.manifest.files}}


def place_of(run: FinishedRun, images: int) -> Path:
    """The file of an `identity`."""
    return run.folder.eval / "reasons" / f"{checkpoints.json_digest(identity(run, images))[:12]}.json"


def find(folder: RunFolder, config: Config, images: int) -> dict[str, Any] | None:
    """What was measured of the last checkpoint of a run, None where it was not."""
    weights = EMA if any(peer.averages for peer in config.peers) else RAW
    file = place_of(FinishedRun(folder, config, checkpoints.load_manifest(folder), weights), images)
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
    show_table(table)
    learned = document["training"]["right"]
    for student in document["students"]:
        print(f"{names[student]}: {100 * learned[student][0]:.1f} % right on own AEs of "
              f"{document['training']['images']} training images, {100 * found['right'][student][student]:.1f} % of "
              f"{found['images']} validation images")


# ------------------------------------------------------------------------------------------------ measuring


def opinions(logits_PBK: Tensor, y_B: Tensor) -> dict[str, Tensor]:
    """What P >= 2 peers say about the same images, summed over the images -> each of MEASURES as (P,), for a student.

    `right`: labelled correctly; `confidence`: probability of the true class. Over the P - 1 others, as teachers, the
    mean of: `teacher_confidence`, their probability of the true class; `agreement`, with the student's label;
    `teacher_right`, where the student is wrong; `kl`, KL(teacher || student) in nats. `some_teacher_right`: at least
    one other is right where the student is wrong.
    """
    peers, batch = logits_PBK.shape[:2]
    log_PBK = logits_PBK.double().log_softmax(-1)
    label_PB = logits_PBK.argmax(-1)
    right_PB = label_PB == y_B
    true_PB = log_PBK.gather(-1, y_B.expand(peers, batch)[..., None])[..., 0].exp()
    wrong_PB, correct_B = ~right_PB, right_PB.sum(0)
    alike_PB = torch.stack([(label_PB == one_B).sum(0) - 1 for one_B in label_PB])
    kl_PB = torch.stack([torch.stack([kl_per_image(other_BK, own_BK) for other_BK in log_PBK]).sum(0)
                         for own_BK in log_PBK])
    others = peers - 1
    found = {"right": right_PB, "confidence": true_PB, "teacher_confidence": (true_PB.sum(0) - true_PB) / others,
             "agreement": alike_PB / others, "teacher_right": wrong_PB * correct_B / others,
             "some_teacher_right": wrong_PB & (correct_B > 0), "kl": kl_PB / others}
    return {name: found[name].double().sum(-1) for name in MEASURES}


def measured(models: Sequence[nn.Module], config: Config, validation: ImageSet, training: ImageSet, size: int,
             device: torch.device, watch: Watch) -> dict[str, Any]:
    """All that `reasons` finds out, as JSON values; at most `size` images of each split.

    Each peer attacks with PGD on its own threat, with as many steps as in training. `training` has `right` alone,
    [student][own AEs, clean images].

    Args:
        models: of all peers, in eval mode, over images in [0, 1].
    """
    names, seed = [str(spec.name) for spec in config.peers], config.run.seed
    attacks = [(Threat(spec.threat.norm, spec.threat.eps), AttackPlan(steps=spec.attack.steps))
               for spec in config.peers]

    def measure(data: ImageSet, what: str) -> dict[str, Any]:
        """The mean of each of MEASURES on images of a split, as lists [student][source], clean images last."""
        samples = chosen_images(len(data), size)
        sums = {name: torch.zeros(len(models), len(models) + 1, dtype=torch.float64) for name in MEASURES}
        for chunk, first in enumerate(range(0, len(samples), config.eval.chunk)):
            watch.now(f"AEs of {what} images: {first} of {len(samples)}")
            x_BCHW, y_B = pixels(data, samples[first:first + config.eval.chunk], device, config)
            advs = [next(crafted(model, x_BCHW, y_B, threat, plan, seed=seed, chunk=chunk))
                    for model, (threat, plan) in zip(models, attacks, strict=True)]
            for source, adv_BCHW in enumerate([*advs, x_BCHW]):
                with torch.no_grad():
                    logits_PBK = torch.stack([model(adv_BCHW) for model in models])
                for name, value_P in opinions(logits_PBK, y_B).items():
                    sums[name][:, source] += value_P.cpu()
        return {"images": len(samples), **{name: [[round(value / len(samples), 6) for value in row]
                                                  for row in table.tolist()] for name, table in sums.items()}}

    with strict_arithmetic():
        known = measure(training, "training")
        return {"peers": names, "students": [names.index(name) for name in candidates(config.peers)],
                "attack": [{"threat": threat.label, "steps": plan.steps, "step_size": plan.size(threat)}
                           for threat, plan in attacks],
                "validation": measure(validation, "validation"),
                "training": {"images": known["images"],
                             "right": [[row[student], row[-1]] for student, row in enumerate(known["right"])]}}
