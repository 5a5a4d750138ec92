"""The JSON documents of studies as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mat_dist.bench.study.markdown import markdown
from mat_dist.bench.study.verdicts import KINDS, verdict_lines
from mat_dist.bench.study.why_page import why_lines


def evidence_page(document: Mapping[str, Any]) -> str:
    """All tables of a suite, their differences, commands, and what is missing."""
    lines = [f"# Evidence, suite {document['suite']}", "", *head(document, "evidence")]
    for table in document["tables"].values():
        lines += ["", f"## {table['title']}", "", *_about(table)]
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
            f"{', '.join(map(str, document['seeds']))}. Written by `python -m mat_dist.bench {command} --suite "
            f"{document['suite']}` from `{document['file']}` (SHA-256 {document['file_digest'][:12]}), git "
            f"{document['git'] or 'unknown'}.", "", *(_machine(one) for one in document["machines"]),
            *([""] if document["settings"] else []),
            *([f"Settings given on the command line: `{' '.join(document['settings'])}`."]
              if document["settings"] else [])]


def _machine(one: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in one["versions"].items())
    return (f"- {one['runs']} run{'s' if one['runs'] > 1 else ''} on {', '.join(one['devices'])}; git "
            f"{one['git'] or 'unknown'}; {versions}")


def _about(table: Mapping[str, Any]) -> list[str]:
    names = [f"`{name}`: `{' '.join(one['settings'])}`{_restricted(one)}" for name, one in table["evaluations"].items()]
    return ["Accuracy on the test set in per cent: mean and sample standard deviation over seeds. *Mean peer*: mean "
            "over the peers. *Best peer*: the one that the validation split chose. *Best checkpoint*: chosen on the "
            f"validation split. What decides is `{table['primary']}` of the last checkpoint. Columns, as settings of "
            f"`python -m mat_dist.evaluate`: {'; '.join(names)}."]


def _restricted(one: Mapping[str, Any]) -> str:
    parts = [f"{what} {', '.join(map(str, one[what]))}" for what in ("rows", "seeds") if one[what] is not None]
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
    if any(seed["failed_checks"] for row in table["rows"] for seed in row["seeds"].values()):
        notes += ["", "† A soundness check failed, see the last table: not reportable."]
    return [*markdown(columns, lines, text_columns=2), *notes]


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
            "", *markdown(columns, lines, text_columns=4)]


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
    return markdown(["row", "what", "settings", "config", "state"], lines, text_columns=5)


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
    lines += markdown(columns, rows, text_columns=2)
    families = [[f"`{name}`", one["says"], str(one["tried"]), str(one["done_runs"]), f"`{' '.join(one['settings'])}`"]
                for name, one in document["families"].items()]
    lines += ["", "*Cost*: forward and backward passes against the cheapest setting. Each run: `python -m "
              f"mat_dist.train --config {document['config']} peers={document['peers']} "
              f"{' '.join(document['base_settings'])} COMMON SETTING run.seed=S eval.test=false`.", "",
              "## Families", "",
              *markdown(["family", "what is varied", "settings", "finished runs", "common"], families, text_columns=2)]
    missing = [f"- `{one['name']}` (`{' '.join(one['point'])}`): {one['state']}" for one in document["settings_tried"]
               if one["state"] != "done"]
    return "\n".join([*lines, *(["", "## Missing", "", *missing] if missing else []), ""])
