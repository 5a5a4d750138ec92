"""What the report measures itself, on few images: transfer, accuracy against radius and steps, the loss around images,
pictures. The evaluator's attack with one start; the numbers of record are those of the evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_dist import rng
from mat_dist.attacks.norms import Threat, per_image
from mat_dist.evaluation.attacks import AttackPlan, correct
from mat_dist.evaluation.chunks import strict_arithmetic
from mat_dist.report.evaluations import Outcome
from mat_dist.report.subject import Subject
from mat_dist.runs.rates import duration

EPS_FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
STEPS = (1, 2, 5, 10, 20, 50)
PICTURES = 6
SURFACE_IMAGES = 16
SURFACE_PLACES = 21
Say = Callable[[str], None]


@dataclass(frozen=True)
class Picture:
    """One test image and its AE against `source`; images (C, H, W) in [0, 1] on the CPU.

    `answers` are (target, class and probability when clean, class and probability of the AE).
    """

    sample: int
    label: int
    clean: Tensor
    adversarial: Tensor
    answers: tuple[tuple[str, int, float, int, float], ...]


@dataclass(frozen=True)
class Slices:
    """Mean loss of one peer over steps (in radii) along its AE's perturbation, and along a random one."""

    peer: str
    adversarial: list[float]
    random: list[float]


@dataclass(frozen=True)
class Measured:
    """Shares in [0, 1] of `n` test images.

    Attributes:
        transfer: by threat, [target][source peer, ..., clean]; the targets are the peers and the ensemble.
        by_eps, by_steps: by threat and target, (radius or steps, robust accuracy).
        outcomes: by target, what each image met.
        places, surface, slices: the loss around images, over multiples of the radius; surface is [random][adversarial].
        pictures: the gallery.
    """

    n: int
    transfer: dict[str, list[list[float]]]
    by_eps: dict[str, dict[str, list[tuple[float, float]]]]
    by_steps: dict[str, dict[str, list[tuple[float, float]]]]
    outcomes: dict[str, list[Outcome]]
    places: list[float]
    surface: list[list[float]]
    slices: list[Slices]
    pictures: list[Picture]


def measure(subject: Subject, say: Say) -> Measured:
    """Attack the subject's images in all the ways that the report shows."""
    with strict_arithmetic():
        say("transfer and classes")
        began = time.monotonic()
        transfer, outcomes = _transfer(subject)
        # That was one attack on every target for each threat; these are the others, by their gradient steps.
        steps = subject.plan().steps
        others = len(EPS_FACTORS) - 1 + sum({*STEPS, steps}) / steps
        say(f"about {duration((time.monotonic() - began) * others)} more")
        by_eps, by_steps = {}, {}
        for threat in subject.threats:
            say(f"accuracy against the radius, {threat.norm}")
            by_eps[threat.label] = _by_eps(subject, threat)
            say(f"accuracy against attack steps, {threat.norm}")
            by_steps[threat.label] = _by_steps(subject, threat)
        say("loss surface and pictures")
        places = torch.linspace(-1, 1, SURFACE_PLACES).tolist()
        surface, slices = _around(subject, places)
        return Measured(len(subject.samples_N), transfer, by_eps, by_steps, outcomes, places, surface, slices,
                        _pictures(subject))


def _transfer(subject: Subject) -> tuple[dict[str, list[list[float]]], dict[str, list[Outcome]]]:
    """Accuracy of every target on the AEs of every peer, last column clean; and each target under its own AEs."""
    shape = len(subject.targets), len(subject.peers) + 1
    right = {threat.label: torch.zeros(shape, dtype=torch.float64) for threat in subject.threats}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in subject.targets}
    for chunk, x_BCHW, y_B in subject.batches():
        held = {name: correct(model, x_BCHW, y_B) for name, model in subject.targets.items()}
        clean = dict(held)
        for threat in subject.threats:
            for source, attacked in enumerate(subject.targets.items()):
                name, model = attacked
                adv = subject.craft(model, x_BCHW, y_B, threat, subject.plan(), chunk)
                held[name] = held[name] & correct(model, adv, y_B)
                if name in subject.peers:
                    for row, target in enumerate(subject.targets.values()):
                        right[threat.label][row, source] += correct(target, adv, y_B).sum().cpu()
            for row, name in enumerate(subject.targets):
                right[threat.label][row, -1] += clean[name].sum().cpu()
        for name in subject.targets:
            outcomes[name] += [Outcome(*one) for one in zip(y_B.tolist(), clean[name].tolist(), held[name].tolist(),
                                                            strict=True)]
    return {label: (table / len(subject.samples_N)).tolist() for label, table in right.items()}, outcomes


