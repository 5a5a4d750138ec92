"""Why a row stands where it stands: curves of its runs with charts, what their peers do with each other's AEs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.study import reasons
from benchmarks.study.runs import Job, Runner, failure
from mat_dist.checkpoints.load import candidates
from mat_dist.config.schema import Config
from mat_dist.errors import NotReportable
from mat_dist.report.charts import Axis, Chart, Series, line_chart
from mat_dist.report.files import read_records
from mat_dist.runs.folder import RunFolder

Curve = list[tuple[float, float]]  # (epoch, value)
LINES = {"robust": "robust, mean peer", "ensemble_robust": "robust, ensemble", "clean": "clean, mean peer",
         "ensemble_clean": "clean, ensemble", "own_aes": "own AEs, training", "peers_aes": "peers' AEs, training"}
CURVES = "{suite}_curves"  # folder


def explain(job: Job, images: int, runner: Runner) -> None:
    """Let `benchmarks.study reasons` measure a finished run, where it has not yet; 0 images: nothing.

    Raises:
        Enough: see `Runner`.
        MatError: it failed; of the class of its exit code.
    """
    if not images or reasons.find(job.folder, job.config, images) is not None:
        return
    runner.begin(f"{job.row}, seed {job.seed}: reasons")
    code = runner.run("benchmarks.study", ("reasons", str(job.folder.path), f"images={images}", *job.places), job.log)
    if code:
        raise failure(code, job, "reasons")
    if reasons.find(job.folder, job.config, images) is None:
        raise NotReportable("reasons left no result", job.folder.name, f"see {job.log.name}")


def why_document(done: Sequence[Job], found: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Curves of the finished runs of a row, and what was measured of each seed, as JSON values."""
    measured = [{key: value for key, value in one.items() if key != "files"} for _, one in sorted(found.items())]
    return {"curves": curves(done[0].config, [job.folder for job in done]) if done else {},
            "seeds": {str(seed): one for seed, one in zip(sorted(found), measured, strict=True)},
            "peers": spread([told(one) for one in measured])}


# ------------------------------------------------------------------------------------------------ curves


def curves(config: Config, folders: Sequence[RunFolder]) -> dict[str, Curve]:
    """Name -> means over the runs and over the peers that may be the best one, at the epochs that all runs have.

    On the validation split, with averaged weights where they are kept: `clean`, `robust`, `ensemble_clean` and
    `ensemble_robust`; in batches of the training: `own_aes` and `peers_aes`, accuracy on own AEs and on the others'.
    """
    students = [[str(peer.name) for peer in config.peers].index(name) for name in candidates(config.peers)]
    prefix = "ema_" if any(peer.averages for peer in config.peers) else ""
    runs = [_of_run(read_records(folder.metrics, []), students, prefix) for folder in folders]
    found: dict[str, Curve] = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        lines = [run.get(name, {}) for run in runs]
        shared = sorted(set(lines[0]).intersection(*lines[1:]))
        if shared:
            found[name] = [(epoch, statistics.fmean(line[epoch] for line in lines)) for epoch in shared]
    return found


def _of_run(records: Iterable[Mapping[str, Any]], students: Sequence[int],
            prefix: str) -> dict[str, dict[float, float]]:
    """Name of a curve -> epoch -> value."""
    found: dict[str, dict[float, float]] = {}
    for record in records:
        for name, value in _values(record, students, prefix):
            found.setdefault(name, {})[float(record["epoch"])] = value
    return found


def _values(record: Mapping[str, Any], students: Sequence[int], prefix: str) -> Iterable[tuple[str, float]]:
    if record["kind"] == "epoch" and record.get(f"{prefix}clean_acc"):
        for name in ("clean", "robust"):
            values = record[f"{prefix}{name}_acc"]
            yield name, statistics.fmean(values[s] for s in students)
            yield f"ensemble_{name}", record[f"{prefix}ensemble"][f"{name}_acc"]
    elif record["kind"] == "step" and record.get("transfer"):
        rows = [record["transfer"][s][:-1] for s in students]
        yield "own_aes", statistics.fmean(row[s] for s, row in zip(students, rows, strict=True))
        if len(rows[0]) > 1:
            yield "peers_aes", statistics.fmean(others(row, s) for s, row in zip(students, rows, strict=True))


def others(row: Sequence[float], student: int) -> float:
    """Mean of the entries but that of the student."""
    return statistics.fmean(value for source, value in enumerate(row) if source != student)


# ------------------------------------------------------------------------------------------------ peers


def told(document: Mapping[str, Any]) -> dict[str, float]:
    """What one run's file says, as means over its students; shares in [0, 1], KL in nats.

    `clean`, `own_aes`, `peers_aes`: accuracy; `training_aes`: that on own AEs of training images, `gap`: by how much it
    is higher; `confidence`, `teacher_confidence`, `agreement`, `teacher_right`, `teachable` (some teacher is right, the
    student wrong) and `kl`: on the student's AEs, see `reasons.opinions`; `teachable_peers_aes`: on the others'.
    """
    table, peers = document["validation"], len(document["peers"])

    def own(name: str) -> float:
        return statistics.fmean(table[name][s][s] for s in document["students"])

    def theirs(name: str) -> float:
        return statistics.fmean(others(table[name][s][:peers], s) for s in document["students"])

    training = statistics.fmean(document["training"]["right"][s][0] for s in document["students"])
    return {"clean": statistics.fmean(table["right"][s][peers] for s in document["students"]),
            "own_aes": own("right"), "peers_aes": theirs("right"), "training_aes": training,
            "gap": training - own("right"), "confidence": own("confidence"),
            "teacher_confidence": own("teacher_confidence"), "agreement": own("agreement"),
            "teacher_right": own("teacher_right"), "teachable": own("some_teacher_right"),
            "teachable_peers_aes": theirs("some_teacher_right"), "kl": own("kl")}


def spread(seeds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean and sample standard deviation (None for one seed) of each value over the seeds."""
    return {name: {"mean": statistics.fmean(one[name] for one in seeds),
                   "deviation": statistics.stdev(one[name] for one in seeds) if len(seeds) > 1 else None}
            for name in (seeds[0] if seeds else ())}


# ------------------------------------------------------------------------------------------------ charts


def reference(row: Mapping[str, Any], table: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The control that a cohort is held against: the first one of as many independent peers with averaged weights
    alike, else the first with curves; None where there is none."""
    controls = [one for name in table["controls"] for one in table["rows"] if one["row"] == name
                and one is not row and one["why"]["curves"]]
    alike = [one for one in controls if one["peers"] == row["peers"] and one["averages"] == row["averages"]]
    return next(iter([*alike, *(one for one in controls if one["peers"] == row["peers"]), *controls]), None)


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
