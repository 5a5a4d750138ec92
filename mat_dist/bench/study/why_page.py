"""The reasons of a table: a Markdown section made from its JSON document, and a chart of curves per cohort."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mat_dist.bench.study.markdown import markdown
from mat_dist.bench.study.verdicts import KINDS
from mat_dist.report.charts import Axis, Chart, Series, line_chart
from mat_dist.runs.files import reported, write_bytes

COLUMNS = {"clean": "clean %", "own_aes": "own AEs %", "peers_aes": "peers' AEs %",
           "training_aes": "own AEs, training %", "gap": "gap", "confidence": "student's confidence %",
           "teacher_confidence": "teachers' confidence %",
           "agreement": "agreement %", "teachable": "teachable %", "kl": "KL"}
LINES = {"robust": "robust, mean peer", "ensemble_robust": "robust, ensemble", "clean": "clean, mean peer",
         "ensemble_clean": "clean, ensemble", "own_aes": "own AEs, training", "peers_aes": "peers' AEs, training"}
FOLDER = "{suite}_curves"


def why_lines(table: Mapping[str, Any], suite: str) -> list[str]:
    """The section; empty where no cohort was trained."""
    rows = [row for row in table["rows"] if row["peers"] > 1 and (row["why"]["peers"] or row["why"]["curves"])]
    if not rows:
        return []
    lines = ["", "### Why", ""]
    measured = [row for row in rows if row["why"]["peers"]]
    if measured:
        lines += [*_explained(measured), "", *_table(measured), ""]
    for row in table["rows"]:
        lines += _shortfall(row, table)
    charts = [row for row in rows if row["why"]["curves"]]
    if charts:
        lines += ["", "Curves on the validation split, means over seeds; *training*: in its batches, with batch norm "
                  "in train mode; the last line is robust accuracy of the control that a row is held against.", ""]
        lines += [f'<img src="{FOLDER.format(suite=suite)}/{row["row"]}.svg" width="400" alt="Curves of {row["row"]}">'
                  for row in charts]
    return lines


def _explained(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    first = next(iter(measured[0]["why"]["seeds"].values()))
    attacks = [one for row in measured for seed in row["why"]["seeds"].values() for one in seed["attack"]]
    steps = "/".join(str(count) for count in sorted({one["steps"] for one in attacks}))
    return [f"Every cohort on at most {first['asked']} images of the validation split, last checkpoint, "
            f"PGD-{steps} (l1: APGD) on cross-entropy for all; means over students and seeds. *Peers' AEs*: "
            "accuracy on AEs that another peer made; the more it lies above *own AEs*, the weaker they are for "
            "who receives them. *Gap*: points by which own AEs of training images are more often right than those"
            " of validation images (overfitting). On a student's own AEs: *confidence* in the true class, of the "
            "student and of the others, its teachers; *agreement* of their labels with its; *teachable*: some "
            "teacher is right where the student is wrong, an upper bound of what labels can teach there; *KL* "
            "from teacher to student in nats."]


def _table(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [[f"`{row['row']}`", "yes" if row["mutual"] else "no",
              *(_cell(row["why"]["peers"][name], name) for name in COLUMNS)] for row in measured]
    return markdown(["row", "mutual", *COLUMNS.values()], lines, text_columns=2)


def _cell(cell: Mapping[str, Any], name: str) -> str:
    scale, digits = (1, 3) if name == "kl" else (100, 1)
    spread = "" if cell["deviation"] is None else f" ± {scale * cell['deviation']:.{digits}f}"
    return f"{scale * cell['mean']:.{digits}f}{spread}"


def reference(row: Mapping[str, Any], table: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The control that a cohort is held against: the first one of as many independent peers with averaged weights
    alike, else the first with curves; None where there is none."""
    controls = [one for name in table["controls"] for one in table["rows"] if one["row"] == name
                and one is not row and one["why"]["curves"]]
    alike = [one for one in controls if one["peers"] == row["peers"] and one["averages"] == row["averages"]]
    return next(iter([*alike, *(one for one in controls if one["peers"] == row["peers"]), *controls]), None)


def _shortfall(row: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    """A mutual row that does not beat some control of equal or lower cost, beside independent peers."""
    failed = [one for one in table["comparisons"]["made"] if one["row"] == row["row"] and one["verdict"] != "beats"]
    if not failed or not row["why"]["peers"]:
        return []
    other = reference(row, table)
    theirs = other["why"]["peers"] if other is not None else {}

    def value(name: str, unit: str = " %", digits: int = 1) -> str:
        scale = 100 if digits == 1 else 1
        beside = f" (`{other['row']}`: {scale * theirs[name]['mean']:.{digits}f}{unit})" if other and theirs else ""
        return f"{scale * row['why']['peers'][name]['mean']:.{digits}f}{unit}{beside}"

    mine = row["why"]["peers"]
    weaker = 100 * (mine["peers_aes"]["mean"] - mine["own_aes"]["mean"])
    beside = 100 * (theirs["peers_aes"]["mean"] - theirs["own_aes"]["mean"]) if theirs else 0.0
    pairs = {name: [f"`{one['control']}` ({one['verdict']})" for one in failed if one["kind"] == kind]
             for kind, name in KINDS.items()}
    against = "; ".join(f"the {name} does not beat {', '.join(some)}" for name, some in pairs.items() if some)
    strength = f"{weaker:+.1f} points" + (f" (`{other['row']}`: {beside:+.1f})" if other and theirs else "")
    return [f"- `{row['row']}`: {against}. Right on peers' AEs against own AEs: "
            f"{strength}. Own AEs on which a teacher is right and the student wrong: {value('teachable')}; of peers' "
            f"AEs: {value('teachable_peers_aes')}. Labels agree on {value('agreement')} of own AEs, KL "
            f"{value('kl', '', 3)}. Own AEs of training against validation images: {value('gap', ' points')}."]


def charts(document: Mapping[str, Any]) -> dict[str, bytes]:
    """Name of the file -> SVG, for every trained cohort of a suite."""
    return {f"{row['row']}.svg": _chart(row, reference(row, table)).render("svg")
            for table in document["tables"].values() for row in table["rows"]
            if row["peers"] > 1 and row["why"]["curves"]}


def _chart(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> Chart:
    found = row["why"]["curves"]
    series = [Series(title, [tuple(point) for point in found[name]], number)
              for number, (name, title) in enumerate(LINES.items()) if name in found]
    if other is not None and "robust" in other["why"]["curves"]:
        theirs = [tuple(point) for point in other["why"]["curves"]["robust"]]
        series.append(Series(f"robust, {other['row']}", theirs, -1))
    return line_chart(row["row"], series, Axis("epoch"), Axis("accuracy, %", percent=True))


def write_charts(out: Path, document: Mapping[str, Any]) -> None:
    """The charts beside the page, each whole or as before. Raises OutputError."""
    files = charts(document)
    folder = out / FOLDER.format(suite=document["suite"])
    if files:
        with reported(folder):
            folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_bytes(folder / name, data)
