"""Result files of an evaluation: `eval/<id>.json`, and `eval/<id>.csv` with a row per sample, attack and target."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from mat_dist.attacks.norms import eps_text
from mat_dist.config.schema import Config
from mat_dist.evaluation.attacks import AttackPlan, Result, threats_of
from mat_dist.evaluation.statistics import Z_95
from mat_dist.runs.files import write_json, write_text
from mat_dist.runs.record import versions


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` images (Wilson, 1927); stays in [0, 1] also at 0 and 1."""
    z2 = Z_95 * Z_95
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def write_results(folder: Path, name: str, results: Sequence[Result], *, config: Config, attack: AttackPlan, step: int,
                  split: str, attempt: int, per_sample: bool = False) -> Path:
    """Write one evaluation; an existing file of that name is never overwritten (-2, -3, ... is appended).

    Raises OutputError when the folder cannot be written.
    """
    folder.mkdir(exist_ok=True)
    path = _free(folder, name)
    threats = threats_of(config.peers)
    labels = [t.label for t in threats]
    targets = []
    for r in results:
        n = len(r.clean_N)
        shares = {"clean": r.clean, **{label: r.against(t) for t, label in enumerate(labels)}, "union": r.robust}
        targets.append({"target": r.target, "weights": r.weights, "n": n, "accuracy": shares,
                        "interval_95": {k: wilson_interval(v, n) for k, v in shares.items()}})
    write_json(path, {
        "step": step, "split": split, "attempt": attempt, "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "attack": {"name": "PGD", "loss": attack.loss, "start": attack.start, "steps": attack.steps,
                   "restarts": attack.restarts,
                   "step_size": {label: attack.size(t) for label, t in zip(labels, threats, strict=True)}},
        "threats": [{"norm": t.norm, "eps": eps_text(t.eps)} for t in threats], "seed": config.run.seed,
        "chunk": config.eval.chunk, "ensemble": config.eval.ensemble, "versions": versions(), "targets": targets,
        "config": config.model_dump(mode="json", exclude={"run": {"name"}}),
    })
    if per_sample:
        write_text(path.with_suffix(".csv"), _rows(results, labels))
    return path


def _rows(results: Sequence[Result], threats: Sequence[str]) -> str:
    """A row per sample, attack and target; images that are wrong without an attack are `not attacked`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["sample", "label", "attack", "target", "weights", "clean_correct", "robust", "attacked"])
    for r in results:
        samples, labels, clean = r.samples_N.tolist(), r.labels_N.tolist(), r.clean_N.tolist()
        for threat, robust in zip(threats, r.robust_TN.tolist(), strict=True):
            for sample, true, c, ok in zip(samples, labels, clean, robust, strict=True):
                writer.writerow([sample, true, threat, r.target, r.weights, int(c), int(ok), int(c)])
    return out.getvalue()


def _free(folder: Path, name: str) -> Path:
    numbered = itertools.chain([f"{name}.json"], (f"{name}-{k}.json" for k in itertools.count(2)))
    return next(folder / one for one in numbered if not (folder / one).exists())
