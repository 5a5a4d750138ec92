"""The page: what its sections show, the templates that they go into, and what is written where."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mat_dist
from mat_dist.attacks.norms import Threat, eps_text
from mat_dist.config import dump_config
from mat_dist.errors import DONE
from mat_dist.evaluation.results import (
    CLEAN,
    ENSEMBLE,
    UNION,
    Answers,
    TargetResult,
    accuracies,
    is_peer,
    wilson_interval,
)
from mat_dist.report.charts import Axis, Figure, Series, fit, heat_map, interval_chart, line_chart, surface
from mat_dist.report.curves import MOST_PEERS, last_transfer, time_section, training_figures, transfer_chart
from mat_dist.report.files import Evaluation, RunFiles
from mat_dist.runs.console import counted, duration, percent
from mat_dist.runs.files import reported, write_bytes, write_text

if TYPE_CHECKING:
    from mat_dist.report.measure import Measured, Points, Victims

MOST_CLASSES = 20  # rows of the chart of classes; with more classes the worst ones are shown
MOST_TARGETS = 33  # columns of the chart of classes: the last peers and the ensemble
MOST_ANSWERS = 12  # rows of predictions below a picture
# Sections in their order, and what the links at the top call them.
_SECTIONS = {"result": "Result", "gallery": "Gallery", "strength": "Attack strength", "transfer": "Transfer",
             "classes": "Classes", "training": "Training", "surface": "Loss surface", "time": "Time",
             "settings": "Settings"}
# Files of an earlier report, which a new one without them removes; a user's own files beside them stay.
_OURS = {"index.html": re.compile(r"(accuracy|classes|(eps|steps|transfer|validation|gallery)_\w+|train_ae|wait|"
                                  r"learning_rate|phases|exchange|loss\w*)\.(svg|pdf|png)"),
         "comparison.html": re.compile(r"comparison_\w+\.(svg|pdf|png)")}


class Cell(NamedTuple):
    """A cell with small print, and a mark in red."""

    text: object
    small: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row; `texts` are the columns that hold no numbers."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    texts: Collection[int] = (0,)


@dataclass(frozen=True)
class Page:
    """HTML, its figures, and files that lie beside it, by name."""

    html: str
    figures: Sequence[Figure]
    files: Mapping[str, bytes] = field(default_factory=dict)


def render(template: str, title: str, sections: Mapping[str, Any], **values: Any) -> Page:
    """A whole page of those `sections` that are not None. Their figures come along."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    templates = Environment(loader=PackageLoader("mat_dist.report"), autoescape=True, undefined=StrictUndefined,
                            trim_blocks=True, lstrip_blocks=True)
    templates.filters["base64"] = lambda content: base64.b64encode(content).decode()
    style = templates.get_template("style.css").render()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    html = templates.get_template(template).render(
        values, title=title, style=Markup(style), digest=digest, version=mat_dist.__version__, sections=sections,
        links=[(name, text) for name, text in _SECTIONS.items() if sections.get(name)], now=datetime.now(UTC))
    return Page(fit(html), [figure for one in sections.values() if one for figure in one.get("figures", ())])


def run_page(run: RunFiles, victims: Victims | None, measured: Measured | None, notes: Sequence[str]) -> Page:
    """The report of one run; without `measured` only what its files tell, `notes` say why."""
    sections: dict[str, Any] = {
        "result": result_section(run), "gallery": None, "strength": None, "surface": None,
        "transfer": _transfer_section(run, victims, measured), "classes": _classes(run, victims, measured),
        "training": {"figures": training_figures(run)}, "time": time_section(run), "settings": _settings(run)}
    files: dict[str, bytes] = {}
    if victims is not None and measured is not None:
        sections |= {"gallery": _gallery_section(victims, measured), "strength": _strength_section(victims, measured),
                     "surface": _surface_section(victims, measured)}
        files = {f"gallery_{one['sample']}_{kind}.png": png for one in sections["gallery"]["cards"]
                 for kind, png in one["images"].items()}
    page = render("run.html", f"Run {run.name}", sections, facts=_facts(run), notices=[*run.notes, *notes])
    return Page(page.html, page.figures, files)


