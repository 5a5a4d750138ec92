"""Soundness checks: is an accuracy under attack worth reporting? Sources and thresholds: docs/evaluation.md.

`examine` counts on one chunk, so that ranks share the work and a result does not depend on them; `judge` compares
the sums over chunks with the thresholds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.attack_copy import folded
from mat_dist.attacks.norms import Threat
from mat_dist.attacks.random_search import noisy, random_search
from mat_dist.checkpoints import Meta
from mat_dist.config.schema import Config
from mat_dist.evaluation.attacks import (
    FGSM,
    NOISE_DRAWS,
    TRANSFER,
    WHITE_BOX,
    AttackPlan,
    Job,
    OpenRows,
    Target,
    Tell,
    Tried,
    crafted,
    first_wrong,
    predict,
    silent,
)
from mat_dist.evaluation.results import CHANCE, FEW, FEWEST_IMAGES, GLANCE, UNDERTRAINED, Verdict, wilson_interval
from mat_dist.evaluation.settings import RELAXATION
from mat_dist.models.modes import frozen

Attempts = Callable[[Tensor], Iterable[Tensor]]  # images that are open (bool (B,)) -> AEs, batch after batch
CHECKING = "soundness checks"  # what goes on, to people
OWN_STEPS = 20  # of our attacks where the request has no PGD
SEARCH_QUERIES = 300
SAME_LOGITS = 1e-4  # largest distance of normalised logits that count as equal; AutoAttack's own figure
BATCHES = (1, 7, 64)
MOST_ZERO = 0.01  # share of images whose gradient may vanish
BEATEN, MORE = 0.002, 0.01  # shares that another attack may break beyond ours: any; ours with twice the steps
FROM_CHANCE = 0.1  # of the way from chance to all right, which a model that has learnt something has gone
FEWEST_EPOCHS = 5  # passes over the training images, where the weights were not trained before
LARGE = 0.5  # change of every pixel that should reach chance

# In the order in which they are told; what each means is in docs/evaluation.md.
CHECKS = ("images", "eval mode", "logits", "deterministic", "batch size", "zero gradients", "inside ball and box",
          "noise", "one step", "gradient-free", "transfer", "more steps", "monotone", "large eps", "autoattack")


def examine(target: Target, x_BCHW: Tensor, y_B: Tensor, tried: Mapping[str, Tried], job: Job,
            chunk: int, tell: Tell = silent) -> dict[str, dict[str, int]]:
    """Counts on one chunk: {"": of the model, label of a threat: of the attacks on it}.

    Args:
        tried: what the evaluation's attacks found on the chunk, by label of the threat.
    """
    counts = {"": _examine_model(target, x_BCHW, y_B)}
    for threat in job.threats:
        one = tried[threat.label]
        tell(target.name, threat.label, CHECKING, 0, 0)
        counts[threat.label] = _examine_attacks(target, x_BCHW, y_B, threat, one, job, chunk)
    return counts


# ------------------------------------------------------------------------------------------------ the model


def _examine_model(target: Target, x_BCHW: Tensor, y_B: Tensor) -> dict[str, int]:
    """Numbers of images for which something about the model is wrong."""
    with torch.no_grad():
        logits = [target.model(x_BCHW) for _ in range(5)]
        parts = [torch.cat([target.model(part) for part in x_BCHW.split(size)]) for size in BATCHES]
    first = logits[0]
    sums_to_one = ((first >= -1e-5) & (first <= 1 + 1e-5)).all(-1) & ((first.sum(-1) - 1).abs() < 1e-5)
    wrong = {
        "images": ((x_BCHW < 0) | (x_BCHW > 1) | ~x_BCHW.isfinite()).flatten(1).any(1),
        "logits": sums_to_one,
        "deterministic": torch.stack([_differs(first, other) for other in logits[1:]]).any(0),
        "batch size": torch.stack([_differs(first, other) for other in parts]).any(0),
        "zero gradients": torch.stack([_no_gradient(m, x_BCHW, y_B) for m in target.attacked]).any(0),
    }
    training = sum(module.training for module in target.model.modules())
    return {"n": len(y_B), "classes": first.shape[-1], "eval mode": training,
            **{name: int(rows.sum()) for name, rows in wrong.items()}}


def _differs(one_BK: Tensor, other_BK: Tensor) -> Tensor:
    """Whether two outputs for the same images differ by more than rounding -> bool (B,)."""
    distance_B = (F.normalize(one_BK, dim=-1) - F.normalize(other_BK, dim=-1)).norm(dim=-1)
    return (distance_B > SAME_LOGITS) | (one_BK.argmax(-1) != other_BK.argmax(-1))


def _no_gradient(model: nn.Module, x_BCHW: Tensor, y_B: Tensor) -> Tensor:
    """Images whose cross-entropy has an all-zero or non-finite gradient -> bool (B,)."""
    x = x_BCHW.detach().clone().requires_grad_(True)
    with frozen(model), torch.enable_grad():
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y_B, reduction="sum"), x)
    size_B = gradient.flatten(1).abs().amax(1)
    return (size_B == 0) | ~size_B.isfinite()


# ------------------------------------------------------------------------------------------------ the attacks


def _examine_attacks(target: Target, x_BCHW: Tensor, y_B: Tensor, threat: Threat, tried: Tried, job: Job,
                     chunk: int) -> dict[str, int]:
    """Numbers of images that other attacks break beyond those of the evaluation, and accuracies at other radii."""
    # A target without gradient has no white-box attack to compare with: all that was found counts.
    held_B = tried.held(predict(target.model, x_BCHW), y_B, tried.predictions if target.surrogates else WHITE_BOX)
    theirs = [] if tried.theirs is None else [tried.theirs]
    outside = torch.stack([_outside(adv, x_BCHW, threat) for adv in (*tried.advs.values(), *theirs)]).any(0)
    counts = {"n": len(y_B), "inside ball and box": int(outside.sum()), "square": tried.square_broke,
              "autoattack": len(tried.warnings)}
    if TRANSFER in tried.predictions and not target.surrogates:
        counts["transfer"] = int((held_B & (tried.predictions[TRANSFER] != y_B)).sum())

    copies = [folded(model, x_BCHW[:2]) for model in target.attacked]
    asked = OpenRows(target.model, held_B)

    def under(radius: Threat, plan: AttackPlan, first: int = 0) -> Attempts:
        return lambda open_B: (adv for model in copies for adv in crafted(
            model, x_BCHW, y_B, radius, plan, seed=job.seed, chunk=chunk, first=first, open_B=open_B))

    def broken(advs: Attempts, model: nn.Module = asked, among_B: Tensor = held_B) -> int:
        open_B = among_B.clone()
        return int((first_wrong(model, advs(open_B), y_B, y_B, open_B)[0] != y_B).sum())

    def held_under(radius: Threat, plan: AttackPlan) -> int:
        return len(y_B) - broken(under(radius, plan), target.model, torch.ones_like(held_B))

    noise = (noisy(kind, x_BCHW, threat, stream=rng.key(job.seed, f"{purpose}-{threat.norm}", draw, chunk))
             for kind, purpose in (("uniform", "eval-noise"), ("gaussian", "eval-gaussian-noise"))
             for draw in range(NOISE_DRAWS))
    plan = job.plans.get("pgd") or job.plans.get("cw") or AttackPlan(OWN_STEPS)
    white = torch.ones(x_BCHW.shape[1:])
    more = AttackPlan(2 * plan.steps)  # of the default length: a step that is too short or too long shows too
    for name, eps in (("half", threat.eps / 2), ("whole", threat.eps), ("double", threat.eps * 2)):
        counts[name] = held_under(Threat(threat.norm, eps), AttackPlan(plan.steps))
    if threat.kind.allowed(white).min() == 1:  # else values that stay as they are may tell the class
        large = LARGE * threat.kind.span(white)
        counts["large eps"] = held_under(Threat(threat.norm, large), AttackPlan(max(OWN_STEPS, plan.steps)))
    return counts | {
        "noise": broken(lambda _: noise), "one step": broken(under(threat, FGSM)),
        "gradient-free": broken(lambda _: [random_search(
            asked, x_BCHW, y_B, threat=threat, queries=SEARCH_QUERIES,
            stream=rng.key(job.seed, f"eval-search-{threat.norm}", chunk))]),
        "more steps": broken(under(threat, more, first=plan.starts(threat))),
    }


def _outside(adv_BCHW: Tensor, x_BCHW: Tensor, threat: Threat) -> Tensor:
    """Images whose AE leaves the ball or the box -> bool (B,).

    The norm may exceed eps by 1e-6 of it, and by what float32 rounding of x + d adds: 2^-25 for each pixel near 1.
    pyautoattack does not round inward, and its results are not altered here.
    """
    rounding = 2.0**-24 * threat.kind.span(torch.ones(x_BCHW.shape[1:]))
    in_box = ((adv_BCHW >= 0) & (adv_BCHW <= 1)).flatten(1).all(1)
    return ~(in_box & (threat.distance(adv_BCHW, x_BCHW) <= threat.eps * (1 + 1e-6) + rounding))


# ------------------------------------------------------------------------------------------------ judgement


def total(counts: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Sums over chunks (at least one); `classes` is the same in all."""
    sums: dict[str, Counter[str]] = {}
    for chunk in counts:
        for threat, found in chunk.items():
            sums.setdefault(threat, Counter()).update(found)
    sums[""]["classes"] = counts[0][""]["classes"]
    return {threat: dict(found) for threat, found in sums.items()}


