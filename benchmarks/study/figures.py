"""One figure for each table of a study: accuracies with their intervals, or curves of the validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.plan import KINDS
from benchmarks.study.statistics import share_interval
from benchmarks.study.why import CURVES, charts
from mat_dist.report.charts import Axis, Chart, Series, interval_chart, line_chart
from mat_dist.runs.files import reported, write_bytes

FIGURES = "{suite}_figures"
GAP = (math.nan, math.nan, math.nan)
Group = tuple[str, Sequence[Mapping[str, Any]]]  # heading, rows


def figures(document: Mapping[str, Any]) -> dict[str, bytes]:
    """Name of the file -> SVG, for every table of a suite that has something to show."""
    found = {name: figure(table) for name, table in document["tables"].items()}
    return {f"{name}.svg": chart.render("svg") for name, chart in found.items() if chart is not None}


def write_pictures(out: Path, document: Mapping[str, Any]) -> None:
    """The figures and the curves beside the page, each whole or as before. Raises OutputError."""
    for pattern, files in ((FIGURES, figures(document)), (CURVES, charts(document))):
        folder = out / pattern.format(suite=document["suite"])
        if files:
            with reported(folder):
                folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_bytes(folder / name, data)


def figure(table: Mapping[str, Any]) -> Chart | None:
    """The figure that the table asks for; None where nothing was measured yet."""
    return (_curves if table.get("figure") == "curves" else _intervals)(table)


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Rows in which peers learn from each other, and the others; those alone that are there."""
    parts = [(heading, [row for row in rows if row["mutual"] is mutual])
             for heading, mutual in (("mutual:", True), ("controls:", False))]
    return [part for part in parts if part[1]]


# ------------------------------------------------------------------------------------------------ intervals


def who(row: Mapping[str, Any]) -> str:
    """Whose accuracy stands for a row: the mean peer, where the row does not report it the best one."""
    return next(kind for kind in KINDS if kind in row["kinds"])


def shown(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(column, checkpoint) of each point of a row: the primary column of the last and the best checkpoint. Where that
    was not asked for at the best one, the first column that was stands beside it, at both."""
    primary = table["primary"]
    known = {(column, label) for row in table["rows"] for label, found in row["accuracy"].items()
             for column in found.get(who(row), {})}
    at_best = [column for column in (primary, *table["columns"]) if (column, "best") in known and column != "clean"][:1]
    asked = [(primary, "last"), *((column, label) for column in at_best for label in ("last", "best"))]
    return [pair for pair in dict.fromkeys(asked) if pair in known]


def _intervals(table: Mapping[str, Any]) -> Chart | None:
    points = shown(table)
    measured = [row for row in table["rows"] if any(_cell(row, *point) for point in points)]
    if not measured:
        return None
    lines, told = [], []
    for heading, rows in _groups(measured):
        lines.append((heading, [GAP] * len(points)))
        for row in rows:
            cells = [_cell(row, *point) or GAP for point in points]
            lines.append((f"{row['row']}{'' if who(row) == 'mean' else ' *'}", cells))
            told.append(f"{row['row']} ({heading[:-1]}): " + ", ".join(
                f"{column} {label} {100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"
                for (column, label), (mean, low, high) in zip(points, cells, strict=True) if math.isfinite(mean)))
    about = f"Accuracy in per cent with 95 % intervals over seeds and images. {'; '.join(told)}"
    return interval_chart(table["title"], lines, [f"{column}, {label} checkpoint" for column, label in points],
                          description=about)


def _cell(row: Mapping[str, Any], column: str, label: str) -> tuple[float, float, float] | None:
    """Mean, low, high; None where it was not measured. Documents of version 0.1 have no intervals."""
    cell = row["accuracy"].get(label, {}).get(who(row), {}).get(column)
    if cell is None:
        return None
    low, high = cell.get("interval") or share_interval(list(cell["by_seed"].values()), cell["images"])
    return cell["mean"], low, high


# ------------------------------------------------------------------------------------------------ curves


def _curves(table: Mapping[str, Any]) -> Chart | None:
    rows = [row for _, some in _groups(table["rows"]) for row in some if row["why"]["curves"].get("robust")]
    if not rows:
        return None
    series = [Series(f"{row['row']}{', mutual' if row['mutual'] else ''}",
                     [tuple(point) for point in row["why"]["curves"]["robust"]], number)
              for number, row in enumerate(rows)]
    return line_chart(table["title"], series, Axis("epoch"), Axis("robust accuracy, validation, %", percent=True))
