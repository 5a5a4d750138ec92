"""A finished run: its settings, a checkpoint, its models. `mat_dist.load(run)` gives one of them as a plain module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from mat_dist.checkpoints import Manifest, load_manifest, load_peer, read_best, step_name
from mat_dist.checkpoints.foreign import TensorFile, find_network, read_tensors
from mat_dist.checkpoints.hub import HUB, fetched
from mat_dist.checkpoints.peers import reason
from mat_dist.config import load_config, other_plugins, resume_conflicts
from mat_dist.config.load import PRETRAINED, require_plugins
from mat_dist.config.plugins import module_name
from mat_dist.config.schema import Config, PeerConfig
from mat_dist.data.images import dataset_names
from mat_dist.errors import CheckpointError, EnvironmentFault, some
from mat_dist.models import Ensemble
from mat_dist.models.library import published_weights
from mat_dist.models.registry import Images, is_known, make_model, of_plugins
from mat_dist.runs.files import parse_json
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.session import Run

RAW, EMA, ENSEMBLE, BEST = "raw", "ema", "ensemble", "best"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class FinishedRun:
    """A checkpoint of a run, and what its models need."""

    folder: RunFolder
    config: Config
    manifest: Manifest
    weights: str  # `raw` or `ema`, which the models get

    @property
    def images(self) -> Images:
        """What the models take. Raises CheckpointError where the manifest does not say it."""
        try:
            told = TypeAdapter(Images).validate_python(self.manifest.meta.extra["images"])
            if not len(told.mean) == len(told.std) == told.shape[0]:
                raise ValueError("mean and std are not those of its channels")
            return told
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"the manifest does not tell the size of the images: {error}",
                                  str(self.manifest.directory), "choose another checkpoint") from error

    @property
    def other_network(self) -> str:
        """What is wrong where a network is that of a plug-in which has changed since the training, else empty."""
        then, now = self.manifest.meta.extra.get("plugins"), of_plugins(self.config.peers).get("plugins", ())
        if not isinstance(then, dict) or {module_name(str(digest)) for digest in then.values()}.issuperset(now):
            return ""
        return "the plug-in of the network has changed since the training. Give it as it was, or train again"

    @property
    def peers(self) -> list[str]:
        """Their names, in their order."""
        return [str(spec.name) for spec in self.config.peers]

    def index(self, peer: str | int) -> int:
        """Position of a peer that is given by name, by index, or as `best`. Raises CheckpointError."""
        names = self.peers
        if peer == BEST:
            some = candidates(self.config.peers)
            found = some[0] if len(some) == 1 else self.chosen_peer()
            if found is None:
                raise CheckpointError("no evaluation says which peer is best", str(validation_file(
                    self.folder, self.manifest.step)), f"choose one of {', '.join(names)}")
            peer = found
        if peer in names:
            return names.index(str(peer))
        if isinstance(peer, int) and 0 <= peer < len(names):
            return peer
        raise CheckpointError(f"there is no peer {peer!r}", str(self.folder.path),
                              f"choose best, ensemble, or one of {', '.join(names)}")

    def chosen_peer(self) -> str | None:
        """Of the `candidates` the one that withstood most on the validation split at this step; None where no
        evaluation of these very weights was made."""
        names, first = candidates(self.config.peers), validation_file(self.folder, self.manifest.step)
        files, robust = {entry.name: entry.sha256 for entry in self.manifest.files}, {}
        # A checkpoint that was damaged and made again has a later file: ...-2.json. The newest one comes last.
        for file in sorted(self.folder.eval.glob(f"{first.stem}*.json"), key=lambda file: (len(file.name), file.name)):
            try:  # all formats of a result file have these parts; their reader, evaluation/results.py, stands above
                told = parse_json(file.read_bytes())
                if told.get("files", files) == files:
                    robust = {row["target"]: float(row["accuracy"]["union"]) for row in told["targets"]
                              if row["weights"] == self.weights}
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"not a result file: {error}", str(file), "remove it, and name a peer") from error
        return max((name for name in names if name in robust), key=lambda name: (robust[name], -names.index(name)),
                   default=None)

    def state(self, peer: str | int) -> dict[str, Tensor]:
        """The weights of a peer; one that keeps no averaged weights gives its raw ones."""
        state = load_peer(self.manifest, self.index(peer))
        with fitting(str(peer), self.manifest, self.index(peer)):
            chosen: dict[str, Tensor] = state["model"] if self.weights == RAW or state["ema"] is None else state["ema"]
        return chosen

    def peer(self, peer: str | int = BEST, device: torch.device = CPU) -> nn.Module:
        """A peer's model: eval mode, no gradient of parameters. Raises CheckpointError."""
        index = self.index(peer)
        config = self.config
        model, state = make_model(config.peers[index], self.images, seed=config.run.seed, step=config.step,
                                  device=device), self.state(index)
        with fitting(self.peers[index], self.manifest, index):
            model.load_state_dict(state)
        return model.eval().requires_grad_(False)

    def models(self, device: torch.device = CPU) -> list[nn.Module]:
        """All peers' models, in their order."""
        return [self.peer(index, device) for index in range(len(self.config.peers))]

    def ensemble(self, device: torch.device = CPU, models: Sequence[nn.Module] | None = None) -> Ensemble:
        """The ensemble, by the run's rule, of the peers that train, in eval mode; models: those of all peers, where
        they are loaded already."""
        models = self.models(device) if models is None else models
        voters = [model for model, spec in zip(models, self.config.peers, strict=True) if not spec.frozen]
        return Ensemble(voters, self.config.eval.ensemble).eval()


