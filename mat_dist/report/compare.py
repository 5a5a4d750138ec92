"""The comparison of several runs: accuracies side by side, what differs in their settings, curves of the training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mat_dist.config import config_differences
from mat_dist.evaluation.statistics import wilson_interval
from mat_dist.report.about import notices, status
from mat_dist.report.book import Book, charts
from mat_dist.report.charts import Series, interval_chart, line_chart
from mat_dist.report.evaluations import ENSEMBLE
from mat_dist.report.files import RunFiles
from mat_dist.report.html import Child, Markup, folded, join, section, table, tag
from mat_dist.report.page import document
from mat_dist.report.results import accuracy_table, chosen, percent, with_interval
from mat_dist.report.training import entry, number, thinned

# Settings that change neither what is trained nor how it is evaluated.
_FREE = ("run.root", "run.name", "run.resume", "run.device", "run.threads", "comm.", "log.", "checkpoint.", "data.root",
         "data.download", "data.cache", "data.residency")
MOST_SETTINGS = 30  # rows of the table of settings; more of them are folded


def comparison_page(runs: Sequence[RunFiles]) -> tuple[str, Book]:
    """The page for two or more runs, in their order."""
    book = Book()
    names = _names(runs)
    notes = [f"{name}: {note}" for name, run in zip(names, runs, strict=True) for note in run.notes]
    parts = [("Result", _results(runs, names, book)), ("Training", _training(runs, names, book)),
             ("Settings", _settings(runs, names))]
    lead = join(tag("p", ", ".join(f"{name} ({status(run)})" for name, run in zip(names, runs, strict=True))),
                notices(notes))
    return document(f"{len(runs)} runs compared", lead, parts), book


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """Names of the folders, with the folder above where two are equal."""
    names = [run.name for run in runs]
    return [f"{run.folder.path.resolve().parent.name}/{name}" if names.count(name) > 1 else name
            for name, run in zip(names, runs, strict=True)]


def unlike(runs: Sequence[RunFiles]) -> list[str]:
    """Why the accuracies of the runs must not be compared: other data, attack, threats or number of images."""
    found: dict[str, list[str]] = {}
    for run in runs:
        one = run.headline
        if one is not None:
            values = {"data": run.config.data.name, "images": one.images, "number of images": one.targets[0].n,
                      "attack": one.attacks, "threats": ", ".join(one.threats)}
            for key, value in values.items():
                found.setdefault(key, []).append(str(value))
    return [f"{key}: {' | '.join(dict.fromkeys(values))}" for key, values in found.items() if len(set(values)) > 1]


def _results(runs: Sequence[RunFiles], names: Sequence[str], book: Book) -> Markup:
    rows: list[list[Child]] = []
    drawn: list[tuple[str, list[tuple[float, float, float]]]] = []
    for name, run in zip(names, runs, strict=True):
        one = run.headline
        if one is None:
            rows.append([name, *["-"] * 6, status(run), "-"])
            continue
        targets = chosen(run, one)
        peers = [t for t in targets if t.is_peer]
        ensemble = next((t for t in targets if t.name == ENSEMBLE), None)
        means = [percent(sum(t.accuracy[key] for t in peers) / len(peers)) if peers else "-"
                 for key in ("union", "clean")]
        shown: list[Child] = ["-", "-"]
        if ensemble is not None:
            shown = [with_interval(ensemble.accuracy[key], ensemble.n) for key in ("union", "clean")]
            if any(t.failed for t in targets):
                name += " (not reportable)"
            drawn.append((name, [(ensemble.accuracy[key], *wilson_interval(ensemble.accuracy[key], ensemble.n))
                                 for key in ("clean", "union")]))
        rows.append([name, *shown, *means, targets[0].n, run.config.run.seed,
                     f"{one.attacks}; {', '.join(one.threats)}", f"{one.images}, {targets[0].weights}"])
    head = ["run", "ensemble robust %", "ensemble clean %", "peers robust %", "peers clean %", "n", "seed", "attack",
            "images, weights"]
    warning = unlike(runs)
    figures = [book.figure("comparison_accuracy", interval_chart(
        "Ensembles with 95 % intervals", drawn, ["clean", "robust"],
        description="Clean and robust accuracy of each run's ensemble"))] if drawn else []
    each = [accuracy_table(f"{name}: {e.images}, step {e.step}", e, chosen(run, e))
            for name, run in zip(names, runs, strict=True) if (e := run.headline) is not None]
    return section(
        "result", "Result",
        tag("div", tag("strong", "These numbers do not compare like with like. "), "; ".join(warning), class_="notice",
            role="note") if warning else None,
        table("peers: mean of the peers; small print: 95 % Wilson interval", head, rows, texts=(0, 7, 8)),
        charts(*figures),
        tag("p", "Where the intervals of two runs overlap on the same images, a paired test may still tell them apart. "
                 "One run each cannot tell what other seeds give: python -m mat_dist.table has means over seeds.",
            class_="dim"), folded("Every target", each))


def _training(runs: Sequence[RunFiles], names: Sequence[str], book: Book) -> Markup:
    figures: list[Child] = []
    for key, records, title in (("loss", "steps", "Training loss"),
                                ("robust_acc", "epochs", "Robust accuracy, validation"),
                                ("clean_acc", "epochs", "Clean accuracy, validation")):
        series = []
        for index, (name, run) in enumerate(zip(names, runs, strict=True)):
            prefix = "ema_" if run.averaged and key != "loss" else ""
            points = [(float(r.get("epoch", 0)), _mean(r.get(prefix + key), len(run.peers)))
                      for r in getattr(run, records) if isinstance(r.get(prefix + key), list)]
            series.append(Series(name, thinned(points), index))
        series = [one for one in series if one.known()]
        if series:
            figures.append(book.figure(f"comparison_{key}", line_chart(
                title, series, x_label="epoch", y_label="loss" if key == "loss" else "%", percent=key != "loss"),
                "Mean of the peers" + ("." if key == "loss" else ", averaged weights where they are kept.")))
    return section("training", "Training", charts(*figures))


def _mean(values: Any, peers: int) -> float | None:
    known = [value for index in range(peers) if (value := number(entry(values, index))) is not None]
    return sum(known) / peers if len(known) == peers else None


def _settings(runs: Sequence[RunFiles], names: Sequence[str]) -> Markup:
    """A row per setting in which any run differs from the first one."""
    flat = [dict(_flat(run.config.model_dump(mode="json"))) for run in runs]
    changed = {line.split(": ", 1)[0] for run in runs[1:] for line in config_differences(runs[0].config, run.config)}
    keys = sorted(key for key in changed if not key.startswith(_FREE))
    rows = [[key, *(_text(values.get(key)) for values in flat)] for key in keys]
    if not rows:
        return section("settings", "Settings", tag("p", "All settings that matter are the same."))
    found = table("settings that change nothing in the result are left out", ["setting", *names], rows,
                  texts=range(1 + len(names)))
    return section("settings", "Settings that differ",
                   found if len(rows) <= MOST_SETTINGS else folded(f"{len(rows)} settings", found))


def _text(value: Any) -> str:
    """A setting's value, numbers to six digits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _flat(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """Dotted names of all settings, as `config_differences` writes them."""
    if isinstance(value, dict):
        return [pair for name, child in value.items() for pair in _flat(child, f"{key}.{name}" if key else str(name))]
    if isinstance(value, list) and any(isinstance(child, dict) for child in value):
        return [pair for index, child in enumerate(value) for pair in _flat(child, f"{key}.{index}")]
    return [(key, value)]
