"""What the report attacks (the models of one checkpoint, on few test images) and what it measures there: transfer,
accuracy against radius and steps, the loss around images, pictures. It is the evaluator's attack with one start; the
numbers of record are those of the evaluation."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from mat_dist import rng
from mat_dist.attacks.norms import Threat
from mat_dist.checkpoints.load import ENSEMBLE, FinishedRun, candidates
from mat_dist.config.schema import Config
from mat_dist.data import ImageSet, load_data
from mat_dist.distributed.arithmetic import strict_arithmetic
from mat_dist.errors import CheckpointError, DataError
from mat_dist.evaluation.attacks import AttackPlan, correct, craft, shown_rows
from mat_dist.evaluation.chunks import chosen_images, pixels
from mat_dist.evaluation.results import CLEAN, UNION, Answers
from mat_dist.evaluation.targets import test_steps, threats_of
from mat_dist.runs.console import duration
from mat_dist.runs.metrics import to_see

EPS_FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
STEPS = (1, 2, 5, 10, 20, 50)
SURFACE_IMAGES = 16
SURFACE_PLACES = 21
Say = Callable[[str], None]
Points = list[tuple[float, float]]
Slices = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Victims:
    """Models and images of one run, to be attacked.

    Attributes:
        targets: the peers in their order, then the ensemble; eval mode.
        source: the peer that the gallery attacks: `mat_dist.load`'s best, or the first candidate.
        data, samples_N: the test set, and the positions of the images that are attacked.
        classes: their names.
    """

    config: Config
    targets: dict[str, nn.Module]
    source: str
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

    def plan(self) -> AttackPlan:
        """The attack of the test set with one start; its steps are a share of eps."""
        return AttackPlan(test_steps(self.config))

    def batches(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(number of the chunk, images, labels) in the evaluator's chunks, whose number keys the attack's noise."""
        for chunk, rows in enumerate(self.samples_N.split(self.config.eval.chunk)):
            yield chunk, *pixels(self.data, rows, self.device, self.config)

    def craft(self, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, threat: Threat, plan: AttackPlan,
              chunk: int) -> Tensor:
        """The evaluator's AEs of its first start -> (B, C, H, W)."""
        return craft(model, x_BCHW, y_B, threat, plan, seed=self.config.run.seed, chunk=chunk)


def load_victims(opened: FinishedRun, images: int, device: torch.device) -> Victims:
    """Load models and `images` test images (a random subset, or all).

    Raises CheckpointError for a damaged checkpoint, DataError for images that are missing or others than those of the
    training, ConfigError for a model or data set of a plug-in that is not given.
    """
    config, models = opened.config, opened.models(device)
    data = load_data(config.data.model_copy(update={"download": False}), seed=config.run.seed,
                     batch_size=config.train.batch_size)
    if data.digest != opened.manifest.meta.data_digest:
        raise DataError("the images are not those of the training", f"data.name={config.data.name}",
                        "give the report the same data, in the place that config.yaml names")
    targets = {**dict(zip(opened.peers, models, strict=True)), ENSEMBLE: opened.ensemble(models=models)}
    samples_N = chosen_images(len(data.test), images)
    source = candidates(config.peers)[0]
    with suppress(CheckpointError):  # a damaged result: the page says that it is left out
        source = opened.chosen_peer() or source
    return Victims(config, targets, source, data.test, samples_N, data.classes, device)


@dataclass(frozen=True)
class Example:
    """One test image and its AE against `source`; images (C, H, W) in [0, 1] on the CPU.

    `answers` are (target, class and probability when clean, class and probability of the AE).
    """

    sample: int
    label: int
    clean: Tensor
    adversarial: Tensor
    answers: tuple[tuple[str, int, float, int, float], ...]