def open_run(run: str | Path, which: str = BEST, weights: str | None = None,
             config: Config | None = None) -> FinishedRun:
    """Open a run for reading.

    Args:
        run: its folder.
        which: checkpoint `best`, `latest`, or `step_<n>`; `best` is `latest` where no evaluation chose one.
        weights: `raw` or `ema`; default ema where the run keeps averaged weights.
        config: its settings, where something of them was changed; default those of the folder.

    Raises CheckpointError: no such run or checkpoint, or no such weights. ConfigError for settings that cannot be read;
    a run with a plug-in needs the plug-in imported before.
    """
    folder = RunFolder(Path(str(run)))
    if not folder.config.is_file():
        what = "this is not the folder of a run" if folder.path.exists() else "there is no such file or folder of a run"
        raise CheckpointError(what, str(run), "give the folder that holds config.yaml")
    own = load_config(str(folder.config))
    config = config or own
    if config.data.name not in dataset_names() or not all(is_known(spec.model.name) for spec in config.peers):
        require_plugins(folder.config)
    manifest = load_manifest(folder, "latest" if which == BEST and read_best(folder) is None else which)
    check_origin(manifest, own)
    averaged = any(spec.averages for spec in config.peers)
    weights = weights or (EMA if averaged else RAW)
    if weights not in (RAW, EMA) or (weights == EMA and not averaged):
        raise CheckpointError(f"there are no weights {weights!r}", str(run),
                              "choose raw, or ema where optim.ema_decay or methods.swa was set")
    return FinishedRun(folder, config, manifest, weights)


