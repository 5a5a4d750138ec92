"""The JSON documents of studies as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.figures import FIGURES, figure
from benchmarks.study.plan import KINDS
from benchmarks.study.why import CURVES, reference
from mat_dist.tools.table import markdown_table

COLUMNS = {"clean": "clean %", "own_aes": "own AEs %", "peers_aes": "peers' AEs %",
           "training_aes": "own AEs, training %", "gap": "gap", "confidence": "student's confidence %",
           "teacher_confidence": "teachers' confidence %",
           "agreement": "agreement %", "teachable": "teachable %", "kl": "KL"}


def evidence_page(document: Mapping[str, Any]) -> str:
    """All tables of a suite, their differences, commands, and what is missing."""
    lines = [f"# Evidence, suite {document['suite']}", "", *head(document, "evidence")]
    for name, table in document["tables"].items():
        lines += ["", f"## {table['title']}", "", *_figure(document["suite"], name, table), *_about(table)]
        for label in ("last", "best"):
            if any(label in row["accuracy"] for row in table["rows"]):
                lines += ["", f"### {label.capitalize()} checkpoint", "", *_accuracies(table, label)]
        lines += ["", "### Against the controls", "", *verdict_lines(table["comparisons"]),
                  *why_lines(table, document["suite"])]
        if table["differences"]:
            lines += ["", "### Differences", "", "<details><summary>Every row against every control, attacked and "
                      "clean</summary>", "", *_differences(table), "", "</details>"]
        common = " ".join([*document["base_settings"], *table["settings"]])
        lines += ["", "### Rows", "", f"Each run: `python -m mat_dist.train --config {document['config']} peers=P "
                  f"{common} SETTINGS run.seed=S`, with the row's settings; *config* is a digest of what results.", "",
                  *_rows(table)]
    return "\n".join([*lines, ""])


def head(document: Mapping[str, Any], command: str) -> list[str]:
    """State, command, machines."""
    runs = document["runs"]
    state = "Complete." if runs["done"] == runs["all"] else "**Partial.** What is missing stands in the tables below."
    return [f"{runs['done']} of {runs['all']} runs are trained and evaluated. {state} Seeds "
            f"{', '.join(map(str, document['seeds']))}. Written by `python -m benchmarks.study {command} --suite "
            f"{document['suite']}` from `{document['file']}` (SHA-256 {document['file_digest'][:12]}), git "
            f"{document['git'] or 'unknown'}.", "", *(_machine(one) for one in document["machines"]),
            *([""] if document["settings"] else []),
            *([f"Settings given on the command line: `{' '.join(document['settings'])}`."]
              if document["settings"] else [])]


def _machine(one: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in one["versions"].items())
    return (f"- {one['runs']} run{'s' if one['runs'] > 1 else ''} on {', '.join(one['devices'])}; git "
            f"{one['git'] or 'unknown'}; {versions}")


def _figure(suite: str, name: str, table: Mapping[str, Any]) -> list[str]:
    """The table's figure; empty where nothing was measured."""
    if figure(table) is None:
        return []
    about = ("Robust accuracy on the validation split over epochs, mean over seeds and peers" if table.get("figure") ==
             "curves" else "Mean peer with 95 % intervals over seeds and images; *: best peer")
    return [f'<img src="{FIGURES.format(suite=suite)}/{name}.svg" width="700" alt="{about}">', "", f"{about}.", ""]


def _about(table: Mapping[str, Any]) -> list[str]:
    names = [f"`{name}`: `{' '.join(one['settings'])}`{_restricted(one)}" for name, one in table["evaluations"].items()]
    return ["Accuracy on the test set in per cent: mean and sample standard deviation over seeds. *Mean peer*: mean "
            "over the peers. *Best peer*: the one that the validation split chose. *Best checkpoint*: chosen on the "
            f"validation split. What decides is `{table['primary']}` of the last checkpoint. Columns, as settings of "
            f"`python -m mat_dist.evaluate`: {'; '.join(names)}."]


