"""A trained classifier as a plain module: `mat_dist.load(run)`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mat_dist import checkpoints
from mat_dist.config import load_config
from mat_dist.config.schema import Config
from mat_dist.errors import CheckpointError
from mat_dist.evaluation.attacks import EMA, ENSEMBLE, RAW, candidates, ensemble_of, load_models
from mat_dist.models import soup
from mat_dist.models.classifier import Images
from mat_dist.models.ensemble import WEIGHTS
from mat_dist.runs.files import parse_json
from mat_dist.runs.folder import RunFolder


def load(run: str | Path, peer: str | int = "best", *, which: str = "best", weights: str | None = None,
         device: str = "cpu") -> nn.Module:
    """A model of a run: float images (B, C, H, W) in [0, 1] -> logits (B, K); eval mode, no gradient of parameters.

    Args:
        run: run folder.
        peer: name or index of a peer; `best`: the peer that withstood most on the validation split; `ensemble`;
            `ensemble:weights`: the mean of the weights of the peers that train.
        which: checkpoint `best`, `latest`, or `step_<n>`; `best` is `latest` where no evaluation chose one.
        weights: `raw` or `ema`; default ema where the run keeps averaged weights.
        device: where the model shall be.

    Raises:
        CheckpointError: no such run, checkpoint or peer. A run with a plug-in needs the plug-in imported before.
    """
    folder, config, manifest, weights = _opened(Path(run), which, weights)
    images = Images.of(manifest.meta.extra["images"])
    models = load_models(config, manifest, images, weights, torch.device(device))
    if peer == ENSEMBLE:
        return ensemble_of(config, models)
    if peer == f"{ENSEMBLE}:{WEIGHTS}":
        return soup([model for model, spec in zip(models, config.peers, strict=True) if not spec.frozen])
    return models[_index(config, folder, manifest, peer, weights)]


def trained_state(source: str, images: Images) -> dict[str, Tensor]:
    """The weights that another peer starts from.

    Args:
        source: folder of a run, for its best peer, or RUN:PEER; the best checkpoint counts, with averaged weights where
            they are kept.
        images: what the new model is for.

    Raises:
        CheckpointError: no such run, checkpoint or peer, or one for images of other size or number of classes.
    """
    path, colon, name = source.rpartition(":")
    run, peer = (path, name) if colon and not Path(source).is_dir() else (source, "best")
    folder, config, manifest, weights = _opened(Path(run), "best", None)
    theirs = Images.of(manifest.meta.extra["images"])
    for what, found, wanted in (("images", theirs.shape, images.shape), ("classes", theirs.classes, images.classes)):
        if found != wanted:
            raise CheckpointError(f"its models are for {found} {what}, these data have {wanted}", source,
                                  "train a model for these data, and name its run in init_from")
    state = checkpoints.load_peer(manifest, _index(config, folder, manifest, peer, weights))
    chosen: dict[str, Tensor] = state["model"] if weights == RAW or state["ema"] is None else state["ema"]
    return chosen


def _opened(run: Path, which: str, weights: str | None) -> tuple[RunFolder, Config, checkpoints.Manifest, str]:
    """A run's folder, settings, checkpoint and weights (`raw` or `ema`)."""
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise CheckpointError("this is not the folder of a run", str(run), "give the folder that holds config.yaml")
    config = load_config(str(folder.config))
    which = "latest" if which == "best" and checkpoints.read_best(folder) is None else which
    manifest = checkpoints.load_manifest(folder, which)
    averaged = any(p.optim.averages for p in config.peers)
    weights = weights or (EMA if averaged else RAW)
    if weights not in (RAW, EMA) or (weights == EMA and not averaged):
        raise CheckpointError(f"there are no weights {weights!r}", str(run),
                              "choose raw, or ema where optim.ema_decay or optim.swa_start was set")
    return folder, config, manifest, weights


def _index(config: Config, folder: RunFolder, manifest: checkpoints.Manifest, peer: str | int, weights: str) -> int:
    """Position of the peer that is asked for."""
    names = [str(p.name) for p in config.peers]
    if peer == "best":
        some = candidates(config.peers)
        found = some[0] if len(some) == 1 else best_peer(some, folder, manifest.step, weights)
        if found is None:
            raise CheckpointError("no evaluation says which peer is best", str(_validation(folder, manifest.step)),
                                  f"choose one of {', '.join(names)}")
        peer = found
    if peer in names:
        return names.index(str(peer))
    if isinstance(peer, int) and 0 <= peer < len(names):
        return peer
    raise CheckpointError(f"there is no peer {peer!r}", str(folder.path),
                          f"choose best, ensemble, or one of {', '.join(names)}")


def _validation(folder: RunFolder, step: int) -> Path:
    return folder.eval / f"validation_{checkpoints.step_name(step)}.json"


def best_peer(names: Sequence[str], folder: RunFolder, step: int, weights: str) -> str | None:
    """The peer that withstood most on the validation split at a step; None where no evaluation was made there."""
    file = _validation(folder, step)
    if not file.is_file():
        return None
    rows = parse_json(file.read_bytes())["targets"]
    robust = {r["target"]: r["accuracy"]["union"] for r in rows if r["weights"] == weights and r["target"] in names}
    return max(robust, key=lambda name: (robust[name], -names.index(name)))
