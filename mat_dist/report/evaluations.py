"""Result files of eval/: those that the training writes, and those of python -m mat_dist.evaluate."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mat_dist.runs.files import parse_json

ENSEMBLE, UNCHECKED = "ensemble", "no checks were made"
_NAME = re.compile(r"(test_best|test_last|validation|evaluate_\w+?)_step_(\d+)(?:-(\d+)|_([0-9a-f]{12}))?")


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
    found: list[tuple[tuple[Any, ...], Evaluation]] = []
    for file in sorted(folder.glob("*.json")):
        name = _NAME.fullmatch(file.stem)
        if name is None:
            notes.append(f"eval/{file.name} is not shown: its name is not that of a result file")
            continue
        try:
            document = parse_json(file.read_bytes())
            one = _evaluation(file, name[1], document, rule)
            order = ("evaluate" if name[1].startswith("evaluate") else name[1], one.split)
            rank = {("evaluate", "test"): 0, ("test_best", "test"): 1, ("test_last", "test"): 2}.get(order, 3)
            strong = "autoattack" in one.attacks, one.targets[0].n if rank == 0 else 0
            age = str(document["time"]), int(name[3] or 1)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            notes.append(f"eval/{file.name} is left out: {type(error).__name__}: {error}")
            continue
        found.append(((-rank, *strong, *age), one))
    return [one for _, one in sorted(found, key=lambda pair: pair[0], reverse=True)]


def _evaluation(file: Path, kind: str, document: dict[str, Any], rule: str) -> Evaluation:
    threats = tuple(f"{one['norm']} {one['eps']}" for one in document["threats"])
    targets = tuple(_target(one, rule) for one in document["targets"])
    needed = {"clean", "union", *threats}
    if not targets or not threats or not all(needed <= one.accuracy.keys() and one.n > 0 for one in targets):
        raise ValueError("a target without n or one of its accuracies")
    if not all(0 <= share <= 1 for one in targets for share in one.accuracy.values()):
        raise ValueError("an accuracy outside of 0 to 1")
    checkpoint = {"test_best": "best", "test_last": "last"}.get(kind) or document.get("checkpoint")
    split = str(document["split"])
    images = "validation split" if split.startswith("val") else f"{split} set"
    images += f", {checkpoint} checkpoint" if checkpoint else ""
    attack, attacks = _attacks(document)
    return Evaluation(file.name, images, split, int(document["step"]), attack, attacks, threats, targets,
                      _outcomes(file.with_suffix(".csv"), rule))


def _attacks(document: dict[str, Any]) -> tuple[str, str]:
    """The attack as a heading, and all of them with their steps."""
    if "attacks" not in document:
        plan = document["attack"]
        restarts = int(plan["restarts"])
        attack = f"{plan['name']}-{int(plan['steps'])}" + (f" x {restarts}" if restarts > 1 else "")
        return attack, attack
    plans, told = document.get("plans", {}), []
    for name in document["attacks"]:
        plan = plans.get(name)
        more = f" x {plan['restarts']}" if plan and plan["restarts"] > 1 else ""
        told.append(f"{name}-{plan['steps']}{more}" if plan else str(name))
    if document.get("transfer"):
        told.append("transfer")
    told += [f"transfer from {one['run']}" for one in document.get("sources", [])]
    return "worst attack" if len(told) > 1 else told[0], ", ".join(told)


def _target(one: dict[str, Any], rule: str) -> Target:
    alone = {str(threat): {str(name): float(share) for name, share in shares.items()}
             for threat, shares in one.get("attacks", {}).items()}
    failed = dict.fromkeys(str(check["check"]) for check in one.get("checks", []) if not check["passed"])
    if one.get("checks") == []:  # checks=0; the training's own evaluations have no such entry
        failed = {UNCHECKED: None}
    return Target(_name(one["target"], rule), str(one["weights"]), int(one["n"]),
                  {str(key): float(share) for key, share in one["accuracy"].items()}, alone, tuple(failed))


def _name(target: object, rule: str) -> str:
    """The ensemble in the run's own rule is just the ensemble."""
    return ENSEMBLE if target == f"{ENSEMBLE}:{rule}" else str(target)


def _outcomes(file: Path, rule: str) -> dict[tuple[str, str], list[Outcome]]:
    """Per target and weights every image, from a table with a row per image, threat, attack and target."""
    if not file.is_file():
        return {}
    found: dict[tuple[str, str], dict[str, Outcome]] = {}
    with file.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            images = found.setdefault((_name(row["target"], rule), row["weights"]), {})
            robust, before = row["robust"] == "1", images.get(row["sample"])
            clean = row["clean_correct"] == "1" if "clean_correct" in row else row["clean_prediction"] == row["label"]
            images[row["sample"]] = Outcome(int(row["label"]), clean, robust and (before is None or before.robust))
    return {key: list(images.values()) for key, images in found.items()}