def _restricted(one: Mapping[str, Any]) -> str:
    parts = [f"{what} {', '.join(map(str, one[what]))}" for what in ("rows", "seeds") if one[what] is not None]
    parts += ["of a cohort the first peer, which is its mean peer here,"] if one.get("who") == "first" else []
    return f" ({'; '.join(parts)} alone)" if parts else ""


def _accuracies(table: Mapping[str, Any], label: str) -> list[str]:
    base = next((row["cost"] for row in table["rows"] if row["cost"]), None)
    columns = ["row", "who", *(f"{name} %" for name in table["columns"]), "seeds", "tried", "cost", "train s"]
    lines = []
    for row in table["rows"]:
        for kind in row["kinds"]:
            found = row["accuracy"].get(label, {}).get(kind)
            if found is None:
                continue
            seeds = max(len(one["by_seed"]) for one in found.values())
            failed = any(seed["failed_checks"] for seed in row["seeds"].values())
            lines.append([f"`{row['row']}`{' †' if failed else ''}", "peer" if row["peers"] == 1 else KINDS[kind],
                          *(_share(found.get(name), seeds) for name in table["columns"]),
                          str(seeds), str(row["tried"]),
                          f"{row['cost'] / base:.2f}" if base and row["cost"] else "-",
                          f"{row['train_seconds']:.0f}" if row["train_seconds"] is not None else "-"])
    notes = ["", f"*Cost*: forward and backward passes of the training against `{_first(table)}`; *train s*: seconds "
                 "in training steps, on a machine that may have done other work; *tried*: settings that were tried to "
                 "choose the row's; *seeds*: of the column that has most, others say theirs in brackets."]
    notes += [f"The cost of `{row['row']}` includes the training of `{'`, `'.join(row['starts_from'])}`."
              for row in table["rows"] if row.get("starts_from")]
    if any(seed["failed_checks"] for row in table["rows"] for seed in row["seeds"].values()):
        notes += ["", "† A soundness check failed, see the last table: not reportable."]
    return [*markdown_table(columns, lines, text_columns=2), *notes]


def _first(table: Mapping[str, Any]) -> str:
    return next((row["row"] for row in table["rows"] if row["cost"]), "-")


def _share(cell: Mapping[str, Any] | None, seeds: int) -> str:
    """Mean and deviation in per cent; how many seeds it has, where that is fewer than `seeds`."""
    if cell is None:
        return "-"
    fewer = f" ({len(cell['by_seed'])})" if len(cell["by_seed"]) < seeds else ""
    spread = "" if cell["deviation"] is None else f" ± {100 * cell['deviation']:.2f}"
    return f"{100 * cell['mean']:.2f}{spread}{fewer}"


def _differences(table: Mapping[str, Any]) -> list[str]:
    columns = ["row minus control", "who", "checkpoint", "column", "points", "95 % interval", "by seed", "verdict"]
    told = ("row", "control", "kind", "column", "mean", "low", "high", "by_seed")
    asked = [one for one in table["differences"] if one["column"] in ("clean", table["primary"])]
    last = [{key: one[key] for key in told} for one in asked if one["checkpoint"] == "last"]
    shown = [one for one in asked if one["checkpoint"] == "last" or {key: one[key] for key in told} not in last]
    lines = [[f"`{one['row']}` - `{one['control']}`", KINDS[one["kind"]], one["checkpoint"], one["column"],
              f"{100 * one['mean']:+.2f}", f"{100 * one['low']:+.2f} to {100 * one['high']:+.2f}",
              ", ".join(f"{100 * value:+.2f}" for value in one["by_seed"]), one["verdict"]] for one in shown]
    return ["Paired image by image, the same seeds; the interval is the wider one of images and seeds (Student's t), "
            "and *noise* means that it holds 0. Differences in the other columns stand in the JSON file. A single peer "
            "is its own best peer and ensemble. Where the best checkpoint is the last one, the difference stands once.",
            "", *markdown_table(columns, lines, text_columns=4)]


