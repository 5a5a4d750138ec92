"""A trained classifier as a plain module: `mat_dist.load(run)`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from mat_dist import checkpoint
from mat_dist.atomic import parse_json
from mat_dist.cohort import Images
from mat_dist.config import load_config
from mat_dist.config.schema import Config
from mat_dist.errors import CheckpointError
from mat_dist.evaluator import EMA, ENSEMBLE, RAW, load_models
from mat_dist.models import Ensemble
from mat_dist.runfolder import RunFolder


def load(run: str | Path, peer: str | int = "best", *, which: str = "best", weights: str | None = None,
         device: str = "cpu") -> nn.Module:
    """A model of a run: float images (B, C, H, W) in [0, 1] -> logits (B, K); eval mode, no gradient of parameters.

    Args:
        run: run folder.
        peer: name or index of a peer; `best`: the peer that withstood most on the validation split; `ensemble`.
        which: checkpoint `best`, `latest`, or `step_<n>`; `best` is `latest` where no evaluation chose one.
        weights: `raw` or `ema`; default ema where the run keeps averaged weights.
        device: where the model shall be.

    Raises:
        CheckpointError: no such run, checkpoint or peer. A run with a plug-in needs the plug-in imported before.
    """
    folder = RunFolder(Path(run))
    if not folder.config.is_file():
        raise CheckpointError("this is not the folder of a run", str(run), "give the folder that holds config.yaml")
    config = load_config(str(folder.config))
    which = "latest" if which == "best" and checkpoint.read_best(folder) is None else which
    manifest = checkpoint.load_manifest(folder, which)
    averaged = any(p.optim.ema_decay is not None for p in config.peers)
    weights = weights or (EMA if averaged else RAW)
    if weights not in (RAW, EMA) or (weights == EMA and not averaged):
        raise CheckpointError(f"there are no weights {weights!r}", str(run),
                              "choose raw, or ema where optim.ema_decay was set")
    told = manifest.meta.extra["images"]
    images = Images(tuple(told["shape"]), told["classes"], tuple(told["mean"]), tuple(told["std"]))
    models = load_models(config, manifest, images, weights, torch.device(device))
    if peer == ENSEMBLE:
        return Ensemble(models, config.eval.ensemble).eval()
    return models[_index(config, folder, manifest, peer, weights)]


def _index(config: Config, folder: RunFolder, manifest: checkpoint.Manifest, peer: str | int, weights: str) -> int:
    """Position of the peer that is asked for."""
    names = [str(p.name) for p in config.peers]
    if peer == "best":
        found = best_peer(names, folder, manifest.step, weights)
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
    return folder.eval / f"validation_{checkpoint.step_name(step)}.json"


def best_peer(names: Sequence[str], folder: RunFolder, step: int, weights: str) -> str | None:
    """The peer that withstood most on the validation split at a step; None where no evaluation was made there."""
    file = _validation(folder, step)
    if not file.is_file():
        return None
    rows = parse_json(file.read_bytes())["targets"]
    robust = {r["target"]: r["accuracy"]["union"] for r in rows if r["weights"] == weights and r["target"] in names}
    return max(robust, key=lambda name: (robust[name], -names.index(name)))
