"""From finished runs to numbers: evaluations by `python -m mat_dist.evaluate`, the JSON document of a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from benchmarks.study import reasons
from benchmarks.study.cost import EQUAL_COST, image_passes, is_mutual
from benchmarks.study.plan import KINDS, Evaluation, Kind, Label, Row, TablePlan
from benchmarks.study.runs import Job, Runner, Trained, failure, training_seconds
from benchmarks.study.statistics import accuracy_interval, paired_difference
from benchmarks.study.why import why_document
from mat_dist import checkpoints
from mat_dist.checkpoints.load import candidates
from mat_dist.config import load_config
from mat_dist.errors import NotReportable
from mat_dist.evaluation.command import asked
from mat_dist.evaluation.results import CLEAN, UNION, Result, read_results
from mat_dist.evaluation.settings import parse
from mat_dist.evaluation.targets import make_job, target_names

Accuracies = Mapping[str, Mapping[int, float]]  # column -> image -> share of the targets that are right
Cell = tuple[Label, Kind, str]  # checkpoint, who, column
Cells = Mapping[Cell, Mapping[int, Mapping[int, float]]]  # -> seed -> image -> accuracy

CHANCE = 0.05  # of a 95 % interval without 0 where there is no difference
WORDS = {"above": "beats", "below": "loses", "noise": "noise"}

# ------------------------------------------------------------------------------------------------ evaluations


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of a run: which one, of which checkpoint, and its result."""

    name: str
    evaluation: Evaluation
    label: Label
    result: Result

    @property
    def unsound(self) -> list[str]:
        """Checks that failed, by target; empty where there were none."""
        return [f"{one.target}: {check.check}" for one in self.result.targets for check in one.checks or ()
                if not check.passed]

    @cached_property
    def kinds(self) -> Mapping[Kind, Accuracies]:
        """Mean peer, best peer by validation and ensemble -> accuracies image by image."""
        flags, peers = self._flags, self._peers
        chosen = self.result.document["chosen_on_validation"]
        members: dict[Kind, list[str]] = {"mean": peers, "best": [chosen] if chosen in peers else [],
                                          "ensemble": [name for name in flags if name not in peers]}
        return {kind: self._columns([flags[name] for name in names]) for kind, names in members.items() if names}

    def by_peer(self, column: str) -> dict[str, float] | None:
        """Accuracy of each peer that was attacked, None where the evaluation has no such column."""
        found = {name: self._columns([self._flags[name]]) for name in self._peers}
        return {name: statistics.fmean(columns[column].values()) for name, columns in found.items()
                if column in columns} or None

    @property
    def _flags(self) -> dict[str, Mapping[str, Mapping[int, bool]]]:
        return {target: one.correct for (target, _), one in self.result.images.items()}

    @property
    def _peers(self) -> list[str]:
        return [name for name in self.result.document["names"] if not name.startswith("ensemble")]

    def _columns(self, targets: Sequence[Mapping[str, Mapping[int, bool]]]) -> Accuracies:
        threats = [name for name in targets[0] if name not in (CLEAN, UNION)]
        names = self.evaluation.columns(self.name)
        source = dict(zip(names, [UNION] if len(names) == 1 else [*threats, UNION], strict=True))
        return {column: {image: sum(one[name][image] for one in targets) / len(targets) for image in targets[0][name]}
                for column, name in ((CLEAN, CLEAN), *source.items())}


def labels(job: Job, evaluation: Evaluation) -> dict[Label, Label]:
    """Label of the table -> the one that is evaluated: `last` also stands for a best checkpoint that is the last."""
    best, newest = checkpoints.read_best(job.folder), checkpoints.load_manifest(job.folder)
    same = best is None or best.step == newest.step
    return {label: "last" if same else label for label in evaluation.checkpoints}


def evaluate(job: Job, name: str, evaluation: Evaluation, label: Label, runner: Runner) -> Evaluated:
    """The evaluation of a trained run, made where it is not there yet.

    Raises:
        Enough: see `Runner`.
        MatError: it failed; of the class of its exit code. Failed soundness checks are no error here.
    """
    found = find(job, name, evaluation, label)
    if found is None:
        runner.begin(f"{job.row}, seed {job.seed}: {name} of {label}")
        code = runner.run("mat_dist.evaluate", (str(job.folder.path), *words(job, evaluation, label)), job.log)
        if code not in (0, NotReportable.code):
            raise failure(code, job, f"evaluation {name} of {label}")
        found = find(job, name, evaluation, label)
    if found is None:
        raise NotReportable(f"evaluation {name} of {label} left no result", job.folder.name, f"see {job.log.name}")
    return found