def _rows(table: Mapping[str, Any]) -> list[str]:
    lines = []
    for row in table["rows"]:
        states = [f"seed {seed}: {one['status']}" for seed, one in row["seeds"].items() if one["status"] != "done"]
        failed = [f"seed {seed}: {'; '.join(one['failed_checks'][:4])}" for seed, one in row["seeds"].items()
                  if one["failed_checks"]]
        state = [f"cannot be trained: {row['error']}"] if row["error"] else [*states, *failed] or ["done"]
        lines.append([f"`{row['row']}`", ". ".join(filter(None, [row["says"], row["remark"]])),
                      f"`{' '.join(row['settings'])}`", f"`{row['config_digest']}`" if row["config_digest"] else "-",
                      "; ".join(state)])
    return markdown_table(["row", "what", "settings", "config", "state"], lines, text_columns=5)


# ------------------------------------------------------------------------------------------------ verdicts


def verdict_lines(found: Mapping[str, Any]) -> list[str]:
    """The comparisons as Markdown: each row against its own control, how many there are, what came out for each row,
    a sentence for each pair."""
    made: Sequence[Mapping[str, Any]] = found["made"]
    lines = _at_equal_cost([one for one in made if one.get("equal")], found["column"], found.get("waiting", []))
    if not made:
        return [*lines, "No row in which peers learn from each other meets a control of equal or lower cost yet."]
    own = "their own control and " if any(one.get("equal") for one in made) else ""
    lines += [f"Rows in which peers learn from each other, against {own}every control that costs as much or less: "
              f"`{found['column']}` of the last checkpoint, difference in points with its 95 % interval. "
              f"{len(made)} comparisons were made, {found['several']} of them over several seeds; were there no "
              f"difference anywhere, about {found['by_chance']:.1f} of all would still not be called noise (5 %); "
              "fewer where the wider of two intervals counts, more where there is one seed, whose interval knows "
              "nothing of what another seed would give and is too narrow. Noise means that the difference cannot be "
              "told, not that there is none: see the intervals. The comparisons share rows, seeds, images: they do "
              "not err one by one. Cost is that of training; an ensemble also costs as many predictions as it has "
              "members.", ""]
    if found["left_out"]:
        lines += [f"Left out, since the control costs more or its cost is not known: "
                  f"{', '.join(f'`{row}` against `{control}`' for row, control in found['left_out'])}.", ""]
    for row in dict.fromkeys(one["row"] for one in made):
        mine = [one for one in made if one["row"] == row]
        lines.append(f"- **`{row}`**: {_summary(mine)}")
        for control in dict.fromkeys(one["control"] for one in mine):
            lines.append(f"  - {_sentence([one for one in mine if one['control'] == control])}")
    return lines


def _at_equal_cost(made: Sequence[Mapping[str, Any]], column: str, waiting: Sequence[Sequence[str]]) -> list[str]:
    """The rows that have a control of their own, against that; empty where no row has one."""
    lines = [[f"`{one['row']}`", f"`{one['control']}`", KINDS[one["kind"]], _times(one["cost_ratio"]),
              f"{100 * one['mean']:+.2f}", f"{100 * one['low']:+.2f} to {100 * one['high']:+.2f}", str(one["seeds"]),
              one["verdict"]] for one in made]
    lines += [[f"`{row}`", f"`{control}`", "-", "-", "-", "-", "0", "not measured yet"] for row, control in waiting]
    if not lines:
        return []
    columns = ["row", "its control", "who", "cost by the control's", "points", "95 % interval", "seeds", "verdict"]
    return [f"Each row against its own control, which costs as much or more: `{column}` of the last checkpoint.", "",
            *markdown_table(columns, lines, text_columns=3), ""]


def _times(ratio: float | None) -> str:
    return "not known" if ratio is None else f"{ratio:.2f}"


