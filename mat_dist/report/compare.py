"""The comparison of several runs: accuracies side by side, what differs in their settings, curves of the training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mat_dist.config import flat_settings
from mat_dist.config.load import NO_EFFECT
from mat_dist.evaluation.results import CLEAN, ENSEMBLE, UNION, accuracies, is_peer
from mat_dist.report.charts import Axis, Figure, Series, interval_chart, line_chart
from mat_dist.report.curves import EPOCH, PER_CENT, entry, number, thinned, validations
from mat_dist.report.files import RunFiles
from mat_dist.report.page import Page, Table, accuracy_table, chosen, interval_row, render, status, with_interval
from mat_dist.runs.console import percent

MOST_SETTINGS = 30  # rows of the table of settings; more of them are folded


def comparison_page(runs: Sequence[RunFiles]) -> Page:
    """The page for two or more runs, in their order."""
    names = _names(runs)
    sections = {"result": _results(runs, names), "training": {"figures": _training(runs, names)},
                "settings": _settings(runs, names)}
    return render("comparison.html", f"{len(runs)} runs compared", sections,
                  states=[(name, status(run)) for name, run in zip(names, runs, strict=True)],
                  notices=[f"{name}: {note}" for name, run in zip(names, runs, strict=True) for note in run.notes])


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


def _results(runs: Sequence[RunFiles], names: Sequence[str]) -> dict[str, Any]:
    rows: list[list[object]] = []
    drawn, each = [], []
    shown = accuracies(*(run.headline.threats for run in runs if run.headline))
    for name, run in zip(names, runs, strict=True):
        one = run.headline
        if one is None:
            rows.append([name, *["-"] * (2 * len(shown) + 3), status(run), "-"])
            continue
        mine = [key if key in accuracies(one.threats) else "" for key in shown]
        targets = chosen(run, one)
        peers = [t for t in targets if is_peer(t.target)]
        ensemble = next((t for t in targets if t.target == ENSEMBLE), None)
        label = f"{name} (not reportable)" if ensemble and any(t.failed for t in targets) else name
        cells: list[object] = ["-"] * len(shown)
        if ensemble is not None:
            cells = [with_interval(ensemble.accuracy[key], ensemble.n) if key else "-" for key in mine]
            drawn.append((label, interval_row(ensemble, mine)))
        means = [percent(sum(t.accuracy[key] for t in peers) / len(peers) if peers and key else None, 2)
                 for key in mine]
        rows.append([label, *cells, *means, targets[0].n, run.config.run.seed, one.attacks,
                     f"{one.images}, step {one.step}, {targets[0].weights}"])
        each.append(accuracy_table(f"{name}: {one.images}, step {one.step}", one, targets))
    head = ["run", *(f"{who} {name} %" for who in ("ensemble", "peers") for name in shown), "n", "seed", "attack",
            "images, weights"]
    figures = [Figure("comparison_accuracy", interval_chart(
        "Ensembles with 95 % intervals", drawn, shown,
        description="Clean and robust accuracy of each run's ensemble"))] if drawn else []
    return {"unlike": unlike(runs), "each": each, "figures": figures, "table": Table(
        "peers: mean of the peers; small print: 95 % Wilson interval; union: right under every threat", head, rows,
        texts=(0, len(head) - 2, len(head) - 1))}


def _training(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Figure]:
    shown = accuracies(*(run.threats for run in runs))
    measured = [validations(run) for run in runs]
    figures = []
    for count, key in enumerate(("loss", *shown)):
        series = [Series(name, thinned([
            (float(r.get("epoch", 0)), _mean(r.get(key), len(run.peers)))
            for r in (run.steps if key == "loss" else found)
            if isinstance(r.get(key), list) and (key != UNION or len(run.threats) > 1)]), index)
            for index, (name, run, found) in enumerate(zip(names, runs, measured, strict=True))]
        if series := [one for one in series if one.known()]:
            title, axis = ("Training loss", Axis("loss")) if key == "loss" else (f"Validation: {key}", PER_CENT)
            figures.append(Figure(f"comparison_{key if key in ('loss', CLEAN, UNION) else count}", line_chart(
                title, series, EPOCH, axis), "Mean of the peers" + (
                "." if key == "loss" else ", averaged weights where they are kept.")))
    return figures


def _mean(values: Any, peers: int) -> float | None:
    known = [value for index in range(peers) if (value := number(entry(values, index))) is not None]
    return sum(known) / peers if len(known) == peers else None


def _settings(runs: Sequence[RunFiles], names: Sequence[str]) -> dict[str, Any]:
    """A row per setting in which any run differs from the first one."""
    flat = [flat_settings(run.config) for run in runs]
    keys = sorted({key for values in flat for key in values if not key.startswith((*NO_EFFECT, "run.device"))})
    rows = [[key, *(_text(values.get(key)) for values in flat)] for key in keys
            if any(values.get(key) != flat[0].get(key) for values in flat)]
    return {"folded": len(rows) > MOST_SETTINGS, "table": Table(
        "settings that change nothing in the result are left out", ["setting", *names], rows,
        texts=range(1 + len(names)))}


def _text(value: Any) -> str:
    """A setting's value, numbers to six digits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
