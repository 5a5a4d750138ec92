"""`--compare`: paired differences between runs that were evaluated in the same way, image by image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from mat_dist.cli import tell
from mat_dist.errors import ConfigError, NotReportable
from mat_dist.evaluation.results import UNION, Z_95, Answers, Result, present, read_results
from mat_dist.runs.console import new_table, show_table
from mat_dist.runs.folder import RunFolder
from mat_dist.screens import arrived

# What two evaluations must share for their images to be paired.
SAME = ("threats", "attacks", "plans", "autoattack", "queries", "transfer", "sources", "split", "n", "data_digest",
        "chunk")
SHA256_LENGTH = 64


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
        mine, theirs = answers(first), answers(other)
        shared = [target for target in mine if target in theirs]
        if not shared:
            raise ConfigError(f"{first.run} and {other.run} share no target", "command line",
                              f"evaluate both with the same targets; found {', '.join(mine)} and {', '.join(theirs)}")
        show_table(as_table(first, other, shared))
        if first.transfer and set(mine) != set(theirs):
            tell("AEs of other targets count too, and these runs were evaluated with other targets: transfer=false "
                 "gives both the same attacks")
    arrived()


def answers(result: Result) -> dict[str, Answers]:
    """The images by target: an evaluation that is not of a training has one kind of weights."""
    return {target: one for (target, _), one in result.images.items()}


def read(folder: RunFolder) -> Result:
    """The newest evaluation of a run's best or last checkpoint, or of one that was asked for by its step.

    Raises NotReportable.
    """
    results = read_results(folder.eval, "evaluate_*")
    now = [one for same in present(folder, results).values() for one in same]
    found = [one for one in results if one in now or (one.checkpoint or "").startswith("step_")]
    if not found:
        what = f"{folder.name} was not evaluated"
        if results:
            what += f" since step {results[-1].step}, whose checkpoint is neither its best nor its last any more"
        raise NotReportable(what, str(folder.eval), f"run python -m mat_dist.evaluate {folder.path}")
    if not found[-1].sound:
        raise NotReportable(f"the newest evaluation of {folder.name} failed its checks, or had none",
                            str(found[-1].file), "see its checks, and docs/evaluation.md")
    return found[-1]


def check_same(one: Result, other: Result) -> None:
    """Raises ConfigError with the first thing in which two evaluations differ."""
    values = [{key: run.document.get(key) for key in SAME} for run in (one, other)]
    for found, run in zip(values, (one, other), strict=True):
        found["data.test_size"] = run.config.get("data", {}).get("test_size")
        if run.split != "test":  # the other splits are drawn by the seed
            found["run.seed"] = run.document.get("subset_seed")
        found["images_digest"] = run.document.get("images_digest")
    how = "evaluate both runs with the same settings"
    if one.document.get("subset_seed") != other.document.get("subset_seed"):
        how += "; of other seeds on the test set, since run.seed draws the other splits"
    for key, mine in values[0].items():
        if mine != values[1].get(key):
            raise ConfigError(f"{one.run} and {other.run} were evaluated differently: {key} {_short(mine)} and "
                              f"{_short(values[1].get(key))}", "--compare", how)


def _short(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ", ".join(" ".join(str(one[key]) for key in ("norm", "eps") if key in one) for one in value)
    return str(value)[:12 if isinstance(value, str) and len(value) == SHA256_LENGTH else 80]


@dataclass(frozen=True)
class Paired:
    """The difference of two shares on the same `n` images, second minus first, with its 95 % interval."""

    n: int
    gained: int  # images that only the second gets right
    lost: int  # images that only the first gets right

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
        """Two-sided exact McNemar test: a sign test of the images in which the two differ."""
        from scipy.stats import binomtest  # half a second that only --compare needs

        return float(binomtest(self.gained, self.gained + self.lost).pvalue) if self.gained + self.lost else 1.0


def pair(one: Mapping[int, bool], other: Mapping[int, bool]) -> Paired:
    """Two accuracies on the same images. Raises ConfigError where the images differ."""
    if one.keys() != other.keys():
        raise ConfigError("the evaluations are about different images", "--compare",
                          "evaluate both runs with the same images and run.seed")
    return Paired(len(one), sum(other[k] and not one[k] for k in one), sum(one[k] and not other[k] for k in one))


def as_table(one: Result, other: Result, targets: Sequence[str]) -> Table:
    """A row per target and accuracy."""
    runs = " minus ".join(f"{run.run} ({run.checkpoint}, step {run.step})" for run in (other, one))
    table = new_table(f"{runs}, the same {one.targets[0].n} images, points",
                      ("target", "accuracy"),
                      (one.run, other.run, "difference", "95 % interval", "gained", "lost", "p (McNemar)"))
    for target in targets:
        mine, theirs = answers(one)[target].correct, answers(other)[target].correct
        for name in mine:
            if name == UNION and len(one.threats) == 1:
                continue
            found = pair(mine[name], theirs[name])
            low, high = found.interval
            shares = [100 * sum(flags.values()) / len(flags) for flags in (mine[name], theirs[name])]
            table.add_row(target, name, *(f"{share:.2f}" for share in shares), f"{100 * found.difference:+.2f}",
                          f"{100 * low:+.2f} to {100 * high:+.2f}", str(found.gained), str(found.lost),
                          f"{found.p:.3g}")
    return table