@dataclass(frozen=True)
class Measured:
    """Shares in [0, 1] of `n` test images.

    Attributes:
        transfer: by threat, [target][source peer, ..., clean]; the targets are the peers and the ensemble.
        by_eps, by_steps: by threat and target, (radius or steps, robust accuracy).
        answers: by target, right without and under attack, image by image.
        places, surface, slices: the loss around images, over multiples of the radius; surface is [random][adversarial],
            slices are along each direction by its name and peer.
        examples: the gallery.
    """

    n: int
    transfer: dict[str, list[list[float]]]
    by_eps: dict[str, dict[str, Points]]
    by_steps: dict[str, dict[str, Points]]
    answers: dict[str, Answers]
    places: list[float]
    surface: list[list[float]]
    slices: Slices
    examples: list[Example]


def measure(victims: Victims, say: Say) -> Measured:
    """Attack the victims's images in all the ways that the report shows."""
    with strict_arithmetic():
        say("transfer and classes")
        began = time.monotonic()
        transfer, answers = _transfer(victims)
        # That was one attack on every target for each threat; these are the others, by their gradient steps.
        steps = victims.plan().steps
        others = len(EPS_FACTORS) - 1 + sum({*STEPS, steps}) / steps
        say(f"about {duration((time.monotonic() - began) * others)} more")
        by_eps, by_steps = {}, {}
        for threat in victims.threats:
            say(f"accuracy against the radius, {threat.norm}")
            by_eps[threat.label] = _curves(victims, [
                (threat.eps * factor, threat.scaled(factor) if factor else None, victims.plan())
                for factor in EPS_FACTORS])
            say(f"accuracy against attack steps, {threat.norm}")
            by_steps[threat.label] = _curves(victims, [
                (count, threat, AttackPlan(count)) for count in sorted({*STEPS, steps})])
        say("loss surface and pictures")
        places = torch.linspace(-1, 1, SURFACE_PLACES).tolist()
        surface, slices = _around(victims, places)
        return Measured(len(victims.samples_N), transfer, by_eps, by_steps, answers, places, surface, slices,
                        _examples(victims))


def _transfer(victims: Victims) -> tuple[dict[str, list[list[float]]], dict[str, Answers]]:
    """Accuracy of every target on the AEs of every peer, last column clean; and each target under its own AEs."""
    shape = len(victims.targets), len(victims.peers) + 1
    right = {threat.label: torch.zeros(shape, dtype=torch.float64) for threat in victims.threats}
    answers = {name: Answers(correct={CLEAN: {}, UNION: {}}) for name in victims.targets}
    for chunk, x_BCHW, y_B in victims.batches():
        held = {name: correct(model, x_BCHW, y_B) for name, model in victims.targets.items()}
        clean = dict(held)
        for threat in victims.threats:
            for source, attacked in enumerate(victims.targets.items()):
                name, model = attacked
                adv = victims.craft(model, x_BCHW, y_B, threat, victims.plan(), chunk)
                held[name] = held[name] & correct(model, adv, y_B)
                if name in victims.peers:
                    for row, target in enumerate(victims.targets.values()):
                        right[threat.label][row, source] += correct(target, adv, y_B).sum().cpu()
            for row, name in enumerate(victims.targets):
                right[threat.label][row, -1] += clean[name].sum().cpu()
        samples = victims.samples_N.split(victims.config.eval.chunk)[chunk].tolist()
        for name, one in answers.items():
            for key, values in ((CLEAN, clean[name]), (UNION, held[name])):
                one.correct[key].update(zip(samples, values.tolist(), strict=True))
            one.labels.update(zip(samples, y_B.tolist(), strict=True))
    return {label: (table / len(victims.samples_N)).tolist() for label, table in right.items()}, answers


def robust_share(victims: Victims, model: nn.Module, threat: Threat | None, plan: AttackPlan) -> float:
    """Share of the images that are right when clean and under the attack; without a threat the clean share."""
    held = 0
    for chunk, x_BCHW, y_B in victims.batches():
        right_B = correct(model, x_BCHW, y_B)
        if threat is not None:
            right_B = right_B & correct(model, victims.craft(model, x_BCHW, y_B, threat, plan, chunk), y_B)
        held += int(right_B.sum())
    return held / len(victims.samples_N)


