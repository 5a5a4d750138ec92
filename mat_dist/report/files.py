"""What a run folder holds, read for the report: nothing is changed, and what is missing or damaged is noted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mat_dist.config import load_config
from mat_dist.config.schema import Config
from mat_dist.errors import NotReportable
from mat_dist.evaluation.results import (
    ENSEMBLE,
    FEWEST_IMAGES,
    Answers,
    Result,
    TargetResult,
    present,
    read_result,
)
from mat_dist.evaluation.targets import threats_of
from mat_dist.runs.files import parse_json
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.lock import RunLock


@dataclass(frozen=True)
class Evaluation:
    """A result file, in which the ensemble by the run's own rule is just the ensemble.

    Attributes:
        images: which images these are.
        attack, attacks: short (PGD-20, worst attack), and complete; by_autoattack: whether AutoAttack is among them.
        present: whether it is about the run's best or last checkpoint; any other one is history.
        answers: (target, weights) -> image by image; empty where there is no table of images.
    """

    file: str
    images: str
    split: str
    step: int
    attack: str
    attacks: str
    by_autoattack: bool
    threats: tuple[str, ...]
    targets: tuple[TargetResult, ...]
    present: bool
    answers: dict[tuple[str, str], Answers]


@dataclass(frozen=True)
class RunFiles:
    """A run as its files tell it. `notes` say what is missing, one line each; `writer` who writes into it now."""

    folder: RunFolder
    config: Config
    environment: dict[str, Any]
    exit: dict[str, Any]
    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    evaluations: list[Evaluation]
    notes: list[str]
    writer: str | None = None

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def peers(self) -> list[str]:
        return [str(peer.name) for peer in self.config.peers]

    @property
    def averaged(self) -> bool:
        """Whether averaged weights are kept."""
        return any(peer.averages for peer in self.config.peers)

    @property
    def threats(self) -> list[str]:
        """The threats that the cohort was trained for."""
        return [threat.label for threat in threats_of(self.config.peers)]

    @property
    def headline(self) -> Evaluation | None:
        """The most telling evaluation of the best or last checkpoint, see `read_evaluations`."""
        return next((one for one in self.evaluations if one.present), None)


def read_run(folder: RunFolder) -> RunFiles:
    """Read the folder of a run, also of one that goes on: what is there until now."""
    writer = RunLock(folder, None).held_by()
    config = load_config(str(folder.config))
    notes = [] if writer is None else [f"the run goes on, written by {writer}: this is what there was by then"]
    records = read_records(folder.metrics, notes, growing=writer is not None)
    evaluations = read_evaluations(folder, config.eval.ensemble, notes)
    if not any(one.split == "test" for one in evaluations):
        notes.append("no evaluation on the test set: the run has not ended, or has eval.test_steps=0")
    elif not any(one.split == "test" and one.present for one in evaluations):
        notes.append("no evaluation on the test set of the best or last checkpoint: those that there are, of step "
                     f"{', '.join(map(str, sorted({one.step for one in evaluations if one.split == 'test'})))}, are "
                     "history")
    return RunFiles(folder, config, _document(folder.environment, notes),
                    _document(folder.exit, notes) if writer is None else {},
                    [one for one in records if one["kind"] == "step"],
                    [one for one in records if one["kind"] == "epoch"], evaluations, notes, writer)


def read_evaluations(folder: RunFolder, rule: str, notes: list[str]) -> list[Evaluation]:
    """All result files, the most telling first: on the test set, on enough images, by mat_dist.evaluate (with
    AutoAttack, then more images), tests of the best checkpoint, of the last, anything else; newest first. `rule` is
    the run's of the ensemble."""
    results: list[Result] = []
    for file in sorted(folder.eval.glob("*.json")):
        try:
            results.append(read_result(file))
        except NotReportable as error:
            notes.append(f"eval/{file.name} is left out: {error.what}")
    now = present(folder, results)
    found: list[tuple[tuple[object, ...], Evaluation]] = []
    for result in results:
        labels = [label for label, same in now.items() if result in same]
        try:
            one = _evaluation(result, rule, labels)
        except NotReportable as error:
            notes.append(f"eval/{result.file.name} is left out: {error.what}")
            continue
        kind = "evaluate" if result.file.stem.startswith("evaluate") else "test" if labels else ""
        enough = one.targets[0].n >= FEWEST_IMAGES
        rank = {("evaluate", "test"): 0, ("test", "test"): 1 if "best" in labels else 2}.get((kind, one.split), 3)
        strong = one.by_autoattack, one.targets[0].n if rank == 0 else 0
        found.append(((rank < 3, enough, -rank, *strong, *result.age), one))
    return [one for _, one in sorted(found, key=lambda pair: pair[0], reverse=True)]


def _evaluation(result: Result, rule: str, labels: Sequence[str]) -> Evaluation:
    """`labels`: what its checkpoint is now, best or last or both."""
    def shown(target: str) -> str:
        return ENSEMBLE if target == f"{ENSEMBLE}:{rule}" else target

    images = "validation split" if result.split == "val" else f"{result.split} set"
    # A validation belongs to the checkpoint of its step; only a choice is worth a word.
    if labels and not result.file.stem.startswith("validation"):
        images += f", {result.checkpoint if result.checkpoint in labels else labels[0]} checkpoint"
    elif result.checkpoint in ("best", "last"):
        images += f", then the {result.checkpoint} checkpoint"
    told = list(result.named_attacks())
    found = result.images if result.file.with_suffix(".csv").is_file() else {}
    return Evaluation(result.file.name, images, result.split, result.step, "worst attack" if len(told) > 1 else told[0],
                      ", ".join(told), result.by_autoattack, tuple(threat.label for threat in result.threats),
                      tuple(replace(one, target=shown(one.target)) for one in result.targets), bool(labels),
                      {(shown(target), weights): one for (target, weights), one in found.items()})


def _document(file: Path, notes: list[str]) -> dict[str, Any]:
    try:
        document = parse_json(file.read_bytes())
    except FileNotFoundError:
        notes.append(f"there is no {file.name}")
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{file.name} cannot be read: {error}")
        return {}
    return document if isinstance(document, dict) else {}


def read_records(file: Path, notes: list[str], *, growing: bool = False) -> list[dict[str, Any]]:
    """Records in the order of steps; of those with the same step and kind the one of the highest attempt. The last line
    of a file that is `growing` may be half there yet."""
    newest: dict[tuple[str, int], tuple[int, dict[str, Any]]] = {}
    damaged = 0
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        lines = text.splitlines()
    except OSError:
        notes.append("there is no metrics.jsonl: no training curves")
        return []
    for number, line in enumerate(lines, 1):
        try:
            one = json.loads(line)
            key = (str(one["kind"]), int(one["step"]))
            float(one.get("epoch", 0))
            attempt = int(one.get("attempt", 1))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            damaged += not growing or number < len(lines) or text.endswith("\n")
            continue
        if key not in newest or attempt >= newest[key][0]:
            newest[key] = attempt, one
    if damaged:
        notes.append(f"metrics.jsonl: {damaged} damaged lines are left out")
    return [newest[key][1] for key in sorted(newest, key=lambda key: key[1])]