def check_origin(manifest: Manifest, config: Config, plugins: Mapping[str, str] | None = None) -> None:
    """Raise CheckpointError where a checkpoint was made with other settings than a run has, by other peers, or (where
    they are given: SHA-256 by path) with other plug-ins. Versions before 0.2 recorded only the peers. Without plug-ins
    it is for readers, who compare the images themselves."""
    settings, then = (manifest.meta.extra.get(key) for key in ("settings", "plugins"))
    found = resume_conflicts(settings, config) if isinstance(settings, dict) else []
    told = [line for line in found if plugins is not None or not line.startswith("data.")]
    names = tuple(str(spec.name) for spec in config.peers)
    if not told and manifest.meta.peers != names:
        told = [f"peers {', '.join(manifest.meta.peers)[:200]} -> {', '.join(names)[:200]}"]
    if told:
        raise CheckpointError(f"the checkpoint was made with other settings than those of the run: {some(told)}",
                              str(manifest.directory), "restore config.yaml or the checkpoint from a copy, or use the "
                              "settings that it was made with")
    if plugins is not None and isinstance(then, dict) and (changed := other_plugins(then, plugins)):
        raise CheckpointError(f"the plug-ins are not those of the checkpoint: {changed}", str(manifest.directory),
                              "give --plugin FILE for the files as they were, or choose another run.name")


def load(run: str | Path, peer: str | int = BEST, *, which: str = BEST, weights: str | None = None,
         device: str = "cpu") -> nn.Module:
    """A model of a run: float images (B, C, H, W) in [0, 1] -> logits (B, K); eval mode, no gradient of parameters.

    Args:
        run: run folder.
        peer: name or index of a peer; `best`: the peer that withstood most on the validation split; `ensemble`.
        which, weights: see `open_run`.
        device: where the model shall be.

    Raises CheckpointError: no such run, checkpoint or peer; EnvironmentFault: no such device. A run with a plug-in
    needs the plug-in imported before.
    """
    place = usable(device)
    opened = open_run(run, which, weights)
    if peer == ENSEMBLE:
        return opened.ensemble(device=place)
    if peer == f"{ENSEMBLE}:weights":
        raise CheckpointError("the mean of the peers' weights is no model of this version; 0.1 was the last with it",
                              str(run), "load ensemble, which averages what the peers say")
    return opened.peer(peer, place)


def usable(device: str | torch.device) -> torch.device:
    """The device of that name. Raises EnvironmentFault where this machine, or its torch, does not have it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise EnvironmentFault(f"there is no device {str(device)[:40]!r}: {str(error).splitlines()[0][:200]}", "device",
                               "write cpu, or cuda where torch sees a GPU") from error


def candidates(specs: Sequence[PeerConfig]) -> list[str]:
    """The peers that may be the best one: the generalists, or where there are none all that train on AEs, or at all."""
    training = [spec for spec in specs if not spec.frozen]
    generalists = [spec for spec in training if spec.role == "generalist"]
    return [str(spec.name) for spec in generalists or [s for s in training if s.learns_aes] or training]


def validation_file(folder: RunFolder, step: int) -> Path:
    """The result of a step's evaluation on the validation split."""
    return folder.eval / f"validation_{step_name(step)}.json"


# ------------------------------------------------------------------------------------------------ into a training


class Trained(Protocol):
    """A peer of a training (core/peer.py)."""

    spec: PeerConfig
    index: int
    model: nn.Module
    notes: list[str]

    @property
    def name(self) -> str: ...
    def start_from(self, weights: dict[str, Tensor]) -> None: ...
    def load(self, state: Mapping[str, Any]) -> None: ...


def check_resumed(manifest: Manifest | None, run: Run, config: Config, data_digest: str, total: int) -> None:
    """Raise CheckpointError unless the run, of `total` steps, can go on from the checkpoint that was found."""
    if manifest is None:
        if config.run.resume == "must":
            raise CheckpointError("there is no checkpoint to continue", str(run.folder.path),
                                  "check run.name, or set run.resume=auto")
        return
    where = str(manifest.directory)
    check_origin(manifest, config, run.plugins)
    if not run.continues and "settings" not in manifest.meta.extra:
        raise CheckpointError("config.yaml is gone, and the checkpoint, of an earlier version, has no settings", where,
                              "restore config.yaml, or choose another run.name")
    if manifest.step > total:
        raise CheckpointError(f"the checkpoint is of step {manifest.step}, the whole run has {total}", where,
                              "it is not of this run: move it elsewhere")
    if manifest.meta.data_digest != data_digest:
        raise CheckpointError("the images are not those that the run was trained on", where,
                              "use the same data.root and data settings, or choose another run.name")