def words(job: Job, evaluation: Evaluation, label: Label) -> tuple[str, ...]:
    """The words of the command after the run. Whoever may not be the best peer is not attacked: specialists beside a
    generalist, frozen peers."""
    peers = candidates(job.config.peers)
    targets = peers[:1] if evaluation.who == "first" else peers
    if evaluation.who == "all" and len(peers) > 1:
        targets = [*targets, "ensemble"]
    return (*evaluation.settings, f"checkpoint={label}", f"targets={','.join(targets)}", *job.places)


def find(job: Job, name: str, evaluation: Evaluation, label: Label) -> Evaluated | None:
    """The newest result that answers this evaluation."""
    arguments = parse((str(job.folder.path), *words(job, evaluation, label)))
    request = arguments.request
    config = load_config(str(job.folder.config), arguments.settings)
    wanted = {"checkpoint": label, "step": _step(job, label),
              **asked(request, config, make_job(request, config), target_names(request, config)),
              **({} if request.images is None else {"n": request.images})}
    fitting = [one for one in read_results(job.folder.eval, f"evaluate_{request.split}_{label}_*")
               if all(one.document.get(key) == value for key, value in wanted.items())]
    return Evaluated(name, evaluation, label, fitting[-1]) if fitting else None


def _step(job: Job, label: Label) -> int:
    best = checkpoints.read_best(job.folder)
    return best.step if label == "best" and best is not None else checkpoints.load_manifest(job.folder).step


def gathered(found: Mapping[tuple[str, Label], Evaluated]) -> Iterator[tuple[Label, Kind, str, Mapping[int, float]]]:
    """Every column of a run's evaluations; without an attack counts what was measured on most images.

    Args:
        found: (name of the evaluation, label of the table) -> result.
    """
    clean: dict[tuple[Label, Kind], Mapping[int, float]] = {}
    for (_, label), one in found.items():
        for kind, columns in one.kinds.items():
            for column, values in columns.items():
                if column != CLEAN:
                    yield label, kind, column, values
                elif len(values) > len(clean.get((label, kind), ())):
                    clean[label, kind] = values
    for (label, kind), values in clean.items():
        yield label, kind, CLEAN, values


# ------------------------------------------------------------------------------------------------ rows


@dataclass(eq=False)
class Entry(Trained):
    """A row of a table and what has become of it.

    Attributes:
        results: seed -> (name of the evaluation, checkpoint of the table) -> result.
        reasons: images of `benchmarks.study reasons`, which every cohort is asked for; 0: none.
        starts_from: rows whose finished runs it names.
    """

    table: str = field(kw_only=True)
    row: Row = field(kw_only=True)
    results: dict[int, dict[tuple[str, Label], Evaluated]] = field(default_factory=dict)
    reasons: int = 0
    starts_from: list[Entry] = field(default_factory=list)

    def sources(self) -> list[Entry]:
        """All rows that must be trained before this one, each once; itself too, where a plan goes round in a circle."""
        found: list[Entry] = []
        ahead = list(self.starts_from)
        while ahead:
            one = ahead.pop(0)
            if one not in found:
                found.append(one)
                ahead += one.starts_from
        return found

    @property
    def cost(self) -> float | None:
        """Passes of an image in its training and in that of its `sources`, times their cost factors; None where that
        is not known yet."""
        total = 0.0
        for one in (self, *self.sources()):
            passes = one.passes
            if one.first is None or passes is None:
                return None
            total += image_passes(one.first.config, passes) * one.row.cost_factor
        return total

    def missing(self, plan: TablePlan, seed: int) -> list[str]:
        """What is still to be done for a seed, in words."""
        if not self.jobs[seed].done:
            return ["training"]
        found = self.results.get(seed, {})
        left = [f"{name} of {label}" for name, one in plan.evaluations.items() if one.applies(self.name, seed)
                for label in one.checkpoints if (name, label) not in found]
        return [*left, *(["reasons"] if self.reasons and self.why(seed) is None else [])]

    def why(self, seed: int) -> dict[str, Any] | None:
        """What `benchmarks.study reasons` found of a finished run, None where it was not asked."""
        job = self.jobs[seed]
        return reasons.find(job.folder, job.config, self.reasons)

    def reasons_document(self) -> dict[str, Any]:
        """Curves and reasons of all finished runs."""
        done = {seed: job for seed, job in self.jobs.items() if job.done}
        found = {seed: one for seed in done if self.reasons and (one := self.why(seed)) is not None}
        return why_document(list(done.values()), found)

    def cells(self) -> dict[Cell, dict[int, Mapping[int, float]]]:
        """Every column -> seed -> image -> accuracy."""
        cells: dict[Cell, dict[int, Mapping[int, float]]] = {}
        for seed, found in self.results.items():
            for label, kind, column, values in gathered(found):
                if kind in self.row.kinds:
                    cells.setdefault((label, kind, column), {})[seed] = values
        return cells

    def by_peer(self, label: Label, column: str) -> dict[str, dict[str, float]]:
        """Seed -> peer -> accuracy of a checkpoint in a column under attack."""
        return {str(seed): values for seed, found in sorted(self.results.items())
                for (_, checkpoint), one in found.items() if checkpoint == label
                for values in [one.by_peer(column)] if values is not None}


