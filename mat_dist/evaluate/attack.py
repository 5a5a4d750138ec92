"""All attacks on one chunk of images: predictions of every target on its own and on the others' AEs.

The result is a function of the chunk's images and number, the request and the models: not of ranks or of the past.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist.errors import NotReportable
from mat_dist.evaluate.autoattack import autoattack, chunk_seed
from mat_dist.evaluate.targets import Target
from mat_dist.evaluator import AttackPlan, restarts
from mat_dist.models.modes import frozen
from mat_dist.threats import Threat

TRANSFER = "transfer"
NO_ANSWER = -1  # the prediction of logits that are not finite


@dataclass(frozen=True)
class Job:
    """What is done to every chunk.

    Attributes:
        threats: each is an evaluation of its own.
        plans: our gradient attacks, by name.
        attacks: names of all attacks, in order.
        version, custom: of AutoAttack.
        transfer: replay each target's AEs on the others.
        seed: of all noise.
    """

    threats: tuple[Threat, ...]
    plans: Mapping[str, AttackPlan]
    attacks: tuple[str, ...]
    version: str
    custom: tuple[str, ...]
    transfer: bool
    seed: int


@dataclass
class Tried:
    """What one target did against one threat on a chunk.

    Attributes:
        predictions: attack -> predicted class per image (B,): on the first AE that it gets wrong, else on the last one.
        advs: attack -> those AEs (B, C, H, W).
        sources: other target -> predicted class per image on that one's AEs.
        square_broke: images that only Square broke in AutoAttack.
        warnings: of AutoAttack's own checks.
    """

    predictions: dict[str, Tensor] = field(default_factory=dict)
    advs: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, Tensor] = field(default_factory=dict)
    square_broke: int = 0
    warnings: list[str] = field(default_factory=list)

    def held(self, y_B: Tensor) -> Tensor:
        """Whether each image is right under all attacks so far -> bool (B,)."""
        held_B = torch.ones_like(y_B, dtype=torch.bool)
        for prediction_B in self.predictions.values():
            held_B &= prediction_B == y_B
        return held_B


@torch.no_grad()
def predict(model: nn.Module, x_BCHW: Tensor) -> Tensor:
    """The class of the largest logit -> int64 (B,); NO_ANSWER where a logit is not finite."""
    logits_BK = model(x_BCHW)
    return torch.where(logits_BK.isfinite().all(-1), logits_BK.argmax(-1), NO_ANSWER)


def attack_targets(targets: Sequence[Target], x_BCHW: Tensor, y_B: Tensor, job: Job,
                   chunk: int) -> tuple[dict[str, Tensor], dict[tuple[str, str], Tried]]:
    """Clean predictions by target, and what was tried, by (target, label of the threat)."""
    clean = {t.name: predict(t.model, x_BCHW) for t in targets}
    tried: dict[tuple[str, str], Tried] = {}
    for threat in job.threats:
        for target in targets:
            tried[target.name, threat.label] = attack_one(target, x_BCHW, y_B, clean[target.name], threat, job, chunk)
        if job.transfer and len(targets) > 1:
            for target in targets:
                _replay(target, targets, threat, y_B, clean[target.name], tried)
    return clean, tried


def _replay(target: Target, targets: Sequence[Target], threat: Threat, y_B: Tensor, clean_B: Tensor,
            tried: Mapping[tuple[str, str], Tried]) -> None:
    """The other targets' AEs on one target: by source, and the first that it gets wrong as the attack TRANSFER."""
    mine = tried[target.name, threat.label]
    prediction_B = clean_B
    for source in targets:
        if source is not target:
            advs = list(tried[source.name, threat.label].advs.values())
            mine.sources[source.name] = first_wrong(target.model, advs, y_B, clean_B)[0]
            prediction_B = torch.where(prediction_B == y_B, mine.sources[source.name], prediction_B)
    mine.predictions[TRANSFER] = prediction_B


