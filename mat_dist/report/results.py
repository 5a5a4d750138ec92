"""Sections made from the result files: the headline, all evaluations, classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mat_dist.evaluation.statistics import wilson_interval
from mat_dist.report.book import Book, pair
from mat_dist.report.charts import heat_map, interval_chart
from mat_dist.report.evaluations import ENSEMBLE, Evaluation, Outcome, Target, is_peer
from mat_dist.report.files import RunFiles
from mat_dist.report.html import Child, Markup, folded, join, section, table, tag

MOST_CLASSES = 20  # rows of the chart of classes; with more classes the worst ones are shown
MOST_TARGETS = 33  # columns of the chart of classes: the last peers and the ensemble


def percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f}"


def with_interval(share: float, n: int) -> Markup:
    """Per cent with its 95 % Wilson interval."""
    low, high = wilson_interval(share, n)
    return join(percent(share), tag("small", f"{percent(low, 1)} – {percent(high, 1)}"))


def columns(one: Evaluation) -> list[tuple[str, str]]:
    """(key, heading) of the accuracies shown: clean, each threat, and their union where there are several."""
    shown = [("clean", "clean %"), *((threat, f"{one.attack}, {threat} %") for threat in one.threats)]
    return shown if len(one.threats) == 1 else [*shown, ("union", "all threats %")]


def chosen(run: RunFiles, one: Evaluation) -> list[Target]:
    """The rows that count: averaged weights where they are kept."""
    averaged = [target for target in one.targets if target.weights == "ema"]
    return averaged if run.averaged and averaged else list(one.targets)


def accuracy_table(caption: Child, one: Evaluation, targets: Sequence[Target]) -> Markup:
    """Accuracies with n and interval; the lead cell is the target, with its weights where several are shown."""
    several = len({target.weights for target in targets}) > 1
    rows: list[list[Child]] = [
        [join(t.name, tag("small", t.weights) if several else None, _mark(t)),
         *(with_interval(t.accuracy[key], t.n) for key, _ in columns(one)), t.n] for t in targets]
    return table(caption, ["target", *(heading for _, heading in columns(one)), "n"], rows)


def result_section(run: RunFiles, book: Book) -> Markup:
    """The headline: clean and robust accuracy of each target with n and interval, as table and chart."""
    one = run.headline
    if one is None:
        return section("result", "Result", tag("p", "This run has no evaluation yet."))
    targets = chosen(run, one)
    weights = "averaged weights" if targets[0].weights == "ema" else "raw weights"
    what = f"{one.images}, step {one.step}, {weights}, {one.attacks}"
    kinds = ["clean", f"robust ({one.attack})"]
    rows = [(t.name, [(t.accuracy[key], *wilson_interval(t.accuracy[key], t.n)) for key in ("clean", "union")])
            for t in targets]
    chart = interval_chart(f"Accuracy with 95 % intervals, n = {targets[0].n}", rows, kinds,
                           description=f"Clean and robust accuracy of {', '.join(t.name for t in targets)}")
    validations = [e for e in run.evaluations if e.file.startswith("validation")]
    others = [accuracy_table(f"{e.images}, step {e.step}, {e.attacks} ({e.file})", e, e.targets)
              for e in run.evaluations if e not in validations[1:]]
    told = ("Small print: 95\u00a0% Wilson intervals, with the images as the only source of chance; other seeds add "
            "more. Robust: right on the clean image and under every threat and attack. ")
    if "autoattack" not in one.attacks:
        told += ("PGD gives an upper bound, a stronger attack may find less: attack the checkpoint with AutoAttack "
                 "before you publish a number.")
    return section(
        "result", "Result", _unsound(targets), _figures(one, targets),
        pair(accuracy_table(what, one, targets), book.figure("accuracy", chart)), tag("p", told, class_="dim"),
        _alone(one, targets), folded("All tests and the newest validation, raw and averaged weights", others))


def _mark(target: Target) -> Markup | None:
    """Beside the name of a target whose numbers must not be reported."""
    return tag("small", "not reportable", class_="wrong") if target.failed else None


def _unsound(targets: Sequence[Target]) -> Markup | None:
    """Which targets failed which soundness checks, or had none."""
    lines = [f"{t.name}: {', '.join(t.failed)}" for t in targets if t.failed]
    told = tag("strong", "Do not report these numbers: soundness checks failed or were not made. ")
    return tag("div", told, "; ".join(lines), class_="notice", role="note") if lines else None


def _alone(one: Evaluation, targets: Sequence[Target]) -> list[Markup]:
    """Accuracy under each attack alone, where there was more than one."""
    tables = []
    for threat in one.threats:
        names = list(dict.fromkeys(name for t in targets for name in t.alone.get(threat, {})))
        rows: list[list[Child]] = [
            [t.name, *(percent(t.alone[threat][name]) if name in t.alone.get(threat, {}) else "-" for name in names)]
            for t in targets]
        if len(names) > 1:
            tables.append(table(f"accuracy under each attack alone, {threat}, %", ["target", *names], rows))
    return tables


def _figures(one: Evaluation, targets: Sequence[Target]) -> Markup:
    """The numbers that a reader looks for first."""
    peers = [t for t in targets if t.is_peer]
    facts: list[Child] = []
    ensemble = [t for t in targets if t.name == ENSEMBLE]
    for label, these in (("ensemble", ensemble), ("mean of the peers", peers)):
        if not these:
            continue
        for key, name in (("union", f"robust, {one.attack}"), ("clean", "clean")):
            shares = [t.accuracy[key] for t in these]
            share = sum(shares) / len(shares)
            if these is ensemble:
                low, high = wilson_interval(share, targets[0].n)
                extra = f"95 %: {percent(low, 1)} – {percent(high, 1)}"
            else:
                extra = f"{percent(min(shares), 1)} – {percent(max(shares), 1)} over {len(peers)} peers"
            facts.append(tag("div", tag("dt", f"{label}, {name}"), tag(
                "dd", f"{percent(share)} %", tag("small", f"{extra}, n = {targets[0].n}"), class_="big")))
    return tag("dl", *facts, class_="facts")


def class_shares(outcomes: Sequence[Outcome], classes: int) -> list[tuple[int, float | None, float | None]]:
    """(n, clean, robust) per class; None for a class without images."""
    counts = [[0, 0, 0] for _ in range(classes)]
    for one in outcomes:
        counts[one.label][0] += 1
        counts[one.label][1] += one.clean
        counts[one.label][2] += one.robust
    return [(n, c / n if n else None, r / n if n else None) for n, c, r in counts]


def class_section(outcomes: Mapping[str, Sequence[Outcome]], names: Sequence[str], source: str, book: Book) -> Markup:
    """Clean and robust accuracy of every class; `source` tells which images these are."""
    count = max([len(names), *(one.label + 1 for all_of in outcomes.values() for one in all_of)])
    labels = [*names, *(f"class {k}" for k in range(len(names), count))]
    shares = {target: class_shares(found, count) for target, found in outcomes.items()}
    targets = list(shares)

    def mean(k: int, part: int) -> float | None:
        known = [value for t in targets if is_peer(t) and (value := shares[t][k][part]) is not None]
        return sum(known) / len(known) if known else None

    def text(value: float | None) -> str:
        return "-" if value is None else percent(value, 1)

    order = [k for k in range(count) if shares[targets[0]][k][0]]
    worst = sorted(order, key=lambda k: (mean(k, 2) or 0.0, k))
    drawn = sorted(worst[:MOST_CLASSES]) if len(order) > MOST_CLASSES else order
    shown = targets[-MOST_TARGETS:]
    chart = heat_map("Robust accuracy by class, %", [labels[k] for k in drawn], [*shown, "clean"],
                     [[*(shares[t][k][2] for t in shown), mean(k, 1)] for k in drawn],
                     column_label="target; last column: clean, mean of the peers", gap=len(shown),
                     description="One row per class, one column per target, last column clean accuracy")
    ensemble = ENSEMBLE in shares
    rows: list[list[Child]] = [
        [labels[k], shares[targets[0]][k][0], text(mean(k, 1)), text(mean(k, 2)),
         *((text(shares[ENSEMBLE][k][1]), text(shares[ENSEMBLE][k][2])) if ensemble else ())] for k in order]
    head = ["class", "n", "clean %", "robust %", *(("ensemble clean %", "ensemble robust %") if ensemble else ())]
    full = table("clean and robust: mean of the peers", head, rows)
    least = ", ".join(f"{labels[k]} ({text(mean(k, 2))}\u00a0%)" for k in worst[:3])
    told = f"{source}. Least robust: {least}."
    return section("classes", "Classes", tag("p", told),
                   pair(book.figure("classes", chart), full if len(order) <= MOST_CLASSES else
                          folded(f"All {len(order)} classes", full)))
