"""All attacks on one chunk of images: predictions of every target on its own and on the others' AEs.

The result is a function of the chunk's images and number, the request and the models: not of ranks or of the past.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist.attacks.norms import Threat
from mat_dist.errors import NotReportable
from mat_dist.evaluation.autoattack import Found
from mat_dist.evaluation.craft import Job, made
from mat_dist.evaluation.menu import AUTOATTACK, MENU, SQUARE, stand_in
from mat_dist.evaluation.targets import Target
from mat_dist.models.modes import frozen

TRANSFER = "transfer"
NO_ANSWER = -1  # the prediction of logits that are not finite
WHITE_BOX = frozenset(name for name, kind in MENU.items() if kind.white_box)


@dataclass
class Tried:
    """What one target did against one threat on a chunk.

    Attributes:
        predictions: attack -> predicted class per image (B,): on the first AE that it gets wrong, else on the last one.
        advs: attack -> those AEs (B, C, H, W).
        sources: other target -> predicted class per image on that one's AEs.
        theirs: the AEs of others that belong to the predictions of TRANSFER (B, C, H, W); None where there are none.
        square_broke: images that only Square broke in AutoAttack.
        warnings: of AutoAttack's own checks.
    """

    predictions: dict[str, Tensor] = field(default_factory=dict)
    advs: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, Tensor] = field(default_factory=dict)
    theirs: Tensor | None = None
    square_broke: int = 0
    warnings: list[str] = field(default_factory=list)

    def held(self, clean_B: Tensor, y_B: Tensor, names: Container[str]) -> Tensor:
        """Whether each image is right without an attack and under those of `names` -> bool (B,).

        Args:
            clean_B: predictions without an attack.
        """
        held_B = clean_B == y_B
        for name, prediction_B in self.predictions.items():
            if name in names:
                held_B &= prediction_B == y_B
        return held_B

    def replay(self, source: str, model: nn.Module, advs: Iterable[Tensor], y_B: Tensor, clean_B: Tensor) -> Tensor:
        """Add what the AEs of another target do to this one, `model` -> predicted class per image.

        TRANSFER keeps, image by image, the first source that this target gets wrong.
        """
        found_B, adv_BCHW = first_wrong(model, advs, y_B, clean_B)
        self.sources[source] = found_B
        before_B = self.predictions.get(TRANSFER, clean_B)
        open_B = before_B == y_B
        self.predictions[TRANSFER] = torch.where(open_B, found_B, before_B)
        self.theirs = adv_BCHW if self.theirs is None else torch.where(open_B.view(-1, 1, 1, 1), adv_BCHW, self.theirs)
        return found_B


@torch.no_grad()
def predict(model: nn.Module, x_BCHW: Tensor) -> Tensor:
    """The class of the largest logit -> int64 (B,); NO_ANSWER where a logit is not finite."""
    logits_BK = model(x_BCHW)
    return torch.where(logits_BK.isfinite().all(-1), logits_BK.argmax(-1), NO_ANSWER)


def attack_targets(targets: Sequence[Target], x_BCHW: Tensor, y_B: Tensor, job: Job,
                   chunk: int) -> tuple[dict[str, Tensor], dict[tuple[str, str], Tried]]:
    """Clean predictions by target, and what was tried, by (target, label of the threat).

    The members of an ensemble are attacked too, for their AEs, whether or not they are targets.
    """
    attacked = {t.name: t for target in targets for t in (target, *target.members)}
    clean = {name: predict(t.model, x_BCHW) for name, t in attacked.items()}
    names = {t.name for t in targets}
    tried: dict[tuple[str, str], Tried] = {}
    for threat in job.threats:
        mine = {name: attack_one(t, x_BCHW, y_B, clean[name], threat, job, chunk) for name, t in attacked.items()}
        for target in targets:
            members = {member.name for member in target.members}
            for name in attacked:
                if name != target.name and (name in members or (job.transfer and name in names)):
                    mine[target.name].replay(name, target.model, mine[name].advs.values(), y_B, clean[target.name])
        tried |= {(target.name, threat.label): mine[target.name] for target in targets}
    return {target.name: clean[target.name] for target in targets}, tried


def attack_one(target: Target, x_BCHW: Tensor, y_B: Tensor, clean_B: Tensor, threat: Threat, job: Job,
               chunk: int) -> Tried:
    """All attacks of one threat on one target. Images that are wrong without an attack are not attacked.

    Gradient attacks use the modules `attacked`, the others the target itself. A target that has no gradient of its
    own gets a gradient-free attack even where none is asked for, see `stand_in`.

    Raises NotReportable for a module whose output has no gradient with respect to the image.
    """
    for model in target.attacked:
        with frozen(model), torch.enable_grad():
            if not model(x_BCHW[:1].clone().requires_grad_(True)).requires_grad:
                raise NotReportable("the output has no gradient with respect to the image", target.name,
                                    "attack a differentiable form of the model: logits, without detach or argmax")
    tried = Tried()
    more = stand_in(job.attacks) if target.surrogates else None
    for name in (*job.attacks, *([more] if more else [])):
        found: list[Found] = []
        models = target.attacked if MENU[name].white_box else (target.model,)
        # One at a time: a list of all restarts' AEs would not fit into the memory that one attack needs.
        advs = (adv for model in models for adv in made(name, model, x_BCHW, y_B, threat, job, chunk, found))
        prediction_B, adv_BCHW = first_wrong(target.model, advs, y_B, clean_B)
        tried.predictions[name] = prediction_B
        tried.advs[name] = torch.where((clean_B == y_B).view(-1, 1, 1, 1), adv_BCHW, x_BCHW)
        tried.warnings += [text for one in found for text in one.warnings]
        if name == AUTOATTACK:
            tried.square_broke = max(one.square_broke for one in found)  # of a vote's surrogates the worse one
    if SQUARE in job.attacks and not target.surrogates:
        alone_B = tried.held(clean_B, y_B, WHITE_BOX) & (tried.predictions[SQUARE] != y_B)
        tried.square_broke = max(tried.square_broke, int(alone_B.sum()))
    return tried


def first_wrong(model: nn.Module, advs: Iterable[Tensor], y_B: Tensor, clean_B: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions (B,) and AEs of the first batch that a model gets wrong, image by image; else of the last one.

    Args:
        advs: at least one batch.
        clean_B: predictions without an attack; kept where they are wrong.
    """
    prediction_B, adv_BCHW = clean_B, None
    for adv in advs:
        open_B = prediction_B == y_B
        prediction_B = torch.where(open_B, predict(model, adv), prediction_B)
        adv_BCHW = adv if adv_BCHW is None else torch.where(open_B.view(-1, 1, 1, 1), adv, adv_BCHW)
    assert adv_BCHW is not None
    return prediction_B, adv_BCHW


def strongest(tried: Tried, y_B: Tensor) -> Tensor:
    """Image by image the first AE, its own or another target's, that the target gets wrong, else the last attack's
    -> (B, C, H, W)."""
    *_, best = tried.advs.values()
    open_B = torch.ones_like(y_B, dtype=torch.bool)
    theirs = {} if tried.theirs is None else {TRANSFER: tried.theirs}
    for name, adv_BCHW in {**tried.advs, **theirs}.items():
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
