"""Result files: `eval/<id>.json`, and `eval/<id>.csv` with a row per sample, threat, attack and target; one reader.

Format 2, written by evaluations in the training and by `python -m mat_dist.evaluate`. Main keys of the JSON document:
    format, run, checkpoint, step, files, split, n, time, seed, config, versions   what was evaluated
    threats [{norm, eps, eps_float}], attacks [name], plans {name: plan}           with what
    targets [{target, weights, n, accuracy {clean, <threat>, union}, interval_95, attacks {threat: {attack: share}},
              checks [{check, threat, passed, found}]}]                            what came out
Shares are in [0, 1]. `checks` and `reportable` are missing in a training's own evaluations, which check nothing.
The reader also takes the two formats of version 0.1, which have no number; that is for one version. Imports no torch.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from mat_dist.errors import NotReportable
from mat_dist.runs.files import parse_json
from mat_dist.runs.folder import RunFolder

FORMAT = 2
CLEAN, UNION, ENSEMBLE = "clean", "union", "ensemble"
UNCHECKED = "no checks were made"
# What a number lacks that is sound and must not be reported all the same.
HEADLINE = ("too few images", "near chance", "undertrained", "network not confirmed", "a look alone")
FEW, CHANCE, UNDERTRAINED, AS_TRAINED, GLANCE = HEADLINE
FEWEST_IMAGES = 300  # with fewer, half the 95 % interval is 5.6 points or more near 50 %
COLUMNS = ("sample", "label", "threat", "attack", "target", "weights", "clean_prediction", "prediction", "robust",
           "attacked")
Z_95 = 1.959964  # two-sided 95 % quantile of the normal distribution
REPAIR = "remove it, or run the evaluation again"
# What version 0.1 did not write of a plan.
OLD_PLAN = {"step_size": None, "loss": "ce", "start": "uniform", "momentum": None, "reach": 2.5, "targets": 0}

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Verdict:
    """One soundness check of a target: threat (empty for checks of the model), and what was found, in words."""

    check: str
    threat: str
    passed: bool
    found: str


@dataclass(frozen=True)
class TargetResult:
    """One target of a result file."""

    target: str  # a peer, `ensemble` (by the run's rule) or `ensemble:<rule>`
    weights: str  # `raw` or `ema`
    n: Count  # number of images
    accuracy: dict[str, Share]  # by name (clean, each threat, union)
    attacks: dict[str, dict[str, Share]] = field(default_factory=dict)  # threat -> attack -> accuracy under it alone
    checks: tuple[Verdict, ...] | None = None  # None in a training's own evaluations

    @property
    def bad(self) -> list[Verdict]:
        """The checks that failed."""
        return [check for check in self.checks or () if not check.passed]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed, or UNCHECKED; the numbers must not be reported then."""
        few = (FEW,) if self.n < FEWEST_IMAGES else ()  # files of version 0.1, and of a training, do not say it
        if self.checks == ():  # a training's own evaluations have no checks at all
            return (UNCHECKED, *few)
        return tuple(dict.fromkeys((*(check.check for check in self.bad), *few)))


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` images (Wilson, 1927); stays in [0, 1] also at 0 and 1."""
    z2 = Z_95 * Z_95
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def is_peer(target: str) -> bool:
    """Whether a target is a peer; `ensemble` is by the run's rule, `ensemble:vote` and the like by theirs."""
    return target != ENSEMBLE and not target.startswith(f"{ENSEMBLE}:")


@dataclass(frozen=True)
class ThreatName:
    """A threat as a file writes it."""

    norm: str
    eps: str

    @property
    def label(self) -> str:
        return f"{self.norm} {self.eps}"


@dataclass(frozen=True)
class AutoAttack:
    """What `autoattack` stood for: a version, or those of its attacks that were asked for."""

    version: str = "standard"
    custom: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it is what a number under AutoAttack means."""
        return self.version in ("standard", "plus")

    def __str__(self) -> str:
        return "autoattack" if self.version == "standard" else f"autoattack ({', '.join(self.custom) or self.version})"


@dataclass(frozen=True)
class Answers:
    """One target image by image: position in the split -> class; accuracy's name -> position -> correct."""

    labels: dict[int, int] = field(default_factory=dict)
    correct: dict[str, dict[int, bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A result file, of whichever format. `document` is its JSON, `number` that of -2, -3, ... in its name."""

    step: int
    split: str
    time: str
    seed: int
    threats: Annotated[tuple[ThreatName, ...], Field(min_length=1)]
    targets: Annotated[tuple[TargetResult, ...], Field(min_length=1)]
    config: dict[str, Any]
    attacks: tuple[str, ...]
    plans: dict[str, dict[str, Any]] = field(default_factory=dict)
    transfer: bool = False
    sources: tuple[dict[str, Any], ...] = ()
    autoattack: AutoAttack | None = None
    checkpoint: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    reportable: bool | None = None
    file: Path = Path()
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> str:
        """Name of the run's folder."""
        return self.file.resolve().parents[1].name

    @property
    def number(self) -> int:
        found = re.search(r"-(\d+)$", self.file.stem)
        return int(found[1]) if found else 1

    @property
    def sound(self) -> bool:
        """Whether there were soundness checks, and all were passed; a headline needs more."""
        failed = {check.check for one in self.targets for check in one.bad}
        made = any(check.check not in HEADLINE for one in self.targets for check in one.checks or ())
        return bool(self.reportable) or (self.reportable is False and made and failed <= {*HEADLINE})

    @property
    def by_autoattack(self) -> bool:
        """Whether AutoAttack was made, and not some of its attacks alone."""
        return "autoattack" in self.attacks and (self.autoattack is None or self.autoattack.whole)

    @property
    def age(self) -> tuple[str, int, int]:
        """Orders results from the oldest to the newest."""
        return self.time, self.step, self.number

    def named_attacks(self) -> Iterator[str]:
        """Each attack with its steps and restarts: pgd-20 x 5, autoattack (square), transfer; of a training's own:
        PGD-20."""
        for name in self.attacks:
            plan = self.plans.get(name)
            restarts = f" x {plan['restarts']}" if plan and plan["restarts"] > 1 else ""
            told = {"pgd": "PGD" if self.reportable is None else "pgd", "autoattack": str(self.autoattack or name)}
            shown = told.get(name, name)
            yield f"{shown}-{plan['steps']}{restarts}" if plan else shown
        if self.transfer:
            yield "transfer"
        yield from (f"transfer from {one['run']}" for one in self.sources)

    @cached_property
    def images(self) -> dict[tuple[str, str], Answers]:
        """(target, weights) -> its images. Raises NotReportable where the table is missing or damaged."""
        return read_images(self.file.with_suffix(".csv"))


@cache
def _shape() -> TypeAdapter[Result]:
    return TypeAdapter(Result)


def read_result(file: Path) -> Result:
    """Read one document. Raises NotReportable for one that is missing, damaged, or of a later format."""
    try:
        return as_result(parse_json(file.read_bytes()), file)
    except ValidationError as error:
        first = error.errors()[0]
        text = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise NotReportable(f"not a result file: {text}", str(file), REPAIR) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotReportable(f"not a result file: {type(error).__name__}: {error}", str(file), REPAIR) from error


def as_result(document: Any, file: Path = Path()) -> Result:
    """A document, of whichever format, as a result. Raises ValueError and the like for one that is none."""
    if not isinstance(document, dict):
        raise ValueError("it is no JSON object")
    if document.get("format", FORMAT) != FORMAT:
        raise ValueError(f"format {str(document['format'])[:40]}, this version reads {FORMAT}")
    found = _shape().validate_python({**_upgraded(document, file), "file": file, "document": document})
    needed = {CLEAN, UNION, *(threat.label for threat in found.threats)}
    for one in found.targets:
        if not needed <= one.accuracy.keys():
            raise ValueError(f"{one.target} lacks the accuracy {sorted(needed - one.accuracy.keys())[0]}")
    if not all(isinstance(plan[key], int) for plan in found.plans.values() for key in ("steps", "restarts")):
        raise ValueError("steps or restarts that are no number")
    if not all(isinstance(source["run"], str) for source in found.sources):
        raise ValueError("a source without its run")
    if not isinstance(found.config.get("data", {}), dict):
        raise ValueError("config.data is no section")
    return found


def read_results(folder: Path, pattern: str) -> list[Result]:
    """The results whose names fit, from the oldest to the newest. Raises NotReportable as `read_result`."""
    return sorted((read_result(file) for file in folder.glob(f"{pattern}.json")), key=lambda one: one.age)


def present(run: RunFolder, results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of the checkpoint that is `best`, and of the one that is `last`, in their order.

    What was made of another checkpoint is history. A run whose checkpoints are gone has those of its newest results.
    """
    now = {label: _named(run, file) for label, file in (("best", "best"), ("last", "latest"))}
    if not any(now.values()):
        for label in now:
            named = [one for one in results if one.checkpoint == label] or (results if label == "last" else [])
            now[label] = (max(named, key=lambda one: one.age).step, {}) if named else None
    return {label: [one for one in results if known and one.step == known[0] and
                    (not known[1] or not one.files or one.files == known[1])] for label, known in now.items()}


def _named(run: RunFolder, pointer: str) -> tuple[int, dict[str, str]] | None:
    """Step and SHA-256 of the files of the checkpoint that `best` or `latest` names; no files where they are gone."""
    try:
        name = (run.checkpoints / pointer).read_text(encoding="utf-8").strip()
        step = int(name.removeprefix("step_"))
    except (OSError, ValueError):
        return None
    try:
        manifest = parse_json((run.checkpoints / name / "manifest.json").read_bytes())
        return step, {one["name"]: one["sha256"] for one in manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return step, {}


def accuracies(*rows: Iterable[str]) -> list[str]:
    """The accuracies that a table shows whose rows have these threats: clean, under each threat, and their union where
    a row has several."""
    threats = [dict.fromkeys(row) for row in rows]
    several = any(len(row) > 1 for row in threats)
    return [CLEAN, *dict.fromkeys(threat for row in threats for threat in row), *([UNION] if several else [])]


def _upgraded(document: dict[str, Any], file: Path) -> dict[str, Any]:
    """A document in the words of format 2. Version 0.1 wrote the attack of a training's evaluation as one entry."""
    if "attack" not in document:
        return document
    plan = {key: value for key, value in document["attack"].items() if key != "name"}
    label = re.match(r"test_(best|last)_", file.stem)
    return {**document, "attacks": ["pgd"], "plans": {"pgd": {**OLD_PLAN, **plan}},
            "split": "val" if document["split"] == "validation" else document["split"],
            "checkpoint": label[1] if label else None}


def read_images(file: Path) -> dict[tuple[str, str], Answers]:
    """The table of images: (target, weights) -> images. Raises NotReportable where it is missing or damaged."""
    found: dict[tuple[str, str], Answers] = {}
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                one, sample = found.setdefault((row["target"], row["weights"]), Answers()), int(row["sample"])
                one.labels[sample] = int(row["label"])
                old = "clean_correct" in row  # version 0.1: there the column attack has the threat
                clean = row["clean_correct"] == "1" if old else row["clean_prediction"] == row["label"]
                one.correct.setdefault(CLEAN, {})[sample] = clean
                for name in (row["attack"] if old else row["threat"], UNION):
                    flags = one.correct.setdefault(name, {})
                    flags[sample] = flags.get(sample, True) and row["robust"] == "1"
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise NotReportable(f"not a table of images: {type(error).__name__}: {error}", str(file), REPAIR) from error
    return found
