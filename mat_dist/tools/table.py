"""Mean and sample standard deviation over seeds of the accuracies with which trainings ended.

They are those of the trainings' own tests (eval.test_steps); what python -m mat_dist.evaluate found is not among them.
Runs that differ only in run.seed share their rows; rows of other runs say in which settings they differ.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, takewhile
from typing import Any

from mat_dist.cli import as_main
from mat_dist.config import Options
from mat_dist.config.load import NO_EFFECT, flat
from mat_dist.errors import ConfigError, NotReportable
from mat_dist.evaluation.results import CLEAN, UNION, Result, TargetResult, accuracies, present, read_results
from mat_dist.evaluation.settings import find_runs
from mat_dist.runs.console import new_table, show_table
from mat_dist.runs.folder import RunFolder
from mat_dist.screens import arrived

_SEED = re.compile(r"[-_.]?seed[-_.]?\d+$")
LEAD = ("runs", "settings", "target", "weights", "checkpoint", "attack")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int) -> list[str]:
    """The lines of a table; the first `text_columns` columns to the left, the others to the right."""
    rule = ["---" if number < text_columns else "---:" for number in range(len(columns))]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return [f"| {' | '.join(line)} |" for line in (columns, rule, *escaped)]


@dataclass(frozen=True)
class Value:
    """One target of the newest result of a run's `checkpoint`, best or last."""

    run: str
    checkpoint: str
    result: Result
    target: TargetResult

    @property
    def settings(self) -> dict[str, Any]:
        """Those that matter, but for the seed; the digest of the images in place of where they lie."""
        free = ("run.", *NO_EFFECT)
        kept = {name: {key: value for key, value in section.items() if not f"{name}.{key}".startswith(free)}
                if isinstance(section, dict) else section for name, section in self.result.config.items()}
        return {**kept, "data digest": self.result.document.get("data_digest")}

    @property
    def group(self) -> str:
        """What the runs of a row share: all settings but the seed, and those that do not matter."""
        return json.dumps([self.settings, self.result.attacks, self.result.plans], sort_keys=True)


def print_table(words: Sequence[str]) -> None:
    """The table for people, then the same in Markdown; or for programs. Raises ConfigError for runs that cannot be
    compared, NotReportable where there are no results."""
    options = Options("table", __doc__, "RUN [RUN ...]")
    options.add_argument("--csv", action="store_true", help="print CSV: shares in [0, 1], seeds separated by blanks")
    options.add_argument("--json", action="store_true", help="print JSON: a list of rows")
    asked = options.read(words)
    values: list[Value] = []
    for run in find_runs(asked.words):
        found = read_run(run)
        if not found:
            print(f"mat_dist: warning: {run.path} has no test results of its best or last checkpoint yet and is left "
                  "out", file=sys.stderr)
        values += found
    if not values:
        raise NotReportable("none of the runs has test results", ", ".join(asked.words[:5]),
                            "wait until they are finished, with eval.test_steps above 0")
    rows = summarise(values)
    if asked.json:
        print(json.dumps(rows, indent=1))
    elif asked.csv:
        _print_csv(rows)
    else:
        columns, texts = _cells(rows)
        lead = columns.index("attack") + 1
        table = new_table("Accuracy on the test set: mean ± sample standard deviation over seeds", columns[:lead],
                          columns[lead:])
        for row in texts:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        show_table(table)
        print("\n".join(markdown_table(columns, texts, text_columns=lead)))
    arrived()


def read_run(run: RunFolder) -> list[Value]:
    """The test results of a run: of its best and its last checkpoint, the newest of each.

    Raises NotReportable for a damaged result file.
    """
    results = read_results(run.eval, "test_*_step_*")
    return [Value(run.path.resolve().name, label, found[-1], one)
            for label, found in present(run, results).items() if found for one in found[-1].targets]


