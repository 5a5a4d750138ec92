"""The results of a run as the report shows them: read by mat_dist/evaluation/results.py, the most telling first."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mat_dist.errors import NotReportable
from mat_dist.evaluation.results import CLEAN, UNION, Result, TargetResult, read_result

ENSEMBLE, UNCHECKED = "ensemble", "no checks were made"
_NAME = re.compile(r"(test_best|test_last|validation|evaluate_\w+?)_step_(\d+)(?:-(\d+)|_([0-9a-f]{12})(?:-\d+)?)?")


@dataclass(frozen=True)
class Target:
    """What one target reached.

    Attributes:
        name, weights: a peer or an ensemble; raw or ema.
        n: number of images.
        accuracy: by name (clean, each threat, union), shares in [0, 1].
        alone: by threat, the share under each attack alone; empty where there was one attack.
        failed: the soundness checks that it failed, or UNCHECKED; its numbers must not be reported then.
    """

    name: str
    weights: str
    n: int
    accuracy: dict[str, float]
    alone: dict[str, dict[str, float]]
    failed: tuple[str, ...]

    @property
    def is_peer(self) -> bool:
        return is_peer(self.name)


@dataclass(frozen=True)
class Outcome:
    """One image: its class, and whether a target was right when clean, and under every threat and attack."""

    label: int
    clean: bool
    robust: bool


@dataclass(frozen=True)
class Evaluation:
    """A result file. `attack` is short (PGD-20, worst attack), `attacks` complete; `images` says which images."""

    file: str
    images: str
    split: str
    step: int
    attack: str
    attacks: str
    threats: tuple[str, ...]
    targets: tuple[Target, ...]
    outcomes: dict[tuple[str, str], list[Outcome]]


def is_peer(name: str) -> bool:
    """Whether a target is a peer; `ensemble:vote` and the like are ensembles with another rule than the run's."""
    return name != ENSEMBLE and not name.startswith(f"{ENSEMBLE}:")


def read_evaluations(folder: Path, rule: str, notes: list[str]) -> list[Evaluation]:
    """All result files, the most telling first: mat_dist.evaluate on the test set (with AutoAttack, then more images),
    tests of the best checkpoint, of the last, anything else; newest first. `rule` is the run's of the ensemble."""
    found: list[tuple[tuple[object, ...], Evaluation]] = []
    for file in sorted(folder.glob("*.json")):
        name = _NAME.fullmatch(file.stem)
        if name is None:
            notes.append(f"eval/{file.name} is not shown: its name is not that of a result file")
            continue
        try:
            result = read_result(file)
            one = _evaluation(result, rule)
        except NotReportable as error:
            notes.append(f"eval/{file.name} is left out: {error.what}")
            continue
        order = ("evaluate" if name[1].startswith("evaluate") else name[1], one.split)
        rank = {("evaluate", "test"): 0, ("test_best", "test"): 1, ("test_last", "test"): 2}.get(order, 3)
        strong = "autoattack" in result.attacks, one.targets[0].n if rank == 0 else 0
        found.append(((-rank, *strong, *result.age), one))
    return [one for _, one in sorted(found, key=lambda pair: pair[0], reverse=True)]


def _evaluation(result: Result, rule: str) -> Evaluation:
    images = "validation split" if result.split == "val" else f"{result.split} set"
    label = result.checkpoint
    # A validation belongs to the checkpoint of its step; only a choice is worth a word.
    images += f", {label} checkpoint" if label and not result.file.stem.startswith("validation") else ""
    told = list(result.told())
    return Evaluation(result.file.name, images, result.split, result.step, "worst attack" if len(told) > 1 else told[0],
                      ", ".join(told), tuple(threat.label for threat in result.threats),
                      tuple(_target(one, rule) for one in result.targets), _outcomes(result, rule))


def _target(one: TargetResult, rule: str) -> Target:
    failed = (UNCHECKED,) if one.checks == () else one.failed  # a training's own evaluations have no checks at all
    return Target(_name(one.target, rule), one.weights, one.n, one.accuracy, one.attacks, failed)


def _name(target: str, rule: str) -> str:
    """The ensemble in the run's own rule is just the ensemble."""
    return ENSEMBLE if target == f"{ENSEMBLE}:{rule}" else target


def _outcomes(result: Result, rule: str) -> dict[tuple[str, str], list[Outcome]]:
    """Per target and weights every image, where there is a table of them."""
    if not result.file.with_suffix(".csv").is_file():
        return {}
    return {(_name(target, rule), weights): [
        Outcome(label, one.correct[CLEAN][sample], one.correct[UNION][sample]) for sample, label in one.labels.items()]
        for (target, weights), one in result.images.items()}