def _summary(mine: Sequence[Mapping[str, Any]]) -> str:
    """How often a row beats, loses and neither, by who is compared."""
    parts = []
    for kind, name in KINDS.items():
        words = [one["verdict"] for one in mine if one["kind"] == kind]
        if words:
            parts.append(f"the {name} beats {words.count('beats')} of {len(words)} controls, loses to "
                         f"{words.count('loses')}, noise {words.count('noise')}")
    return "; ".join(parts) + "."


def _sentence(pair: Sequence[Mapping[str, Any]]) -> str:
    """One row against one control."""
    first = pair[0]
    told = "; ".join(f"{KINDS[one['kind']]} {'' if one['verdict'] == 'noise' else '**'}{one['verdict']}"
                     f"{'' if one['verdict'] == 'noise' else '**'} {100 * one['mean']:+.2f} points "
                     f"({100 * one['low']:+.2f} to {100 * one['high']:+.2f})" for one in pair)
    seeds = min(one["seeds"] for one in pair)
    mine, theirs = first["tried"]
    tried = "" if mine == theirs else f", chosen from {mine} settings where the control is from {theirs}"
    own = ", its own control" if first.get("equal") else ""
    return (f"against `{first['control']}`{own}, at {_times(first['cost_ratio'])} times its cost, "
            f"{'one seed alone' if seeds == 1 else f'{seeds} seeds'}{tried}: {told}.")


# ------------------------------------------------------------------------------------------------ reasons


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
        lines += [f'<img src="{CURVES.format(suite=suite)}/{row["row"]}.svg" width="400" alt="Curves of {row["row"]}">'
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
    return markdown_table(["row", "mutual", *COLUMNS.values()], lines, text_columns=2)


def _cell(cell: Mapping[str, Any], name: str) -> str:
    scale, digits = (1, 3) if name == "kl" else (100, 1)
    spread = "" if cell["deviation"] is None else f" ± {scale * cell['deviation']:.{digits}f}"
    return f"{scale * cell['mean']:.{digits}f}{spread}"


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


# ------------------------------------------------------------------------------------------------ searches


def search_page(document: Mapping[str, Any]) -> str:
    """The settings of a search, best first."""
    lines = [f"# Search of the mutual loss, suite {document['suite']}", "", *head(document, "search"), "",
             f"Robust accuracy on the validation split after the last epoch, in per cent ({document['weights']} "
             "weights; PGD as the configuration says), never on the test set. Sorted by the mean peer. The best of "
             "many settings is flattered by the choice: how many were tried stands below.", ""]
    rows = [[f"`{one['family']}`", f"`{' '.join(one['point']) or '-'}`", *(_share(one["scores"].get(name), 0)
             for name in ("mean", "ensemble", "clean")), str(len(one["scores"]["mean"]["by_seed"])),
             f"{one['cost']:.2f}" if one["cost"] else "-"] for one in document["settings_tried"] if one["scores"]]
    columns = ["family", "setting", "mean peer %", "ensemble %", "clean %", "seeds", "cost"]
    lines += markdown_table(columns, rows, text_columns=2)
    families = [[f"`{name}`", one["says"], str(one["tried"]), str(one["done_runs"]), f"`{' '.join(one['settings'])}`"]
                for name, one in document["families"].items()]
    lines += ["", "*Cost*: forward and backward passes against the cheapest setting. Each run: `python -m "
              f"mat_dist.train --config {document['config']} peers={document['peers']} "
              f"{' '.join(document['base_settings'])} COMMON SETTING run.seed=S "
              f"{document.get('untested', 'eval.test=false')}`.", "",  # as version 0.1 wrote it
              "## Families", "",
              *markdown_table(["family", "what is varied", "settings", "finished runs", "common"], families,
                              text_columns=2)]
    missing = [f"- `{one['name']}` (`{' '.join(one['point'])}`): {one['state']}" for one in document["settings_tried"]
               if one["state"] != "done"]
    return "\n".join([*lines, *(["", "## Missing", "", *missing] if missing else []), ""])