def write_report(folder: Path, page: Page, name: str = "index.html", kind: str = "svg") -> Path:
    """Write page, figures (of `kind`: svg, pdf, png) and files into `folder`; charts and pictures of an earlier report
    that are no longer made are removed.

    Raises OutputError.
    """
    files = {**{f"{one.name}.{kind}": one.chart.render(kind) for one in page.figures}, **page.files}
    with reported(folder):
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            if _OURS[name].fullmatch(old.name) and old.name not in files:
                old.unlink()
    for file, content in files.items():
        write_bytes(folder / file, content)
    write_text(folder / name, page.html)
    return folder / name


# ------------------------------------------------------------------ the run itself


def status(run: RunFiles) -> str:
    """How the last attempt ended, in words."""
    if run.writer is not None:
        return f"it goes on, written by {run.writer}"
    attempts = run.exit.get("attempts")
    last: Any = attempts[-1] if isinstance(attempts, list) and attempts else None
    if not isinstance(last, dict):
        return "unknown: there is no record of its end"
    if last.get("code") == DONE:
        return "done"
    return f"{last.get('state')}, exit code {last.get('code')}: {last.get('what')} ({last.get('where')})"


def _took(run: RunFiles) -> str:
    """Wall time of the last attempt."""
    try:
        begun = datetime.fromisoformat(run.environment["attempts"][-1]["started"])
        return duration((datetime.fromisoformat(run.exit["attempts"][-1]["time"]) - begun).total_seconds())
    except (KeyError, IndexError, TypeError, ValueError):
        return "-"


def _facts(run: RunFiles) -> dict[str, object]:
    """The run in a dozen words."""
    config, peers, around = run.config, run.config.peers, run.environment
    placement, devices, versions = (around.get(key) for key in ("placement", "devices", "versions"))
    ranks = placement.get("ranks", "-") if isinstance(placement, dict) else "-"
    attempts = len(around.get("attempts", []))
    return {
        "state": status(run), "data": config.data.name, "peers": counted([p.model.name for p in peers]),
        "loss": counted([p.loss.preset for p in peers]),
        "threat": ", ".join(run.threats),
        "training attack": counted([f"{p.attack.method.upper()}-{p.attack.steps}" for p in peers]),
        "training": f"{config.train.epochs} epochs of batches of {config.train.batch_size}, "
                    f"{run.steps[-1]['step'] if run.steps else 0} steps",
        "seed": config.run.seed,
        "ranks": f"{ranks}, {counted(devices)}" if isinstance(devices, list) and devices else ranks,
        "wall time": _took(run) + (f" (attempt {attempts})" if attempts > 1 else ""),
        "versions": ", ".join(f"{name} {versions[name]}" for name in ("mat_dist", "torch") if name in versions)
        if isinstance(versions, dict) else "-"}


def _settings(run: RunFiles) -> dict[str, Any]:
    def text(document: dict[str, Any]) -> str:
        return json.dumps(document, indent=1, ensure_ascii=False)

    return {"documents": {
        "Configuration (config.yaml)": dump_config(run.config),
        "Environment (environment.json)": text({k: v for k, v in run.environment.items() if k != "attempts"}),
        "Attempts (exit.json)": text({"exit": run.exit.get("attempts", [])})}}


# ------------------------------------------------------------------ result files


def with_interval(share: float, n: int) -> Cell:
    """Per cent with its 95 % Wilson interval."""
    low, high = wilson_interval(share, n)
    return Cell(percent(share, 2), f"{percent(low)} – {percent(high)}")


def chosen(run: RunFiles, one: Evaluation) -> list[TargetResult]:
    """The rows that count: averaged weights where they are kept."""
    averaged = [target for target in one.targets if target.weights == "ema"]
    return averaged if run.averaged and averaged else list(one.targets)


def accuracy_table(caption: str, one: Evaluation, targets: Sequence[TargetResult]) -> Table:
    """Accuracies with n and interval: clean, each threat, their union where there are several."""
    columns = {name: f"{one.attack}, {name} %" if name in one.threats else f"{name} %"
               for name in accuracies(one.threats)}
    several = len({target.weights for target in targets}) > 1
    rows = [[Cell(t.target, t.weights if several else "", "not reportable" if t.failed else ""),
             *(with_interval(t.accuracy[key], t.n) for key in columns), t.n] for t in targets]
    return Table(caption, ["target", *columns.values(), "n"], rows)