def judge(sums: Mapping[str, Mapping[str, int]]) -> list[Verdict]:
    """The verdicts on one target, in the order of CHECKS."""
    classes = sums[""]["classes"]
    return [Verdict(check, threat, *_judged(check, found, classes))
            for threat, found in sorted(sums.items()) for check in CHECKS
            if check in found or (check == "monotone" and "half" in found)]


def judge_headline(clean: float, labels: Sequence[int], classes: int, attacks: Iterable[str] = ()) -> list[Verdict]:
    """Whether an accuracy may stand for a model: on enough images, of one that has learnt something, and under an
    attack that is not for a look alone.

    Chance is what the answer that is right most often would give.

    Args:
        clean: share that is right without an attack.
        labels: of the images.
        attacks: names of those that were made; others, such as TRANSFER, do not count.
    """
    white = WHITE_BOX.intersection(attacks)
    n, chance = len(labels), max(1 / classes, Counter(labels).most_common(1)[0][1] / len(labels))
    learnt = wilson_interval(clean, n)[0] > chance + FROM_CHANCE * (1 - chance)
    return [Verdict(FEW, "", n >= FEWEST_IMAGES, f"{n} images of at least {FEWEST_IMAGES}"),
            Verdict(CHANCE, "", learnt, f"{100 * clean:.1f} % right without an attack, by chance {100 * chance:.1f} %"),
            *[Verdict(GLANCE, "", len(white) > 1, f"{RELAXATION} and {len(white) - 1} others that follow gradients")
              for _ in white & {RELAXATION}]]