def table_document(plan: TablePlan, entries: Sequence[Entry]) -> dict[str, Any]:
    """The whole table as JSON values."""
    cells = {entry.name: entry.cells() for entry in entries}
    rows = [row_document(plan, entry, cells[entry.name]) for entry in entries]
    order = list(dict.fromkeys([*plan.controls, *(one.row.control for one in entries if one.row.control)]))
    apart = sorted((found for control in order for entry in entries
                    if entry.name != control and control in (*plan.controls, entry.row.control)
                    for found in differences(entry, control, cells)), key=_last_and_primary_first(order, plan.primary))
    return {"title": plan.title, "columns": [CLEAN, *plan.columns], "primary": plan.primary,
            "figure": plan.figure,
            "controls": list(plan.controls), "settings": list(plan.settings),
            "evaluations": {name: {"settings": list(one.settings), "checkpoints": list(one.checkpoints),
                                   "who": one.who, "rows": list(one.rows) if one.rows is not None else None,
                                   "seeds": list(one.seeds) if one.seeds is not None else None}
                            for name, one in plan.evaluations.items()},
            "rows": rows, "differences": apart, "comparisons": comparisons(rows, apart, plan.primary)}


def _last_and_primary_first(order: Sequence[str], primary: str) -> Callable[[dict[str, Any]], tuple[int, bool, bool]]:
    return lambda one: (order.index(one["control"]), one["checkpoint"] != "last", one["column"] != primary)


def row_document(plan: TablePlan, entry: Entry, cells: Cells) -> dict[str, Any]:
    """One row: what it is, what it cost, what it scored, what is missing."""
    row, first, passes = entry.row, entry.first, entry.passes
    seconds = {seed: found for seed, job in entry.jobs.items() if job.done
               for found in [training_seconds(job.folder)] if found is not None}
    accuracy: dict[str, Any] = {}
    for (label, kind, column), by_seed in cells.items():
        accuracy.setdefault(label, {}).setdefault(kind, {})[column] = {
            **summary(by_seed), "interval": list(accuracy_interval(list(by_seed.values())))}
        if kind == "mean" and column != CLEAN:
            accuracy[label][kind][column]["by_peer"] = entry.by_peer(label, column)
    steps, forward, backward = passes or (None, None, None)
    return {"row": entry.name, "says": row.says, "peers": row.peers,
            "mutual": first is not None and is_mutual(first.config),
            "averages": first is not None and any(peer.averages for peer in first.config.peers),
            "tried": row.tried, "remark": row.remark,
            "cost_factor": row.cost_factor, "kinds": list(row.kinds), "error": entry.error,
            "settings": list(row.settings), "command": first.command if first else "",
            "config_digest": first.digest if first else "",
            "steps": steps, "forward": forward, "backward": backward,
            "cost": entry.cost, "starts_from": [one.name for one in entry.sources()], "control": row.control,
            "train_seconds": statistics.fmean(seconds.values()) if seconds else None,
            "seeds": {str(seed): {**_state(plan, entry, seed), "train_seconds": seconds.get(seed)}
                      for seed in entry.jobs},
            "accuracy": accuracy, "why": entry.reasons_document()}