def interval_row(target: TargetResult, names: Sequence[str]) -> list[tuple[float, float, float]]:
    """(share, low, high) of some accuracies; not a number for one that was not measured."""
    shares = [target.accuracy.get(name) for name in names]
    return [(math.nan,) * 3 if share is None else (share, *wilson_interval(share, target.n)) for share in shares]


def result_section(run: RunFiles) -> dict[str, Any]:
    """The headline: clean and robust accuracy of each target with n and interval, as table and chart.

    What was measured on a checkpoint that is neither the best nor the last any more is history.
    """
    one = run.headline
    validations = [e for e in run.evaluations if e.file.startswith("validation")]
    shown = [e for e in run.evaluations if e not in validations[1:]]
    others = {part: [accuracy_table(f"{e.images}, step {e.step}, {e.attacks} ({e.file})", e, e.targets)
                     for e in shown if e.present == (part == "others")] for part in ("others", "history")}
    if one is None:
        return {"table": None, **others}
    targets, names = chosen(run, one), accuracies(one.threats)
    weights = "averaged weights" if targets[0].weights == "ema" else "raw weights"
    chart = interval_chart(
        f"Accuracy with 95 % intervals, n = {targets[0].n}", [(t.target, interval_row(t, names)) for t in targets],
        [f"{name} ({one.attack})" if name in one.threats else name for name in names],
        description=f"Clean and robust accuracy of {', '.join(t.target for t in targets)}")
    return {
        "table": accuracy_table(f"{one.images}, step {one.step}, {weights}, {one.attacks}", one, targets),
        "figures": [Figure("accuracy", chart)], "headline": _headline(one, targets),
        "unsound": [f"{t.target}: {', '.join(t.failed)}" for t in targets if t.failed],
        "autoattack": one.by_autoattack, "alone": list(_alone(one, targets)), **others}


def _alone(one: Evaluation, targets: Sequence[TargetResult]) -> Iterator[Table]:
    """Accuracy under each attack alone, where there was more than one."""
    for threat in one.threats:
        names = list(dict.fromkeys(name for t in targets for name in t.attacks.get(threat, {})))
        if len(names) > 1:
            alone = [(t.target, t.attacks.get(threat, {})) for t in targets]
            yield Table(f"accuracy under each attack alone, {threat}, %", ["target", *names],
                        [[target, *(percent(shares.get(name), 2) for name in names)] for target, shares in alone])


def _headline(one: Evaluation, targets: Sequence[TargetResult]) -> Iterator[tuple[str, str, str]]:
    """The numbers that a reader looks for first: label, per cent, small print."""
    n = targets[0].n
    for label, these in (("ensemble", [t for t in targets if t.target == ENSEMBLE]),
                         ("mean of the peers", [t for t in targets if is_peer(t.target)])):
        for key in (*reversed(accuracies(one.threats)),) if these else ():
            name = "clean" if key == CLEAN else f"{one.attack}, {key}" + (
                f" of {', '.join(one.threats)}" if key == UNION else "")
            shares = [t.accuracy[key] for t in these]
            share = sum(shares) / len(shares)
            extra = (f"95 %: {with_interval(share, n).small}" if label == "ensemble" else
                     f"{percent(min(shares))} – {percent(max(shares))} over {len(these)} peers")
            yield f"{label}, {name}", f"{percent(share, 2)} %", f"{extra}, n = {n}"


def class_shares(found: Answers, classes: int) -> list[tuple[int, float | None, float | None]]:
    """(n, clean, robust) per class; None for a class without images."""
    counts = [[0, 0, 0] for _ in range(classes)]
    for image, label in found.labels.items():
        counts[label][0] += 1
        counts[label][1] += found.correct[CLEAN][image]
        counts[label][2] += found.correct[UNION][image]
    return [(n, c / n if n else None, r / n if n else None) for n, c, r in counts]