def summarise(values: Sequence[Value]) -> list[dict[str, Any]]:
    """A row per group, target, weights and checkpoint, in the order of the runs: LEAD (`settings` are those in which it
    differs from other groups), seeds, mean and sample standard deviation (n - 1; None for one seed) by accuracy.

    Raises ConfigError when two runs of a group have one seed: they are one observation, not two.
    """
    cells: dict[tuple[str, ...], list[Value]] = {}
    for value in values:
        cells.setdefault((value.group, value.target.target, value.target.weights, value.checkpoint), []).append(value)
    names, labels = _names(values), differing({value.group: value.settings for value in values})
    rows = []
    for (group, target, weights, checkpoint), same in cells.items():
        for one, other in combinations(same, 2):
            if one.result.seed == other.result.seed:
                raise ConfigError(f"{one.run} and {other.run} have the same settings and seed {one.result.seed}",
                                  "command line", "give one run per seed")
        shares = {key: [value.target.accuracy[key] for value in same] for key in same[0].target.accuracy}
        rows.append({"runs": names[group], "settings": labels[group], "target": target, "weights": weights,
                     "checkpoint": checkpoint, "attack": ", ".join(same[0].result.named_attacks()),
                     "seeds": sorted(value.result.seed for value in same),
                     "mean": {key: statistics.fmean(found) for key, found in shares.items()},
                     "deviation": {key: statistics.stdev(found) if len(found) > 1 else None
                                   for key, found in shares.items()}})
    return rows


def differing(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By group, the settings in which the groups differ. What all peers share stands there once, and where a preset
    differs, what follows from it does not."""
    settings = {group: _of_peers(values) for group, values in groups.items()}
    keys = dict.fromkeys(key for values in settings.values() for key in values)
    differ = [key for key in keys if len({json.dumps(values.get(key)) for values in settings.values()}) > 1]
    chosen = [key for key in differ if key.endswith("preset") or f"{key.rpartition('.')[0]}.preset" not in differ]
    return {group: {key: values.get(key) for key in chosen} for group, values in settings.items()}


def _of_peers(values: Mapping[str, Any]) -> dict[str, Any]:
    peers = [dict(flat(peer)) for peer in values.get("peers", ())]
    found = dict(flat({key: value for key, value in values.items() if key != "peers"}))
    for key in dict.fromkeys(key for peer in peers for key in peer if key not in ("name", "stream")):
        each = [peer.get(key) for peer in peers]
        found |= {key: each[0]} if all(one == each[0] for one in each) else {
            f"peers.{index}.{key}": one for index, one in enumerate(each)}
    return {"peers": len(peers), **found}


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


def _lead(row: Mapping[str, Any]) -> dict[str, str]:
    """The texts of LEAD."""
    told = ", ".join(f"{key}={'null' if value is None else value}" for key, value in row["settings"].items())
    return {name: told if name == "settings" else row[name] for name in LEAD}


def _cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Column names and texts: per cent, mean +- deviation. `union` only of rows with more than one threat, `settings`
    only where rows differ in some."""
    threats = [[key for key in row["mean"] if key not in (CLEAN, UNION)] for row in rows]
    shown = accuracies(*threats)
    lead = [name for name in LEAD if name != "settings" or any(row["settings"] for row in rows)]

    def text(row: Mapping[str, Any], key: str) -> str:
        deviation = row["deviation"][key]
        return f"{100 * row['mean'][key]:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")

    return [*lead, *(f"{key} %" for key in shown), "seeds"], [
        [*(_lead(row)[name] for name in lead), *(text(row, key) if key in accuracies(names) else "-" for key in shown),
         f"{len(row['seeds'])}: {', '.join(map(str, row['seeds']))}"] for row, names in zip(rows, threats, strict=True)]


def _print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    shown = [f"{key}{end}" for key in dict.fromkeys(key for row in rows for key in row["mean"])
             for end in ("", " deviation")]
    writer = csv.DictWriter(sys.stdout, [*LEAD, "seeds", *shown], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**_lead(row), "seeds": " ".join(map(str, row["seeds"])), **row["mean"],
                         **{f"{key} deviation": value for key, value in row["deviation"].items()}})


main = as_main(print_table)