def _curves(victims: Victims, attacks: Sequence[tuple[float, Threat | None, AttackPlan]]) -> dict[str, Points]:
    """Of each target (x, robust accuracy) for each (x, threat, plan)."""
    return {name: [(x, robust_share(victims, model, threat, plan)) for x, threat, plan in attacks]
            for name, model in victims.targets.items()}


def _random_direction(threat: Threat, x_BCHW: Tensor, seed: int) -> Tensor:
    """A random perturbation of length eps: the norm's steepest step along a normal gradient, of all values."""
    noise = rng.normal(rng.key(seed, "report-direction"), x_BCHW.shape, device=x_BCHW.device, dtype=x_BCHW.dtype)
    return threat.region(x_BCHW, share=1.0).step(x_BCHW, noise, threat.eps) - x_BCHW


def _loss(model: nn.Module, x_BCHW: Tensor, y_B: Tensor) -> float:
    with torch.no_grad():
        return F.cross_entropy(model(x_BCHW.clamp(0, 1)), y_B).item()


def _around(victims: Victims, places: Sequence[float]) -> tuple[list[list[float]], Slices]:
    """Mean cross-entropy at x + a d + b r, cut to [0, 1]: d is the AE's perturbation, r a random one."""
    _, x_BCHW, y_B = next(victims.batches())
    x_BCHW, y_B = x_BCHW[:SURFACE_IMAGES], y_B[:SURFACE_IMAGES]
    surface: list[list[float]] = []
    slices: Slices = {"adversarial": {}, "random": {}}
    for index, (name, model) in enumerate(victims.peers.items()):
        spec = victims.config.peers[index].threat
        threat = Threat(spec.norm, spec.eps)
        d = victims.craft(model, x_BCHW, y_B, threat, victims.plan(), 0) - x_BCHW
        r = _random_direction(threat, x_BCHW, victims.config.run.seed)
        slices["adversarial"][name] = [_loss(model, x_BCHW + a * d, y_B) for a in places]
        slices["random"][name] = [_loss(model, x_BCHW + b * r, y_B) for b in places]
        if name == victims.source:
            surface = [[_loss(model, x_BCHW + a * d + b * r, y_B) for a in places] for b in places]
    return surface, slices


def _examples(victims: Victims) -> list[Example]:
    """Of the first images: up to half that fool the source, then ones that do not, in their order."""
    _, x_BCHW, y_B = next(victims.batches())
    model = victims.targets[victims.source]
    adv = victims.craft(model, x_BCHW, y_B, victims.source_threat, victims.plan(), 0)
    chosen = shown_rows(correct(model, x_BCHW, y_B) & ~correct(model, adv, y_B))
    rows = torch.tensor(chosen, device=x_BCHW.device)
    answers: list[list[tuple[str, int, float, int, float]]] = [[] for _ in rows]
    for name, target in victims.targets.items():
        with torch.no_grad():
            before = target(x_BCHW[rows]).softmax(-1).max(-1)
            after = target(adv[rows]).softmax(-1).max(-1)
        columns = (before.indices, before.values, after.indices, after.values)
        for found, one in zip(answers, zip(*(column.tolist() for column in columns), strict=True), strict=True):
            found.append((name, *one))
    return [Example(int(victims.samples_N[row]), int(y_B[row]), x_BCHW[row].cpu(), adv[row].cpu(), tuple(found))
            for row, found in zip(chosen, answers, strict=True)]


def png(image_CHW: Tensor) -> bytes:
    """A PNG of an image in [0, 1], as `to_see`."""
    to_pil_image(to_see(image_CHW)).save(stream := io.BytesIO(), "PNG", optimize=True)
    return stream.getvalue()
