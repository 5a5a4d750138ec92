"""Transfer from other checkpoints: their AEs join the candidates of every target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mat_dist import checkpoints
from mat_dist.config import load_config
from mat_dist.config.schema import Config
from mat_dist.errors import ConfigError
from mat_dist.evaluation.attack import TRANSFER, Tried, attack_one
from mat_dist.evaluation.attacks import EMA, RAW, load_models
from mat_dist.evaluation.craft import Job
from mat_dist.evaluation.runs import find_run, refuse_unfinished
from mat_dist.evaluation.targets import Target
from mat_dist.models.classifier import Images
from mat_dist.runs.folder import RunFolder

FROM = f"{TRANSFER} from "
"""How the attack is called in results: `transfer from RUN/peer`."""


def split_source(word: str) -> tuple[RunFolder, str | None]:
    """RUN or RUN:peer -> the folder, and the peer's name if one is meant. Raises ConfigError."""
    folder, colon, peer = word.rpartition(":")
    if not colon or Path(word).is_dir():
        return find_run(word, "sources"), None
    return find_run(folder, "sources"), peer


def load_sources(words: Sequence[str], images: Images, config: Config,
                 device: torch.device) -> tuple[list[Target], list[dict[str, Any]]]:
    """The peers of other runs as attackers, and what the result file says about each run.

    Of each run the checkpoint that the validation split chose, else the latest; averaged weights where they are kept.

    Args:
        words: RUN or RUN:peer.
        images: what the targets take; the sources must take the same.
        config: of the evaluation, whose precision they get.

    Raises:
        ConfigError: no such run or peer, or models for other images or classes.
        OutputError: a run is still being written.
        CheckpointError: a run without a checkpoint, or with a damaged one.
    """
    found: dict[str, Target] = {}
    about: list[dict[str, Any]] = []
    for word in words:
        folder, peer = split_source(word)
        refuse_unfinished(folder)
        theirs = load_config(str(folder.config))
        names = [str(p.name) for p in theirs.peers]
        if peer is not None and peer not in names:
            raise ConfigError(f"there is no peer {peer[:80]!r}", f"sources={word[:200]}",
                              f"choose from {', '.join(names)}")
        manifest = checkpoints.load_manifest(folder, "latest" if checkpoints.read_best(folder) is None else "best")
        told = manifest.meta.extra["images"]
        if (tuple(told["shape"]), told["classes"]) != (images.shape, images.classes):
            raise ConfigError(f"models for images {tuple(told['shape'])} of {told['classes']} classes, the targets "
                              f"take {images.shape} of {images.classes}", f"sources={word[:200]}",
                              "give a run on images of the same size and classes")
        weights = EMA if any(p.optim.averages for p in theirs.peers) else RAW
        # The normalisation is a layer: what it was built with does not matter, the checkpoint's values are loaded.
        models = load_models(theirs.model_copy(update={"step": config.step}), manifest, images, weights, device)
        run = folder.path.resolve().name
        if any(name.startswith(f"{run}/") for name in found):  # a second run of that name, or a second peer of it
            run = run if any(one["folder"] == str(folder.path.resolve()) for one in about) else str(folder.path)
        chosen = [name for name in names if peer in (None, name)]
        found |= {f"{run}/{name}": Target(f"{run}/{name}", models[names.index(name)], (models[names.index(name)],))
                  for name in chosen}
        about.append({"folder": str(folder.path.resolve()), "run": run, "peers": chosen, "step": manifest.step,
                      "weights": weights, "files": {one.name: one.sha256 for one in manifest.files}})
    return list(found.values()), [{key: value for key, value in one.items() if key != "folder"} for one in about]


def replay_sources(sources: Sequence[Target], targets: Sequence[Target], x_BCHW: Tensor, y_B: Tensor,
                   clean: Mapping[str, Tensor], tried: Mapping[tuple[str, str], Tried], job: Job, chunk: int) -> None:
    """Craft AEs with every source, by the evaluation's attacks, and add what they do to each target to `tried`.

    Images that a source gets wrong without an attack are attacked too: a target may get them right.
    """
    for threat in job.threats:
        for source in sources:
            advs = list(attack_one(source, x_BCHW, y_B, y_B, threat, job, chunk).advs.values())
            for target in targets:
                mine, clean_B = tried[target.name, threat.label], clean[target.name]
                found_B = mine.replay(source.name, target.model, advs, y_B, clean_B)
                mine.predictions[f"{FROM}{source.name}"] = found_B
