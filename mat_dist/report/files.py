"""What a run folder holds, read for the report: nothing is changed, and what is missing or damaged is noted."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mat_dist.atomic import parse_json
from mat_dist.config import load_config
from mat_dist.config.schema import Config
from mat_dist.errors import ConfigError, OutputError
from mat_dist.runfolder import RunFolder, RunLock

ENSEMBLE = "ensemble"
_NAME = re.compile(r"(test_best|test_last|validation)_step_(\d+)(?:-(\d+))?")
_ORDER = {"test_best": 0, "test_last": 1, "validation": 2}


@dataclass(frozen=True)
class Target:
    """What one target reached: `accuracy` by name (clean, each threat, union), shares in [0, 1] of `n` images."""

    name: str
    weights: str
    n: int
    accuracy: dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """One image: its class, and whether a target was right when clean and under every threat."""

    label: int
    clean: bool
    robust: bool


@dataclass(frozen=True)
class Evaluation:
    """A result file of eval/. `kind` is test_best, test_last or validation; `attack` as people write it: PGD-20."""

    file: str
    kind: str
    step: int
    time: str
    attack: str
    steps: int
    threats: tuple[str, ...]
    targets: tuple[Target, ...]
    outcomes: dict[tuple[str, str], list[Outcome]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFiles:
    """A run as its files tell it. `notes` say what is missing, one line each."""

    folder: RunFolder
    config: Config
    environment: dict[str, Any]
    exit: dict[str, Any]
    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    evaluations: list[Evaluation]
    notes: list[str]

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def peers(self) -> list[str]:
        return [str(peer.name) for peer in self.config.peers]

    @property
    def averaged(self) -> bool:
        """Whether averaged weights are kept."""
        return any(peer.optim.ema_decay is not None for peer in self.config.peers)

    @property
    def headline(self) -> Evaluation | None:
        """The newest test of the best checkpoint, else of the last one, else the newest validation."""
        return self.evaluations[0] if self.evaluations else None


def read_run(path: Path) -> RunFiles:
    """Read the folder of a run that nobody writes into now.

    Raises ConfigError for something that is no run folder, OutputError while the run is being written.
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise ConfigError(f"{str(path)!r} is not the folder of a run", "command line", "give folders like runs/NAME")
    holder = RunLock(folder, None).held_by()
    if holder is not None:
        raise OutputError(f"the run is being written by {holder}", str(path), "wait until it ends, or stop it")
    config = load_config(str(folder.config))
    notes: list[str] = []
    records = _records(folder.metrics, notes)
    evaluations = _evaluations(folder.eval, notes)
    if not any(one.kind.startswith("test") for one in evaluations):
        notes.append("no evaluation on the test set: the run has not ended, or has eval.test=false")
    return RunFiles(folder, config, _document(folder.environment, notes), _document(folder.exit, notes),
                    [one for one in records if one["kind"] == "step"],
                    [one for one in records if one["kind"] == "epoch"], evaluations, notes)


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


def _records(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Records in the order of steps; of those with the same step and kind the one of the highest attempt."""
    newest: dict[tuple[str, int], tuple[int, dict[str, Any]]] = {}
    damaged = 0
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        notes.append("there is no metrics.jsonl: no training curves")
        return []
    for line in lines:
        try:
            one = json.loads(line)
            key = (str(one["kind"]), int(one["step"]))
            float(one.get("epoch", 0))
            attempt = int(one.get("attempt", 1))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            damaged += 1
            continue
        if key not in newest or attempt >= newest[key][0]:
            newest[key] = attempt, one
    if damaged:
        notes.append(f"metrics.jsonl: {damaged} damaged lines are left out")
    return [newest[key][1] for key in sorted(newest, key=lambda key: key[1])]


def _evaluations(folder: Path, notes: list[str]) -> list[Evaluation]:
    """All result files, the most telling first: tests of the best, of the last, validations; newest first."""
    found: list[tuple[tuple[int, str, int], Evaluation]] = []
    for file in sorted(folder.glob("*.json")):
        name = _NAME.fullmatch(file.stem)
        if name is None:
            notes.append(f"eval/{file.name} is not shown: not an evaluation of the training")
            continue
        try:
            document = parse_json(file.read_bytes())
            one = _evaluation(file, name[1], document)
        except (OSError, ValueError, KeyError, TypeError) as error:
            notes.append(f"eval/{file.name} is left out: {type(error).__name__}: {error}")
            continue
        found.append(((-_ORDER[name[1]], one.time, int(name[3] or 1)), one))
    return [one for _, one in sorted(found, key=lambda pair: pair[0], reverse=True)]


def _evaluation(file: Path, kind: str, document: dict[str, Any]) -> Evaluation:
    plan = document["attack"]
    restarts = int(plan["restarts"])
    targets = tuple(Target(str(one["target"]), str(one["weights"]), int(one["n"]),
                           {str(key): float(share) for key, share in one["accuracy"].items()})
                    for one in document["targets"])
    threats = tuple(f"{one['norm']} {one['eps']}" for one in document["threats"])
    needed = {"clean", "union", *threats}
    if not targets or not threats or not all(needed <= one.accuracy.keys() and one.n > 0 for one in targets):
        raise ValueError("a target without n or one of its accuracies")
    if not all(0 <= share <= 1 for one in targets for share in one.accuracy.values()):
        raise ValueError("an accuracy outside of 0 to 1")
    attack = f"{plan['name']}-{int(plan['steps'])}" + (f" x {restarts}" if restarts > 1 else "")
    return Evaluation(file.name, kind, int(document["step"]), str(document["time"]), attack, int(plan["steps"]),
                      threats, targets, _outcomes(file.with_suffix(".csv")))


def _outcomes(file: Path) -> dict[tuple[str, str], list[Outcome]]:
    """Per target and weights every image, from the table with a row per image, threat and target."""
    if not file.is_file():
        return {}
    found: dict[tuple[str, str], dict[str, Outcome]] = {}
    with file.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            images = found.setdefault((row["target"], row["weights"]), {})
            robust = row["robust"] == "1"
            if row["sample"] in images:
                robust = robust and images[row["sample"]].robust
            images[row["sample"]] = Outcome(int(row["label"]), row["clean_correct"] == "1", robust)
    return {key: list(images.values()) for key, images in found.items()}
