"""Mean and sample standard deviation of final accuracies over seeds.

Runs that differ only in run.seed share their rows.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, takewhile
from pathlib import Path

from rich.table import Table

from mat_dist.cli import run_entry
from mat_dist.config import Options
from mat_dist.errors import ConfigError, NotReportable
from mat_dist.evaluation.results import CLEAN, UNION, Result, accuracies, present, read_results
from mat_dist.runs.console import new_table, show_table
from mat_dist.runs.folder import RunFolder
from mat_dist.screens import arrived

_SEED = re.compile(r"[-_.]?seed[-_.]?\d+$")
# Sections that do not change what is trained or how it is evaluated; run holds the seed.
_FREE = ("run", "comm", "log", "checkpoint")
LEAD = ("runs", "target", "weights", "checkpoint", "attack")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int) -> list[str]:
    """The lines of a table; the first `text_columns` columns to the left, the others to the right."""
    rule = ["---" if number < text_columns else "---:" for number in range(len(columns))]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return [f"| {' | '.join(line)} |" for line in (columns, rule, *escaped)]


@dataclass(frozen=True)
class Value:
    """The accuracies of one target in one run.

    Attributes:
        group: what the runs of a row share: all settings but the seed, and those that do not matter.
        run, seed: which run.
        target, weights, checkpoint: a peer or `ensemble`; `raw` or `ema`; `best` or `last`.
        attack: name, steps and restarts.
        accuracy: name of the accuracy -> share in [0, 1]: clean, each threat, union.
    """

    group: str
    run: str
    seed: int
    target: str
    weights: str
    checkpoint: str
    attack: str
    accuracy: dict[str, float]


@dataclass(frozen=True)
class Row:
    """Mean and sample standard deviation (n - 1; None for one seed) over the runs of `seeds`, by name of the
    accuracy."""

    lead: tuple[str, ...]
    seeds: tuple[int, ...]
    mean: dict[str, float]
    deviation: dict[str, float | None]

    @property
    def several(self) -> bool:
        """Whether there is more than one threat."""
        return len(self.mean.keys() - {CLEAN, UNION}) > 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command -> exit code: 0, 2 for runs that cannot be compared, 16 where there are no results."""
    return run_entry(lambda: print_table(sys.argv[1:] if argv is None else argv))


def print_table(words: Sequence[str]) -> None:
    """The table for people, then the same in Markdown."""
    runs = Options("table", __doc__, "RUN [RUN ...]").read(words).words
    values: list[Value] = []
    for word in runs:
        found = read_run(Path(word))
        if not found:
            print(f"mat_dist: warning: {word} has no test results of its best or last checkpoint yet and is left out",
                  file=sys.stderr)
        values += found
    if not values:
        raise NotReportable("none of the runs has test results", ", ".join(runs[:5]),
                            "wait until they are finished, with eval.test_steps above 0")
    rows = summarise(values)
    show_table(as_table(rows))
    print(as_markdown(rows))
    arrived()


def read_run(folder: Path) -> list[Value]:
    """The test results of a run: of its best and its last checkpoint, the newest of each.

    Raises ConfigError for something that is not a run folder, NotReportable for a damaged result file.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{str(folder)!r} is not a run folder", "command line", "give folders like runs/NAME")
    results = read_results(folder / "eval", "test_*_step_*")
    newest = {label: found[-1] for label, found in present(RunFolder(folder), results).items() if found}
    return [value for label, result in newest.items() for value in _values(folder, label, result)]


def _values(folder: Path, label: str, result: Result) -> list[Value]:
    settings = {key: value for key, value in result.config.items() if key not in _FREE}
    group = json.dumps([settings, result.attacks, result.plans], sort_keys=True)
    return [Value(group, folder.resolve().name, result.seed, one.target, one.weights, label,
                  ", ".join(result.named_attacks()), dict(one.accuracy)) for one in result.targets]


def summarise(values: Sequence[Value]) -> list[Row]:
    """A row per group, target, weights and checkpoint, in the order of the runs.

    Raises ConfigError when two runs of a group have one seed: they are one observation, not two.
    """
    cells: dict[tuple[str, ...], list[Value]] = {}
    for value in values:
        cells.setdefault((value.group, value.target, value.weights, value.checkpoint), []).append(value)
    names = _names(values)
    rows = []
    for (group, *lead), same in cells.items():
        for one, other in combinations(same, 2):
            if one.seed == other.seed:
                raise ConfigError(f"{one.run} and {other.run} have the same settings and seed {one.seed}",
                                  "command line", "give one run per seed")
        shares = {key: [value.accuracy[key] for value in same] for key in same[0].accuracy}
        rows.append(Row((names[group], *lead, same[0].attack), tuple(sorted(value.seed for value in same)),
                        {key: statistics.fmean(found) for key, found in shares.items()},
                        {key: statistics.stdev(found) if len(found) > 1 else None for key, found in shares.items()}))
    return rows


def _names(values: Sequence[Value]) -> dict[str, str]:
    """A name per group: what the names of its runs have in common, up to a `-`, `_` or `.`, or that of its one run
    without the seed; numbered where two groups would share one."""
    names: dict[str, str] = {}
    for group in dict.fromkeys(value.group for value in values):
        runs = list(dict.fromkeys(value.run for value in values if value.group == group))
        same = takewhile(lambda letters: len(set(letters)) == 1, zip(*runs, strict=False))
        common = "".join(letters[0] for letters in same)
        stem = re.sub(r"[-_.][^-_.]*$", "", common) if len(runs) > 1 else _SEED.sub("", common)
        stem = stem or runs[0]
        numbered = [stem, *(f"{stem} ({k})" for k in range(2, len(values) + 2))]
        names[group] = next(name for name in numbered if name not in names.values())
    return names


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Column names and texts: per cent, mean +- deviation. `union` only of rows with more than one threat."""
    shown = [name for name in accuracies(key for row in rows for key in row.mean if key not in (CLEAN, UNION))
             if name != UNION or any(row.several for row in rows)]

    def text(row: Row, key: str) -> str:
        if key not in row.mean or (key == UNION and not row.several):
            return "-"
        deviation = row.deviation[key]
        return f"{100 * row.mean[key]:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")

    columns = [*LEAD, *(f"{key} %" for key in shown), "seeds"]
    return columns, [[*row.lead, *(text(row, key) for key in shown),
                      f"{len(row.seeds)}: {', '.join(map(str, row.seeds))}"] for row in rows]


def as_table(rows: Sequence[Row]) -> Table:
    """The table for a terminal."""
    columns, texts = _cells(rows)
    table = new_table("Accuracy on the test set: mean ± sample standard deviation over seeds", LEAD,
                      columns[len(LEAD):])
    for row in texts:
        table.add_row(*row)
    return table


def as_markdown(rows: Sequence[Row]) -> str:
    """The table in Markdown."""
    columns, texts = _cells(rows)
    return "\n".join(markdown_table(columns, texts, text_columns=len(LEAD)))
