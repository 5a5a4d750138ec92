"""All attacks on one chunk of images: predictions of every target on its own and on the others' AEs.

The result is a function of the chunk's images and number, of what is asked for and of the models: not of ranks or of
the past. Attack noise is keyed by (seed, norm, restart, chunk).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.apgd import APGD_L1_SHARE, apgd, narrowing
from mat_dist.attacks.attack_copy import folded
from mat_dist.attacks.memory import release
from mat_dist.attacks.norms import Threat
from mat_dist.attacks.open_rows import OpenRows
from mat_dist.attacks.pgd import likely_wrong, pgd
from mat_dist.attacks.random_search import noisy, random_search
from mat_dist.attacks.relaxation import Relaxation
from mat_dist.errors import NotReportable
from mat_dist.evaluation.autoattack import AutoAttacked, autoattack, chunk_seed
from mat_dist.evaluation.settings import AUTOATTACK, MENU, SQUARE, stand_in
from mat_dist.models.modes import frozen

NOISE_DRAWS = 20  # of `uniform` and of `gaussian`
PICTURES = 6
TRANSFER = "transfer"
FROM = f"{TRANSFER} from "  # how AEs of another run are called in results: transfer from RUN/peer
NO_ANSWER = -1  # the prediction of logits that are not finite
WHITE_BOX = frozenset(name for name, kind in MENU.items() if kind.white_box)


@dataclass(frozen=True)
class AttackPlan:
    """PGD of an evaluation: steps, restarts (the worst counts per image; None: the norm's), step length (default
    `reach` eps / steps).

    In an adaptive norm (l1) it is APGD, whose first step is `step_size` long, unless there is momentum; in a sparse one
    (l1) it is `narrowing`. `loss` is one of `ATTACK_LOSSES`; `start` is one of `Region.start`; `momentum` is that of
    `pgd`; `targets` is the number of classes that a targeted loss is led to, one after another.
    """

    steps: int
    restarts: int | None = 1
    step_size: float | None = None
    loss: str = "ce"
    start: str = "uniform"
    momentum: float | None = None
    reach: float | None = 2.5
    targets: int = 0

    def size(self, threat: Threat) -> float:
        """Length of the (first) step."""
        if self.step_size is not None:
            return self.step_size
        if self.adaptive(threat):
            return threat.info.apgd_step * threat.eps
        return (self.reach or 0) * threat.eps / self.steps

    def starts(self, threat: Threat) -> int:
        """How often it starts; towards each target class once, unless more is asked for."""
        return self.restarts or (1 if self.targets else threat.info.restarts)

    def adaptive(self, threat: Threat) -> bool:
        """Whether it is APGD."""
        return self.reach is None or (threat.kind.adaptive and self.momentum is None)


FGSM = AttackPlan(**MENU["fgsm"].plan)


@dataclass(frozen=True)
class Target:
    """What is evaluated."""

    name: str  # of the peer, or ensemble:<rule>
    model: nn.Module  # the classifier as it would be deployed
    # The modules that gradient attacks use; each AE is replayed on `model`. The model itself, but for a vote, which has
    # no gradient: then the mean-logit and the mean-probability ensemble.
    attacked: tuple[nn.Module, ...]
    # Of an ensemble, whose AEs join the candidates; an ensemble of one is not attacked beside its member.
    members: tuple[Target, ...] = ()

    @property
    def surrogates(self) -> bool:
        """Whether gradient attacks use other modules than the model itself."""
        return self.model not in self.attacked


@dataclass(frozen=True)
class Job:
    """What is done to every chunk."""

    threats: tuple[Threat, ...]  # each is an evaluation of its own
    plans: Mapping[str, AttackPlan]  # our gradient attacks, by name
    attacks: tuple[str, ...]  # names of all attacks, in order
    version: str = "standard"  # of AutoAttack
    custom: tuple[str, ...] = ()  # of AutoAttack
    transfer: bool = True  # replay each target's AEs on the others
    seed: int = 0  # of all noise
    queries: int = 1000  # of random search
    keep: bool = True  # the AEs of a chunk until its end: transfer, soundness checks and files need them


# As an attack begins: target, threat, attack, images that are right until now, images. No attack: it was the last.
Tell = Callable[[str, str, str, int, int], None]


def silent(target: str, threat: str, attack: str, held: int, of: int) -> None:
    """For whoever does not look at the progress."""


# ------------------------------------------------------------------------------------------------ one attack


def made(name: str, model: nn.Module, x_BCHW: Tensor, y_B: Tensor, threat: Threat, job: Job, chunk: int,
         found: list[AutoAttacked], open_B: Tensor | None = None) -> Iterator[Tensor]:
    """The AEs that one attack makes with one module; `found` gets what pyautoattack told. `open_B` as for `crafted`."""
    maker, open_B = MENU[name].maker, torch.ones_like(y_B, dtype=torch.bool) if open_B is None else open_B
    if maker == "pgd":
        yield from crafted(model, x_BCHW, y_B, threat, job.plans[name], seed=job.seed, chunk=chunk, open_B=open_B)
    elif maker == "noise":
        for draw in range(NOISE_DRAWS):
            yield noisy(name, x_BCHW, threat, stream=rng.key(job.seed, f"eval-{name}-{threat.norm}", draw, chunk))
    elif maker == "relaxation":
        with frozen(model):
            yield Relaxation(model, x_BCHW, y_B, threat, rng.key(job.seed, "eval-cr", chunk), open_B).run()
    elif maker == "search":
        stream = rng.key(job.seed, f"eval-search-attack-{threat.norm}", chunk)
        yield random_search(OpenRows(model, open_B), x_BCHW, y_B, threat=threat, queries=job.queries, stream=stream)
    else:
        version, custom, alone = (job.version, job.custom, None) if name == AUTOATTACK else ("standard", (), name)
        one = autoattack(model, x_BCHW, y_B, threat, version=version, custom=custom, alone=alone,
                         seed=chunk_seed(job.seed, threat.norm, chunk))
        found.append(one)
        yield one.adv_BCHW


def crafted(model: nn.Module, x_BCHW: Tensor, y_B: Tensor, threat: Threat, plan: AttackPlan, *, seed: int, chunk: int,
            first: int = 0, open_B: Tensor | None = None) -> Iterator[Tensor]:
    """The AEs of each restart of PGD, and of each target class. Where memory runs out, the chunk is attacked in
    halves, quarters, ...

    An image's noise depends neither on the parts nor on the others, so the result is the same but for rounding.

    Args:
        first: number of the first restart, which keys its noise.
        open_B: the images to attack (bool (B,)), looked at before each restart; the AEs of others mean nothing.
    """
    open_B = torch.ones_like(y_B, dtype=torch.bool) if open_B is None else open_B
    with frozen(model):
        goals = likely_wrong(model, x_BCHW, y_B, plan.targets) if plan.targets else [y_B]
    parts = 1
    for number in range(plan.starts(threat) * len(goals)):
        goal_B = goals[number % len(goals)]
        while True:
            size = -(-len(y_B) // parts)
            try:
                yield torch.cat([
                    craft(OpenRows(model, open_B[row:row + size]), x_BCHW[row:row + size], goal_B[row:row + size],
                          threat, plan, seed=seed, chunk=chunk, restart=first + number, first_row=row)
                    for row in range(0, len(y_B), size)])
                break
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise
                parts *= 2
                release(error)


def craft(model: nn.Module, x_BCHW: Tensor, y_B: Tensor, threat: Threat, plan: AttackPlan, *, seed: int, chunk: int,
          restart: int = 0, first_row: int = 0) -> Tensor:
    """The AEs of one start of PGD, keyed by (seed, norm, restart, chunk) -> (B, C, H, W).

    Args:
        y_B: true classes; with `plan.targets` the classes to lead to.
        first_row: row of the chunk at which x_BCHW starts, where it is a part of one.
    """
    stream = rng.key(seed, f"eval-{threat.norm}", restart, chunk)
    region, size = threat.region(x_BCHW, APGD_L1_SHARE), plan.size(threat)
    with frozen(model):
        if plan.adaptive(threat) and region.sparse:
            found = narrowing(model, x_BCHW, y_B, threat=threat, share=APGD_L1_SHARE, loss=plan.loss, steps=plan.steps,
                              stream=None if plan.start == "zero" else stream, first_row=first_row, step_size=size)
        else:
            start = region.start(plan.start, stream=stream, first_row=first_row)
            if not plan.adaptive(threat):
                return pgd(model, x_BCHW, y_B, region=region, start_BCHW=start, loss=plan.loss, steps=plan.steps,
                           step_size=size, momentum=plan.momentum)
            found = apgd(model, x_BCHW, y_B, region=region, start_BCHW=start, loss=plan.loss, steps=plan.steps,
                         step_size=size)
    return found.best_BCHW if plan.targets else found.wrong_BCHW


# ----------------------------------------------------------------------------------------------- all attacks


@dataclass
class Tried:
    """What one target did against one threat on a chunk."""

    # Attack -> predicted class per image (B,): on the first AE that it gets wrong, else on the last one.
    predictions: dict[str, Tensor] = field(default_factory=dict)
    advs: dict[str, Tensor] = field(default_factory=dict)  # attack -> those AEs (B, C, H, W)
    sources: dict[str, Tensor] = field(default_factory=dict)  # other target -> class per image on that one's AEs
    theirs: Tensor | None = None  # the AEs of others that belong to the predictions of TRANSFER (B, C, H, W)
    square_broke: int = 0  # images that only Square broke in AutoAttack
    warnings: list[str] = field(default_factory=list)  # of AutoAttack's own checks

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
    # argmax takes NaN for the largest value: all of class 0 would count as robust.
    return torch.where(logits_BK.isfinite().all(-1), logits_BK.argmax(-1), NO_ANSWER)


def correct(model: nn.Module, x_BCHW: Tensor, y_B: Tensor) -> Tensor:
    """Whether the largest logit is the true class -> bool (B,); logits that are not finite are no answer."""
    return predict(model, x_BCHW) == y_B


def attack_targets(targets: Sequence[Target], x_BCHW: Tensor, y_B: Tensor, job: Job, chunk: int,
                   tell: Tell = silent) -> tuple[dict[str, Tensor], dict[tuple[str, str], Tried]]:
    """Clean predictions by target, and what was tried, by (target, label of the threat).

    The members of an ensemble are attacked too, for their AEs, whether or not they are targets.
    """
    attacked = {t.name: t for target in targets for t in (target, *target.members)}
    clean = {name: predict(t.model, x_BCHW) for name, t in attacked.items()}
    names = {t.name for t in targets}
    tried: dict[tuple[str, str], Tried] = {}
    for threat in job.threats:
        mine = {name: attack_one(t, x_BCHW, y_B, clean[name], threat, job, chunk, tell)
                for name, t in attacked.items()}
        for target in targets:
            members = {member.name for member in target.members}
            for name in attacked:
                if name != target.name and (name in members or (job.transfer and name in names)):
                    mine[target.name].replay(name, target.model, mine[name].advs.values(), y_B, clean[target.name])
        tried |= {(target.name, threat.label): mine[target.name] for target in targets}
    return {target.name: clean[target.name] for target in targets}, tried


def attack_one(target: Target, x_BCHW: Tensor, y_B: Tensor, clean_B: Tensor, threat: Threat, job: Job,
               chunk: int, tell: Tell = silent) -> Tried:
    """All attacks of one threat on one target. Images that are wrong without an attack are not attacked.

    Gradient attacks use the modules `attacked`, ours their folded copies, the others the target itself; predictions
    are the target's own. A target that has no gradient of its own gets a gradient-free attack even where none is asked
    for, see `stand_in`.

    Raises NotReportable for a module whose output has no gradient with respect to the image.
    """
    for model in target.attacked:
        with frozen(model), torch.enable_grad():
            if not model(x_BCHW[:1].clone().requires_grad_(True)).requires_grad:
                raise NotReportable("the output has no gradient with respect to the image", target.name,
                                    "attack a differentiable form of the model: logits, without detach or argmax")
    tried, copies = Tried(), [folded(model, x_BCHW[:2]) for model in target.attacked]
    more = stand_in(job.attacks) if target.surrogates else None
    for name in (*job.attacks, *([more] if more else [])):
        tell(target.name, threat.label, name, int(tried.held(clean_B, y_B, tried.predictions).sum()), len(y_B))
        found: list[AutoAttacked] = []
        kind, open_B = MENU[name], clean_B == y_B
        models = (target.model,) if not kind.white_box else target.attacked if kind.maker == "package" else copies
        # One at a time: a list of all restarts' AEs would not fit into the memory that one attack needs.
        advs = (adv for model in models for adv in made(name, model, x_BCHW, y_B, threat, job, chunk, found, open_B))
        prediction_B, adv_BCHW = first_wrong(target.model, advs, y_B, clean_B, open_B)
        tried.predictions[name] = prediction_B
        if job.keep:
            tried.advs[name] = torch.where((clean_B == y_B).view(-1, 1, 1, 1), adv_BCHW, x_BCHW)
        tried.warnings += [text for one in found for text in one.warnings]
        if name == AUTOATTACK:
            tried.square_broke = max(one.square_broke for one in found)  # of a vote's surrogates the worse one
    tell(target.name, threat.label, "", int(tried.held(clean_B, y_B, tried.predictions).sum()), len(y_B))
    if SQUARE in job.attacks and not target.surrogates:
        alone_B = tried.held(clean_B, y_B, WHITE_BOX) & (tried.predictions[SQUARE] != y_B)
        tried.square_broke = max(tried.square_broke, int(alone_B.sum()))
    return tried


def replay_sources(sources: Sequence[Target], targets: Sequence[Target], x_BCHW: Tensor, y_B: Tensor,
                   clean: Mapping[str, Tensor], tried: Mapping[tuple[str, str], Tried], job: Job, chunk: int,
                   tell: Tell = silent) -> None:
    """Craft AEs with every source, by the evaluation's attacks, and add what they do to each target to `tried`.

    Images that a source gets wrong without an attack are attacked too: a target may get them right.
    """
    for threat in job.threats:
        for source in sources:
            advs = list(attack_one(source, x_BCHW, y_B, y_B, threat, job, chunk, tell).advs.values())
            for target in targets:
                mine, clean_B = tried[target.name, threat.label], clean[target.name]
                found_B = mine.replay(source.name, target.model, advs, y_B, clean_B)
                mine.predictions[f"{FROM}{source.name}"] = found_B


def first_wrong(model: nn.Module, advs: Iterable[Tensor], y_B: Tensor, clean_B: Tensor,
                open_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Predictions (B,) and AEs of the first batch that a model gets wrong, image by image; else of the last one.

    Args:
        advs: at least one batch.
        clean_B: predictions without an attack; kept where they are wrong.
        open_B: where they are right (bool (B,)); kept up to date for whoever makes the next batch.
    """
    prediction_B, adv_BCHW, open_B = clean_B, None, clean_B == y_B if open_B is None else open_B
    for adv in advs:
        prediction_B = torch.where(open_B, predict(model, adv), prediction_B)
        adv_BCHW = adv if adv_BCHW is None else torch.where(open_B.view(-1, 1, 1, 1), adv, adv_BCHW)
        open_B &= prediction_B == y_B
        if not open_B.any():
            break
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


def shown_rows(fooled_B: Tensor) -> list[int]:
    """Rows to show as pictures: up to half whose AE fools the model, then others, in their order."""
    fooled = fooled_B.nonzero()[:, 0].tolist()[:PICTURES // 2]
    return [*fooled, *[row for row in range(len(fooled_B)) if row not in fooled][:PICTURES - len(fooled)]]


def scaled(change_CHW: Tensor) -> Tensor:
    """A perturbation as an image: 0 is grey, its largest pixel white or black."""
    return 0.5 + change_CHW / (2 * (float(change_CHW.abs().amax()) or 1.0))


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