def _classes(run: RunFiles, victims: Victims | None, measured: Measured | None) -> dict[str, Any] | None:
    """From the evaluation's table of images, else from the images that the report attacked."""
    weights = "ema" if run.averaged else "raw"
    one = next((e for e in run.evaluations if e.answers and e.present), None)
    found: Mapping[str, Answers] = {}
    threats: Sequence[str] = run.threats
    if one is not None:
        threats = one.threats
        found = {target: images for (target, kind), images in one.answers.items() if kind == weights}
        count = len(next(iter(found.values())).labels) if found else 0
        source = f"{one.attacks}, step {one.step}, all {count} images of {one.file}"
    if not found and measured is not None:
        threats, found, source = run.threats, measured.answers, f"{measured.n} test images, attacked for this report"
    robust = "union" if len(threats) > 1 else "robust"
    return class_section(found, victims.classes if victims else (), source, robust) if found else None


def class_section(answers: Mapping[str, Answers], names: Sequence[str], source: str, robust: str) -> dict[str, Any]:
    """Clean and robust accuracy of every class; `source` tells which images these are, `robust` what to call the
    latter."""
    count = max([len(names), *(label + 1 for one in answers.values() for label in one.labels.values())])
    labels = [*names, *(f"class {k}" for k in range(len(names), count))]
    shares = {target: class_shares(found, count) for target, found in answers.items()}
    targets = list(shares)

    def mean(k: int, part: int) -> float | None:
        known = [value for t in targets if is_peer(t) and (value := shares[t][k][part]) is not None]
        return sum(known) / len(known) if known else None

    order = [k for k in range(count) if shares[targets[0]][k][0]]
    worst = sorted(order, key=lambda k: (mean(k, 2) or 0.0, k))
    drawn = sorted(worst[:MOST_CLASSES])
    shown = targets[-MOST_TARGETS:]
    chart = heat_map(f"{robust.capitalize()} accuracy by class, %", [labels[k] for k in drawn], [*shown, "clean"],
                     [[*(shares[t][k][2] for t in shown), mean(k, 1)] for k in drawn],
                     label="target; last column: clean, mean of the peers", gap=len(shown),
                     description="One row per class, one column per target, last column clean accuracy")
    ensemble = shares.get(ENSEMBLE)
    rows = [[labels[k], shares[targets[0]][k][0], *(percent(value) for value in (
        mean(k, 1), mean(k, 2), *(ensemble[k][1:] if ensemble else ())))] for k in order]
    head = ["class", "n", "clean %", f"{robust} %", *(("ensemble clean %", f"ensemble {robust} %") if ensemble else ())]
    return {"source": source, "least": ", ".join(f"{labels[k]} ({percent(mean(k, 2))}\u00a0%)" for k in worst[:3]),
            "figures": [Figure("classes", chart)], "folded": len(order) > MOST_CLASSES,
            "table": Table(f"clean and {robust}: mean of the peers", head, rows)}


# ------------------------------------------------------------------ what the report attacked


def _gallery_section(victims: Victims, measured: Measured) -> dict[str, Any]:
    """Clean image, perturbation, AE and what every target says, for some test images."""
    from mat_dist.evaluation.attacks import scaled
    from mat_dist.report.measure import png

    def name(index: int) -> str:
        return victims.classes[index] if index < len(victims.classes) else f"class {index}"

    def answer(index: int, probability: float, label: int) -> tuple[str, float, bool]:
        return name(index), probability, index != label

    cards = []
    for one in measured.examples:
        answers = one.answers  # of the first peers, and of the ensemble, which comes last
        if len(answers) > MOST_ANSWERS:
            answers = (*answers[:MOST_ANSWERS - 1], answers[-1])
        cards.append({
            "sample": one.sample, "label": name(one.label),
            "images": {"clean": png(one.clean), "perturbation": png(scaled(one.adversarial - one.clean)),
                       "adversarial": png(one.adversarial)},
            "rows": [(target, [answer(clean, sure, one.label), answer(attacked, surely, one.label)])
                     for target, clean, sure, attacked, surely in answers]})
    return {"source": victims.source, "threat": victims.source_threat.label, "steps": victims.plan().steps,
            "cards": cards}