def attack_one(target: Target, x_BCHW: Tensor, y_B: Tensor, clean_B: Tensor, threat: Threat, job: Job,
               chunk: int) -> Tried:
    """All attacks of one threat on one target. Images that are wrong without an attack are not attacked.

    Raises NotReportable for a module whose output has no gradient with respect to the image.
    """
    for model in target.attacked:
        with frozen(model), torch.enable_grad():
            if not model(x_BCHW[:1].clone().requires_grad_(True)).requires_grad:
                raise NotReportable("the output has no gradient with respect to the image", target.name,
                                    "attack a differentiable form of the model: logits, without detach or argmax")
    tried = Tried()
    for name in job.attacks:
        advs = [adv for model in target.attacked
                for adv in _crafted(model, name, x_BCHW, y_B, threat, job, chunk, tried)]
        prediction_B, adv_BCHW = first_wrong(target.model, advs, y_B, clean_B)
        tried.predictions[name] = prediction_B
        tried.advs[name] = torch.where((clean_B == y_B).view(-1, 1, 1, 1), adv_BCHW, x_BCHW)
    return tried


def _crafted(model: nn.Module, name: str, x_BCHW: Tensor, y_B: Tensor, threat: Threat, job: Job, chunk: int,
             tried: Tried) -> Iterator[Tensor]:
    """The AEs that one attack makes with one module."""
    if name != "autoattack":
        yield from crafted(model, x_BCHW, y_B, threat, job.plans[name], seed=job.seed, chunk=chunk)
        return
    found = autoattack(model, x_BCHW, y_B, threat, version=job.version, custom=job.custom,
                       seed=chunk_seed(job.seed, threat.norm, chunk))
    tried.square_broke += found.square_broke
    tried.warnings += found.warnings
    yield found.adv_BCHW


def crafted(model: nn.Module, x_BCHW: Tensor, y_B: Tensor, threat: Threat, plan: AttackPlan, *, seed: int, chunk: int,
            first: int = 0) -> Iterator[Tensor]:
    """The AEs of each restart of PGD. Where memory runs out, the chunk is attacked in halves, quarters, ...

    An image's noise does not depend on the parts, so the result is the same but for the rounding of other batch sizes.
    """
    parts, one = 1, replace(plan, restarts=1)
    for restart in range(first, first + plan.restarts):
        while True:
            size = -(-len(y_B) // parts)
            try:
                yield torch.cat([adv for row in range(0, len(y_B), size) for adv in restarts(
                    model, x_BCHW[row:row + size], y_B[row:row + size], threat, one, seed=seed, chunk=chunk,
                    first=restart, first_row=row)])
                break
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                parts *= 2


def first_wrong(model: nn.Module, advs: Sequence[Tensor], y_B: Tensor, clean_B: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions (B,) and AEs of the first batch that a model gets wrong, image by image; else of the last one.

    Args:
        clean_B: predictions without an attack; kept where they are wrong.
    """
    prediction_B, adv_BCHW = clean_B, advs[0]
    for adv in advs:
        open_B = prediction_B == y_B
        prediction_B = torch.where(open_B, predict(model, adv), prediction_B)
        adv_BCHW = torch.where(open_B.view(-1, 1, 1, 1), adv, adv_BCHW)
    return prediction_B, adv_BCHW


def strongest(tried: Tried, y_B: Tensor) -> Tensor:
    """Image by image the first AE that the target gets wrong, else the last attack's -> (B, C, H, W)."""
    *_, best = tried.advs.values()
    open_B = torch.ones_like(y_B, dtype=torch.bool)
    for name, adv_BCHW in tried.advs.items():
        wrong_B = tried.predictions[name] != y_B
        best = torch.where((open_B & wrong_B).view(-1, 1, 1, 1), adv_BCHW, best)
        open_B &= ~wrong_B
    return best


def rounded(adv_BCHW: Tensor) -> Tensor:
    """AEs as bytes, as an image file would hold them -> uint8 (B, C, H, W)."""
    return (adv_BCHW * 255).round().to(torch.uint8)


def table(clean: Mapping[str, Tensor], tried: Mapping[tuple[str, str], Tried]) -> dict[str, Any]:
    """The predictions as JSON values: target -> {"clean": [...], "threats": {label: {attack: [...]}}}."""
    rows: dict[str, Any] = {name: {"clean": classes_B.tolist(), "threats": {}} for name, classes_B in clean.items()}
    for (name, label), one in tried.items():
        rows[name]["threats"][label] = {attack: p.tolist() for attack, p in one.predictions.items()}
    return rows


def transfer_counts(tried: Mapping[tuple[str, str], Tried], y_B: Tensor) -> dict[str, dict[str, dict[str, int]]]:
    """Images right on the AEs of another target: threat -> source -> target -> number."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for (name, label), one in tried.items():
        for source, prediction_B in one.sources.items():
            counts.setdefault(label, {}).setdefault(source, {})[name] = int((prediction_B == y_B).sum())
    return counts