def restore(peer: Trained, manifest: Manifest) -> None:
    """Give a peer its state of a checkpoint. Raises CheckpointError, also for one that does not fit it."""
    state = load_peer(manifest, peer.index)
    with fitting(peer.name, manifest, peer.index):
        peer.load(state)


@contextmanager
def fitting(name: str, manifest: Manifest, index: int) -> Iterator[None]:
    """Turn what torch raises for a state that does not fit a peer into a CheckpointError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"the state does not fit {name}: {reason(error)}", str(
            manifest.directory / manifest.files[index].name), "use another checkpoint, or that of this run") from error


def initialise(peers: Iterable[Trained], images: Images) -> None:
    """Give each peer with `init_from` its weights. Raises CheckpointError, also for another architecture."""
    for peer in peers:
        if peer.spec.init_from is not None:
            peer.start_from(_fitted(*_tensors(peer.spec.init_from, peer, images), peer, images))


def _tensors(source: str, peer: Trained, images: Images) -> tuple[TensorFile, str | None]:
    """What `init_from` names, and the entry in it."""
    if source == PRETRAINED:
        name = peer.spec.model.name
        weights = published_weights(name, images.shape, lambda address: fetched(address)[0])
        return TensorFile(Path(name), weights, "", True), None
    rest = source.removeprefix(f"{PRETRAINED}:")
    if rest.startswith(HUB):
        file, entry = fetched(rest)
        return read_tensors(file), entry
    start, _, last = rest.rpartition(":")
    for path, entry in ((rest, None), (start, last)):
        if path and Path(path).is_file():
            return read_tensors(Path(path)), entry
    run, member = split_peer(rest)
    opened = open_run(run)
    theirs = opened.images
    if rest == source and (theirs.shape, theirs.classes) != (images.shape, images.classes):
        raise CheckpointError(f"its models are for images {theirs.shape} of {theirs.classes} classes, these data have "
                              f"{images.shape} of {images.classes}", run, "train a model for these data, and name its "
                              f"run in init_from, or write init_from=pretrained:{run} for all but the last layer")
    return TensorFile(Path(run), opened.state(member or BEST), "", True), None


def _fitted(file: TensorFile, entry: str | None, peer: Trained, images: Images) -> dict[str, Tensor]:
    """The weights for a peer's model from tensors by name; `peer.notes` gets what is worth telling."""
    net, state, source = peer.model.get_submodule("net"), dict(peer.model.state_dict()), str(peer.spec.init_from)
    told, adapt = source.removesuffix(f":{entry}"), source.partition(":")[0] == PRETRAINED
    network = find_network(file, net, channels=images.shape[0], classes=images.classes, entry=entry,
                           choose=f"init_from={told}:{{}}", adapt=adapt)
    if network.drawn and peer.spec.frozen:
        raise CheckpointError(f"the weights are for {network.classes} classes, the data have {images.classes}, and a "
                              f"frozen peer cannot learn a new last layer", str(file.file),
                              "give it weights for these classes, or let it train")
    own = network.normalisation(images.shape[0], "save the weights of one network, with a mean and std for pixels in "
                                "[0, 1] or without")
    if own is not None:
        for key, values in (("normalize.mean", own[1]), ("normalize.std", own[2])):
            state[key] = torch.tensor(values).reshape(state[key].shape)
    by = network.origin(own) if own else "of these data, since the file has none"
    peer.notes += [f"{peer.name}: starts from {told}: {note}" for note in (*network.notes, f"normalisation {by}")]
    return state | {f"net.{key}": value for key, value in network.state(net).items()}


def split_peer(word: str) -> tuple[str, str | None]:
    """RUN or RUN:peer -> the run, and the peer's name if one is meant."""
    run, colon, peer = word.rpartition(":")
    return (run, peer) if colon and not Path(word).is_dir() else (word, None)