def _suffix(threat: Threat) -> str:
    """The threat as part of a file name."""
    return f"{threat.norm}_{eps_text(threat.eps).replace('/', '_')}"


def _strength_section(victims: Victims, measured: Measured) -> dict[str, Any]:
    """Robust accuracy against the radius and against the number of steps."""
    n, steps, figures, tables = measured.n, victims.plan().steps, list[Figure](), list[Table]()
    for threat in victims.threats:
        by_eps, by_steps = measured.by_eps[threat.label], measured.by_steps[threat.label]
        figures.append(Figure(f"eps_{_suffix(threat)}", line_chart(
            f"Robust accuracy against the radius, {threat.norm}", _series(by_eps, n), Axis(f"eps ({threat.norm})"),
            Axis("%", limits=(0, 1), percent=True), guide=(threat.eps, eps_text(threat.eps))),
            f"PGD-{steps}; it must fall, to near 0 for a large radius."))
        figures.append(Figure(f"steps_{_suffix(threat)}", line_chart(
            f"Robust accuracy against attack steps, {threat.label}", _series(by_steps, n),
            Axis("PGD steps", log=True, marks=[x for x, _ in by_steps[ENSEMBLE]]), Axis("%", percent=True),
            guide=(steps, "as evaluated")),
            "Steps of 2.5 eps / steps; it should level off: more steps must not help much."))
        for points, what in ((by_eps, "eps"), (by_steps, "steps")):
            rows = [[f"{x:.4g}", *(percent(line[k][1]) for line in points.values())]
                    for k, (x, _) in enumerate(points[ENSEMBLE])]
            tables.append(Table(f"robust accuracy in %, n = {n}", [f"{what}, {threat.norm}", *points], rows))
    return {"n": n, "half": 100 * (wilson_interval(0.5, n)[1] - 0.5), "figures": figures, "tables": tables}


def _series(found: Mapping[str, Points], n: int) -> list[Series]:
    return [Series(name, points, index) if name != ENSEMBLE else
            Series(name, points, -1, [(x, *wilson_interval(share, n)) for x, share in points])
            for index, (name, points) in enumerate(found.items())]


def _transfer_section(run: RunFiles, victims: Victims | None, measured: Measured | None) -> dict[str, Any] | None:
    """Who falls for whose AEs: on test images, and as the training noted it."""
    figures = []
    if victims is not None and measured is not None and len(victims.peers) <= MOST_PEERS:
        figures = [Figure(f"transfer_{_suffix(threat)}", transfer_chart(
            f"Transfer on test images, %, {threat.label}", list(victims.peers), list(victims.targets),
            measured.transfer[threat.label]), f"PGD-{victims.plan().steps}, n = {measured.n}, evaluation mode. "
                                              "The diagonal is each peer's own AEs.") for threat in victims.threats]
    figures += last_transfer(run)
    return {"figures": figures} if figures else None


def _surface_section(victims: Victims, measured: Measured) -> dict[str, Any]:
    """The loss around clean images: a smooth bowl, or the cliffs of masked gradients."""
    from mat_dist.report.measure import SURFACE_IMAGES

    n, places = min(SURFACE_IMAGES, measured.n), measured.places
    figures = [Figure("loss_surface", surface(
        f"Loss of {victims.source} around {n} test images", places, measured.surface,
        labels=("along the AE's perturbation, in eps", "along a random direction, in eps", "cross-entropy"),
        description="Mean cross-entropy over two directions, clean images in the middle, their AEs at the middle of "
                    "the right edge"), "Clean images in the middle, their AEs at 1 on the horizontal axis.")]
    values = [value for lines in measured.slices.values() for line in lines.values() for value in line]
    scale = Axis("cross-entropy", limits=(min(0.0, *values), max(values) * 1.05 or 1.0))
    for key, title in (("adversarial", "Loss towards the AE"), ("random", "Loss along a random direction")):
        series = [Series(name, list(zip(places, line, strict=True)), index)
                  for index, (name, line) in enumerate(measured.slices[key].items())]
        figures.append(Figure(f"loss_{key}", line_chart(
            title, series, Axis("distance from the clean image, in eps"), scale),
            "Each peer with its own AEs; both charts have one scale."))
    return {"n": n, "figures": figures}