def _state(plan: TablePlan, entry: Entry, seed: int) -> dict[str, Any]:
    missing = entry.missing(plan, seed)
    unsound = sorted({f"{name} of {label}, {text}" for (name, label), one in entry.results.get(seed, {}).items()
                      for text in one.unsound})
    return {"status": entry.failures.get(seed) or (f"missing: {', '.join(missing)}" if missing else "done"),
            "failed_checks": unsound}


def summary(by_seed: Mapping[int, Mapping[int, float]]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for one seed) over seeds of the mean over images."""
    means = {str(seed): statistics.fmean(values.values()) for seed, values in sorted(by_seed.items())}
    return {"mean": statistics.fmean(means.values()),
            "deviation": statistics.stdev(means.values()) if len(means) > 1 else None, "by_seed": means,
            "images": min(map(len, by_seed.values()))}


def differences(entry: Entry, control: str, cells: Mapping[str, Cells]) -> list[dict[str, Any]]:
    """A row against a control, for all that both have: the same seeds, and of each the images of both, since what is
    counted without an attack may have more of them in a row with a larger evaluation.

    A control of one peer is its own ensemble and its own best peer.
    """
    found = []
    other = cells.get(control, {})
    for (label, kind, column), mine in cells[entry.name].items():
        theirs = other.get((label, kind, column)) or other.get((label, "mean", column), {})
        if (label, kind, column) not in other and any(k != "mean" for _, k, _ in other):
            continue  # a cohort whose best peer or ensemble is not reported
        pairs = [(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]
        shared = [{image: a[image] - b[image] for image in a if image in b} for a, b in pairs]
        if any(shared):
            one = paired_difference([values for values in shared if values])
            found.append({"row": entry.name, "control": control, "checkpoint": label, "kind": kind, "column": column,
                          "mean": one.mean, "low": one.low, "high": one.high, "by_seed": list(one.by_seed),
                          "images": one.images, "verdict": one.verdict})
    return found


# ------------------------------------------------------------------------------------------------ verdicts


def comparisons(rows: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]], primary: str
                ) -> dict[str, Any]:
    """Every row against its own control, and every mutual row against all others that cost as much as it or less, by
    the primary column of the last checkpoint.

    Args:
        rows, differences: of the table's JSON document.

    Returns:
        `made`: the comparisons, with `verdict` beats, loses or noise, `cost_ratio`, the row's cost by the control's,
        and `equal`, whether it is the row's own control; `waiting`: (row, its own control) that were
        not compared yet; `left_out`: (row, control) whose control costs more, or whose cost is not known; `several`:
        how many of those made have more than one seed; `by_chance`: how many of all would not be called noise were
        there no difference and every interval right.
    """
    known = {row["row"]: row for row in rows}
    own = {row["row"]: row["control"] for row in rows if row.get("control")}
    made: list[dict[str, Any]] = []
    left_out: dict[tuple[str, str], None] = {}
    for one in differences:
        row, control = known[one["row"]], known[one["control"]]
        equal = own.get(row["row"]) == control["row"]
        if not (equal or row["mutual"]) or one["checkpoint"] != "last" or one["column"] != primary:
            continue
        ratio = row["cost"] / control["cost"] if row["cost"] and control["cost"] else None
        if not equal and (ratio is None or ratio * EQUAL_COST < 1):
            left_out[row["row"], control["row"]] = None
            continue
        word = WORDS[one["verdict"].partition(" ")[0]]
        made.append({"row": row["row"], "control": control["row"], "equal": equal, "kind": one["kind"],
                     "verdict": word, "mean": one["mean"], "low": one["low"], "high": one["high"],
                     "seeds": len(one["by_seed"]), "images": one["images"], "cost_ratio": ratio,
                     "tried": [row["tried"], control["tried"]]})
    order = list(known)
    made.sort(key=lambda one: (order.index(one["row"]), not one["equal"], order.index(one["control"]),
                               list(KINDS).index(one["kind"])))
    compared = {(one["row"], one["control"]) for one in made}
    return {"column": primary, "made": made, "waiting": [list(pair) for pair in own.items() if pair not in compared],
            "left_out": [list(pair) for pair in left_out], "several": sum(one["seeds"] > 1 for one in made),
            "by_chance": CHANCE * len(made)}
