"""What the report attacks: the models of one checkpoint, and test images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mat_dist import checkpoints
from mat_dist.attacks.norms import Threat
from mat_dist.checkpoints.load import EMA, ENSEMBLE, RAW, FinishedRun, candidates
from mat_dist.config.schema import Config
from mat_dist.data import ImageSet, load_data
from mat_dist.errors import DataError
from mat_dist.evaluation.attacks import AttackPlan, craft
from mat_dist.evaluation.chunks import chosen_images, pixels
from mat_dist.evaluation.targets import threats_of
from mat_dist.report.files import RunFiles


@dataclass(frozen=True)
class Subject:
    """Models and images of one run.

    Attributes:
        targets: the peers in their order, then the ensemble; eval mode.
        source: the peer that the gallery attacks, the best one of the newest evaluation of this checkpoint.
        weights, step: which weights of which checkpoint.
        data, samples_N: the test set, and the positions of the images that are attacked.
        classes: their names.
    """

    config: Config
    targets: dict[str, nn.Module]
    source: str
    weights: str
    step: int
    data: ImageSet
    samples_N: Tensor
    classes: tuple[str, ...]
    device: torch.device

    @property
    def peers(self) -> dict[str, nn.Module]:
        return {name: model for name, model in self.targets.items() if name != ENSEMBLE}

    @property
    def threats(self) -> list[Threat]:
        """The distinct threats of the cohort."""
        return threats_of(self.config.peers)

    @property
    def source_threat(self) -> Threat:
        """The threat that the source was trained with."""
        spec = self.config.peers[list(self.targets).index(self.source)].threat
        return Threat(spec.norm, spec.eps)

    def plan(self, factor: float = 1.0) -> AttackPlan:
        """The attack of the test set with one start; a given step length grows with `factor`, as eps does."""
        given = self.config.eval.step_size
        return AttackPlan(self.config.eval.test_steps, 1, None if given is None else given * factor)

    def batches(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(number of the chunk, images, labels) in the evaluator's chunks, whose number keys the attack's noise."""
        for chunk, rows in enumerate(self.samples_N.split(self.config.eval.chunk)):
            yield chunk, *pixels(self.data, rows, self.device, self.config)

    def craft(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, threat: Threat, plan: AttackPlan,
              chunk: int) -> Tensor:
        """The evaluator's AEs of its first start -> (B, C, H, W)."""
        return craft(model, x_BCHW, y_B, threat, plan, seed=self.config.run.seed, chunk=chunk)


def find_checkpoint(run: RunFiles) -> checkpoints.Manifest:
    """The best checkpoint, the latest where no evaluation chose one. Raises CheckpointError."""
    return checkpoints.load_manifest(run.folder, "latest" if checkpoints.read_best(run.folder) is None else "best")


def load_subject(run: RunFiles, manifest: checkpoints.Manifest, images: int, device: torch.device) -> Subject:
    """Load models and `images` test images (a keyed random subset, or all).

    Raises CheckpointError for a damaged checkpoint, DataError for images that are missing or others than those of the
    training, ConfigError for a model or data set of a plug-in that is not given.
    """
    config = run.config
    weights = EMA if run.averaged else RAW
    opened = FinishedRun(run.folder, config, manifest, weights)
    models = opened.models(device)
    data = load_data(config.data.model_copy(update={"download": False}), seed=config.run.seed,
                     batch_size=config.train.batch_size)
    if data.digest != manifest.meta.data_digest:
        raise DataError("the images are not those of the training", f"data.name={config.data.name}",
                        "give the report the same data, in the place that config.yaml names")
    targets = {**dict(zip(run.peers, models, strict=True)), ENSEMBLE: opened.ensemble(models=models)}
    samples_N = chosen_images(len(data.test), images, config.run.seed)
    source = best_peer(run, manifest.step, weights)
    return Subject(config, targets, source, weights, manifest.step, data.test, samples_N, data.classes, device)


def best_peer(run: RunFiles, step: int, weights: str) -> str:
    """The peer with the highest robust accuracy on the validation split at `step`, as `mat_dist.load` chooses; the
    first one where there is no such evaluation."""
    names = candidates(run.config.peers)
    for one in run.evaluations:
        if one.step == step and one.file.startswith("validation"):
            robust = {t.name: t.accuracy["union"] for t in one.targets if t.weights == weights and t.name in names}
            if robust:
                return max(robust, key=lambda name: (robust[name], -names.index(name)))
    return names[0]