def judge_training(config: Config, meta: Meta, step: int) -> Verdict:
    """Whether the training is over, and was long enough to tell what it is worth.

    Args:
        meta, step: of the newest checkpoint. What another program trained is not judged.
    """
    theirs, cut = "imported" in meta.extra, config.train.max_steps is not None and step >= config.train.max_steps
    started = all(peer.init_from for peer in config.peers if not peer.frozen)
    over = meta.epoch >= config.train.epochs or cut
    found = f"{meta.epoch} of {config.train.epochs} epochs" + (f", at least {FEWEST_EPOCHS} are needed" if over else "")
    return Verdict(UNDERTRAINED, "", theirs or (over and (started or meta.epoch >= FEWEST_EPOCHS)), found)


def _judged(check: str, found: Mapping[str, int], classes: int) -> tuple[bool, str]:
    """Whether a check is passed, and what was found."""
    n, number = found["n"], found.get(check, 0)
    match check:
        case "eval mode":
            return number == 0, f"{number} modules in training mode"
        case "logits":  # one image whose logits look like probabilities by chance is none
            return number < n, f"{number} of {n} outputs are probabilities"
        case "zero gradients":
            return number <= MOST_ZERO * n, f"{number} of {n} images have no gradient"
        case "images" | "deterministic" | "batch size":
            return number == 0, f"{number} of {n} images"
        case "inside ball and box":
            return number == 0, f"{number} of {n} AEs outside"
        case "autoattack":
            return number == 0, f"{number} warnings"
        case "monotone":
            half, whole, double = found["half"], found["whole"], found["double"]
            good = all(_beaten(after - before, n, BEATEN)[0] for before, after in ((half, whole), (whole, double)))
            return good, f"{half}, {whole}, {double} of {n} withstand eps / 2, eps, 2 eps"
        case "large eps":
            chance = 1 / classes
            most = n * chance + 2 * math.sqrt(n * chance * (1 - chance))
            return number <= most, f"{number} of {n} withstand; chance is {n * chance:.1f}"
        case "gradient-free":
            number = max(number, found["square"])
    return _beaten(number, n, MORE if check == "more steps" else BEATEN)


def _beaten(number: int, n: int, share: float) -> tuple[bool, str]:
    """Whether `number` more broken images of `n` are within max(share, 2 standard errors of a count)."""
    return number <= max(share * n, 2 * math.sqrt(max(number, 0))), f"{number} of {n} images more"
