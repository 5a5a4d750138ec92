"""What metrics.jsonl tells: curves of the training, the transfer in its last log step, and where its time went."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from mat_dist.evaluation.results import CLEAN, ENSEMBLE, UNION, accuracies
from mat_dist.report.charts import Axis, Chart, Figure, Series, heat_map, line_chart, stacked_bars
from mat_dist.report.files import RunFiles

MOST_RANKS = 32  # bars of the chart of phases
MOST_POINTS = 500  # of a curve; it is 340 pixels wide
MOST_PEERS = 64  # of a transfer chart: 4160 cells
_WORK = ("data", "attack", "forward", "backward", "optimizer", "exchange", "wait")
EPOCH, PER_CENT = Axis("epoch"), Axis("%", percent=True)


def number(value: Any) -> float | None:
    """A number of a record; anything else is unknown."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return float(value) if known else None


def entry(value: Any, index: int) -> Any:
    """Entry of a list in a record, None where there is none."""
    return value[index] if isinstance(value, list) and index < len(value) else None


def member(value: Any, key: str) -> float | None:
    """A number of a mapping in a record."""
    return number(value.get(key)) if isinstance(value, dict) else None


def thinned(points: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """At most `MOST_POINTS` points: means of as many neighbours as that takes, without those that are not known."""
    group = -(-len(points) // MOST_POINTS)
    if group < 2:
        return points
    found: list[tuple[float, float | None]] = []
    for first in range(0, len(points), group):
        part = points[first:first + group]
        known = [y for _, y in part if y is not None]
        found.append((sum(x for x, _ in part) / len(part), sum(known) / len(known) if known else None))
    return found


def _curves(run: RunFiles, records: Sequence[dict[str, Any]], key: str) -> list[Series]:
    """Of each peer the values of `key` over epochs, where it has any."""
    found = [Series(name, thinned([(float(r.get("epoch", 0)), number(entry(r.get(key), index))) for r in records]),
                    index) for index, name in enumerate(run.peers)]
    return [one for one in found if one.known()]


def validations(run: RunFiles) -> list[dict[str, Any]]:
    """What was measured on the validation split: the peers' accuracies clean, under each threat and under their union,
    with averaged weights where they are kept, and the same of the ensemble under ENSEMBLE."""
    prefix = "ema_" if run.averaged and any(r.get("ema_clean_acc") for r in run.epochs) else ""

    def shares(told: Any, prefix: str) -> dict[str, Any]:
        told = told if isinstance(told, dict) else {}
        union, under = told.get(f"{prefix}robust_acc"), told.get(f"{prefix}threat_acc")
        # Records of version 0.1 have the union alone.
        under = under if isinstance(under, dict) else dict.fromkeys(run.threats, union) if len(run.threats) == 1 else {}
        return {CLEAN: told.get(f"{prefix}clean_acc"), UNION: union, **{name: under.get(name) for name in run.threats}}

    return [{"epoch": r.get("epoch", 0), **shares(r, prefix), ENSEMBLE: shares(r.get(prefix + ENSEMBLE), "")}
            for r in run.epochs if isinstance(r.get(f"{prefix}clean_acc"), list)]


def training_figures(run: RunFiles) -> list[Figure]:
    """Loss, accuracy on the validation split and learning rate per peer over epochs."""
    evaluated = validations(run)
    group = -(-len(run.steps) // MOST_POINTS)
    grouped = f", means of {group} log steps" if group > 1 else " at log steps"
    found = []
    if loss := _curves(run, run.steps, "loss"):
        found.append(Figure("loss", line_chart("Training loss", loss, EPOCH, Axis("loss", zero=True)),
                            f"The mutual loss{grouped}; peers with other losses differ in scale."))
    for count, key in enumerate(accuracies(run.threats)):
        if series := _curves(run, evaluated, key):
            ensemble = [(float(r["epoch"]), member(r[ENSEMBLE], key)) for r in evaluated]
            attacks = dict.fromkeys(r.get("attack", f"PGD-{run.config.eval.steps}") for r in evaluated)
            attack = "" if key == CLEAN else f", {', then '.join(attacks)}"
            chart = line_chart(f"Validation: {key}{attack}", [*series, Series(ENSEMBLE, ensemble, -1)], EPOCH, PER_CENT)
            found.append(Figure(f"validation_{count}" if key not in (CLEAN, UNION) else f"validation_{key}", chart,
                                f"From checkpoints, {'averaged' if run.averaged else 'raw'} weights."))
    if own := _curves(run, run.steps, "train_ae_acc"):
        found.append(Figure("train_ae", line_chart("Accuracy on own AEs in training", own, EPOCH, PER_CENT),
                            f"Batches of the training{grouped}, batch norm in train mode: a diagnostic."))
    if rate := _curves(run, run.steps, "lr"):
        same = all(one.points == rate[0].points for one in rate)
        shown = [Series("all peers", rate[0].points, -1)] if same else rate
        found.append(Figure("learning_rate", line_chart("Learning rate", shown, EPOCH, Axis("rate", zero=True)),
                            "The same for all peers." if same else ""))
    return found


def transfer_chart(title: str, peers: Sequence[str], rows: Sequence[str], values: Sequence[Sequence[float | None]]
                   ) -> Chart:
    """Accuracy of each row on the AEs of each peer, last column clean."""
    return heat_map(title, rows, [*peers, "clean"], values, label="AEs crafted against", gap=len(peers),
                    description="One row per target, one column per source of the AEs, last column clean images")


def last_transfer(run: RunFiles) -> list[Figure]:
    """The transfer table of the last log step that has a whole one; empty where none has."""
    count = len(run.peers)
    for record in reversed(run.steps if count <= MOST_PEERS else ()):
        rows = record.get("transfer")
        if isinstance(rows, list) and len(rows) == count and all(
                isinstance(row, list) and len(row) == count + 1 for row in rows):
            values = [[number(value) for value in row] for row in rows]
            chart = transfer_chart("Transfer in the last log step, %", run.peers, run.peers, values)
            return [Figure("transfer_training", chart, f"Epoch {float(record.get('epoch', 0)):.4g}, a batch of the "
                                                       "training, train mode: a diagnostic.")]
    return []


def phase_means(records: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Mean seconds per step of each phase, by rank, over the log records of the newest number of ranks."""
    tables = [r["phases_s"] for r in records if isinstance(r.get("phases_s"), list) and r["phases_s"]
              and all(isinstance(one, dict) for one in r["phases_s"])]
    if not tables:
        return []
    tables = [one for one in tables if len(one) == len(tables[-1])]
    means: list[dict[str, float]] = []
    for rank in range(len(tables[-1])):
        names = dict.fromkeys(name for one in tables for name in one[rank])
        means.append({name: sum(number(one[rank].get(name)) or 0.0 for one in tables) / len(tables) for name in names})
    return means


def time_section(run: RunFiles) -> dict[str, Any] | None:
    """Seconds per step by phase and rank; wait and exchange over the training. None where nothing was timed."""
    means = phase_means(run.steps)
    if not means:
        return None
    found = dict.fromkeys(name for rank in means for name in rank)
    phases = [name for name in _WORK if name in found] + [name for name in found if name not in _WORK]
    shown = [name for name in phases if any(rank.get(name, 0) >= 1e-3 * sum(rank.values()) for rank in means)]
    left_out = ", ".join(name for name in phases if name not in shown)
    bars = stacked_bars("Time of a step by phase", [
        (f"rank {r}", [1e3 * rank.get(name, 0.0) for name in shown]) for r, rank in enumerate(means[:MOST_RANKS])],
        shown, label="milliseconds, mean over the log steps", description="One bar per rank, one part per phase")
    figures = [Figure("phases", bars, f"Below 0.1 % and not drawn: {left_out}." if left_out else "")]
    for phase, title in (("wait", "Waiting for other ranks"), ("exchange", "Exchange between ranks")):
        series = [Series(f"rank {r}", thinned([
            (float(one.get("epoch", 0)), 1e3 * value) for one in run.steps
            if (value := member(entry(one.get("phases_s"), r), phase)) is not None]), r)
            for r in range(min(len(means), MOST_RANKS))]
        if series := [one for one in series if one.known()]:
            figures.append(Figure(phase, line_chart(title, series, EPOCH, Axis("ms per step", zero=True))))
    speeds = [value for r in run.steps if (value := number(r.get("images_per_s"))) is not None]
    return {"ranks": len(means), "speed": sum(speeds) / len(speeds) if speeds else None, "figures": figures}
