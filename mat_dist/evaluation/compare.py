"""`--compare`: paired differences between runs that were evaluated in the same way, image by image."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mat_dist.cli import tell
from mat_dist.errors import ConfigError, NotReportable
from mat_dist.evaluation.outcome import CLEAN, UNION, show
from mat_dist.evaluation.statistics import Z_95
from mat_dist.runs.files import parse_json
from mat_dist.runs.folder import RunFolder

# What two evaluations must share for their images to be paired.
SAME = ("threats", "attacks", "plans", "autoattack", "queries", "transfer", "sources", "split", "n", "data_digest",
        "chunk")
SHA256_LENGTH = 64
REPAIR = "remove it, and run the evaluation again"


@dataclass(frozen=True)
class Evaluated:
    """A result: target -> accuracy's name -> sample -> correct."""

    run: str
    about: Mapping[str, Any]
    flags: Mapping[str, Mapping[str, Mapping[int, bool]]]


@dataclass(frozen=True)
class Paired:
    """The difference of two shares on the same `n` images, second minus first, with its 95 % interval.

    Attributes:
        gained, lost: images that only the second, only the first gets right.
        p: two-sided exact McNemar test.
    """

    n: int
    gained: int
    lost: int

    @property
    def difference(self) -> float:
        return (self.gained - self.lost) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wald's interval for paired shares, with Agresti and Min's half pair added to each cell (2005)."""
        gained, lost, n = self.gained + 0.5, self.lost + 0.5, self.n + 2
        centre = (gained - lost) / n
        half = Z_95 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
        return centre - half, centre + half

    @property
    def p(self) -> float:
        discordant, fewer = self.gained + self.lost, min(self.gained, self.lost)
        tail = sum(math.comb(discordant, k) for k in range(fewer + 1))
        return min(1.0, 2 * tail / 2**discordant)


def compare(folders: Sequence[RunFolder]) -> None:
    """Print the first run against each other one.

    Raises ConfigError for evaluations that differ in more than the run; NotReportable where there is none, or one
    whose checks failed.
    """
    if len(folders) < 2:
        raise ConfigError("one run to compare", "command line", "give two or more run folders")
    first, *others = [read(folder) for folder in folders]
    for other in others:
        check_same(first, other)
        shared = [target for target in first.flags if target in other.flags]
        if not shared:
            raise ConfigError(f"{first.run} and {other.run} share no target", "command line",
                              f"evaluate both with the same targets; found {', '.join(first.flags)} and "
                              f"{', '.join(other.flags)}")
        show(as_table(first, other, shared))
        if first.about.get("transfer") and set(first.flags) != set(other.flags):
            tell("AEs of other targets count too, and these runs were evaluated with other targets: transfer=false "
                 "gives both the same attacks")


def read(folder: RunFolder) -> Evaluated:
    """The newest evaluation of a run."""
    newest: tuple[str, Path, dict[str, Any]] | None = None
    for file in sorted(folder.eval.glob("evaluate_*.json")):
        try:
            document = parse_json(file.read_bytes())
            when = str(document["time"])
        except (ValueError, KeyError, TypeError) as error:
            raise NotReportable(f"not a result file: {error}", str(file), REPAIR) from error
        if newest is None or when >= newest[0]:
            newest = when, file, document
    if newest is None:
        raise NotReportable(f"{folder.name} was not evaluated", str(folder.eval),
                            f"run python -m mat_dist.evaluate {folder.path}")
    _, file, document = newest
    try:
        if not document["reportable"]:
            raise NotReportable(f"the newest evaluation of {folder.name} failed its checks, or had none", str(file),
                                "see its checks, and docs/evaluation.md")
        return Evaluated(folder.path.resolve().name, document, read_flags(file.with_suffix(".csv")))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise NotReportable(f"not a result file: {error}", str(file), REPAIR) from error


def read_flags(file: Path) -> dict[str, dict[str, dict[int, bool]]]:
    """target -> clean, each threat, union -> sample -> correct under all attacks."""
    flags: dict[str, dict[str, dict[int, bool]]] = {}
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            mine, sample, robust = flags.setdefault(row["target"], {}), int(row["sample"]), row["robust"] == "1"
            mine.setdefault(CLEAN, {})[sample] = row["clean_prediction"] == row["label"]
            for name in (row["threat"], UNION):
                found = mine.setdefault(name, {})
                found[sample] = found.get(sample, True) and robust
    return flags


def check_same(one: Evaluated, other: Evaluated) -> None:
    """Raises ConfigError with the first thing in which two evaluations differ."""
    values = [{key: run.about.get(key) for key in SAME} for run in (one, other)]
    for found, run in zip(values, (one, other), strict=True):
        found["data.test_size"] = run.about["config"]["data"]["test_size"]
        if run.about["split"] != "test":  # the other splits are drawn by the seed
            found["run.seed"] = run.about["subset_seed"]
        found["images_digest"] = run.about.get("images_digest")
    how = "evaluate both runs with the same settings"
    if one.about.get("subset_seed") != other.about.get("subset_seed"):
        how += "; of other seeds, with all images, since run.seed draws subsets and the validation split"
    for key, mine in values[0].items():
        if mine != values[1].get(key):
            raise ConfigError(f"{one.run} and {other.run} were evaluated differently: {key} {_short(mine)} and "
                              f"{_short(values[1].get(key))}", "--compare", how)


def _short(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(" ".join(str(one[key]) for key in ("norm", "eps") if key in one) for one in value)
    return str(value)[:12 if isinstance(value, str) and len(value) == SHA256_LENGTH else 80]


def pair(one: Mapping[int, bool], other: Mapping[int, bool]) -> Paired:
    """Two accuracies on the same images. Raises ConfigError where the images differ."""
    if one.keys() != other.keys():
        raise ConfigError("the evaluations are about different images", "--compare",
                          "evaluate both runs with the same images and run.seed")
    return Paired(len(one), sum(other[k] and not one[k] for k in one), sum(one[k] and not other[k] for k in one))


def as_table(one: Evaluated, other: Evaluated, targets: Sequence[str]) -> Table:
    """A row per target and accuracy."""
    table = Table(title=f"{other.run} minus {one.run}, the same {one.about['n']} images, points")
    table.add_column("target", no_wrap=True)
    table.add_column("accuracy", no_wrap=True)
    for name in (one.run, other.run, "difference", "95 % interval", "gained", "lost", "p (McNemar)"):
        table.add_column(name, justify="right", no_wrap=True)
    for target in targets:
        names = [name for name in one.flags[target] if name != UNION or len(one.about["threats"]) > 1]
        for name in names:
            mine = one.flags[target][name]
            found = pair(mine, other.flags[target][name])
            low, high = found.interval
            shares = [100 * sum(flags.values()) / len(flags) for flags in (mine, other.flags[target][name])]
            table.add_row(target, name, *(f"{share:.2f}" for share in shares), f"{100 * found.difference:+.2f}",
                          f"{100 * low:+.2f} to {100 * high:+.2f}", str(found.gained), str(found.lost),
                          f"{found.p:.3g}")
    return table