def robust_share(subject: Subject, model: nn.Module, threat: Threat | None, plan: AttackPlan) -> float:
    """Share of the images that are right when clean and under the attack; without a threat the clean share."""
    held = 0
    for chunk, x_BCHW, y_B in subject.batches():
        right_B = correct(model, x_BCHW, y_B)
        if threat is not None:
            right_B = right_B & correct(model, subject.craft(model, x_BCHW, y_B, threat, plan, chunk), y_B)
        held += int(right_B.sum())
    return held / len(subject.samples_N)


def _by_eps(subject: Subject, threat: Threat) -> dict[str, list[tuple[float, float]]]:
    found = {}
    for name, model in subject.targets.items():
        found[name] = [(threat.eps * factor,
                        robust_share(subject, model, Threat(threat.norm, threat.eps * factor) if factor else None,
                                     subject.plan(factor))) for factor in EPS_FACTORS]
    return found


def _by_steps(subject: Subject, threat: Threat) -> dict[str, list[tuple[float, float]]]:
    """With steps of 2.5 eps / steps."""
    return {name: [(steps, robust_share(subject, model, threat, AttackPlan(steps)))
                   for steps in sorted({*STEPS, subject.plan().steps})] for name, model in subject.targets.items()}


def _random_direction(threat: Threat, x_BCHW: Tensor, seed: int) -> Tensor:
    """A random perturbation of length eps: signs for linf, a normal direction for l2 and l1."""
    noise = rng.normal(rng.key(seed, "report-direction"), x_BCHW.shape, device=x_BCHW.device,
                           dtype=x_BCHW.dtype)
    if threat.norm == "linf":
        return noise.sign() * threat.eps
    return noise * per_image(threat.eps / noise.flatten(1).norm(2 if threat.norm == "l2" else 1, dim=1), noise)


def _loss(model: nn.Module, x_BCHW: Tensor, y_B: Tensor) -> float:
    with torch.no_grad():
        return F.cross_entropy(model(x_BCHW.clamp(0, 1)), y_B).item()


def _around(subject: Subject, places: Sequence[float]) -> tuple[list[list[float]], list[Slices]]:
    """Mean cross-entropy at x + a d + b r, cut to [0, 1]: d is the AE's perturbation, r a random one."""
    _, x_BCHW, y_B = next(subject.batches())
    x_BCHW, y_B = x_BCHW[:SURFACE_IMAGES], y_B[:SURFACE_IMAGES]
    surface: list[list[float]] = []
    slices = []
    for index, (name, model) in enumerate(subject.peers.items()):
        spec = subject.config.peers[index].threat
        threat = Threat(spec.norm, spec.eps)
        d = subject.craft(model, x_BCHW, y_B, threat, subject.plan(), 0) - x_BCHW
        r = _random_direction(threat, x_BCHW, subject.config.run.seed)
        slices.append(Slices(name, [_loss(model, x_BCHW + a * d, y_B) for a in places],
                             [_loss(model, x_BCHW + b * r, y_B) for b in places]))
        if name == subject.source:
            surface = [[_loss(model, x_BCHW + a * d + b * r, y_B) for a in places] for b in places]
    return surface, slices


def _pictures(subject: Subject) -> list[Picture]:
    """Of the first images: up to half that fool the source, then ones that do not, in their order."""
    _, x_BCHW, y_B = next(subject.batches())
    model = subject.targets[subject.source]
    adv = subject.craft(model, x_BCHW, y_B, subject.source_threat, subject.plan(), 0)
    clean_B = correct(model, x_BCHW, y_B)
    fooled = (clean_B & ~correct(model, adv, y_B)).nonzero()[:, 0].tolist()[:PICTURES // 2]
    rest = [row for row in range(len(y_B)) if row not in fooled][:PICTURES - len(fooled)]
    rows = torch.tensor([*fooled, *rest], device=x_BCHW.device)
    answers: list[list[tuple[str, int, float, int, float]]] = [[] for _ in rows]
    for name, target in subject.targets.items():
        with torch.no_grad():
            before = target(x_BCHW[rows]).softmax(-1).max(-1)
            after = target(adv[rows]).softmax(-1).max(-1)
        columns = (before.indices, before.values, after.indices, after.values)
        for found, one in zip(answers, zip(*(column.tolist() for column in columns), strict=True), strict=True):
            found.append((name, *one))
    return [Picture(int(subject.samples_N[row]), int(y_B[row]), x_BCHW[row].cpu(), adv[row].cpu(), tuple(found))
            for row, found in zip(rows.tolist(), answers, strict=True)]
