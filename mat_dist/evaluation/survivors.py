"""What survived: from chunks to the accuracies of each target, and into the result files (see results.py)."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mat_dist.attacks.norms import eps_text
from mat_dist.checkpoints import json_digest
from mat_dist.checkpoints.load import FinishedRun
from mat_dist.evaluation.attacks import Job
from mat_dist.evaluation.results import AS_TRAINED, CLEAN, COLUMNS, FORMAT, UNION, Verdict
from mat_dist.evaluation.soundness import judge, judge_headline, total
from mat_dist.evaluation.statistics import wilson_interval
from mat_dist.runs.files import parse_json, reported, write_json, write_text
from mat_dist.runs.record import versions

VOLATILE = ("time", "chosen_on_validation", "system")  # none of them changes a result

Chunks = Sequence[Mapping[str, Any]]  # what mat_dist/evaluation/chunks.py tells of each chunk
Found = Mapping[str, Chunks]  # weights -> chunks; empty on all ranks but the first


@dataclass(frozen=True)
class Survivors:
    """What one target did on every image.

    Attributes:
        target, weights: its name; `raw` or `ema`.
        clean_N: correct without an attack (bool).
        held: label of a threat -> attack -> correct under it (bool (N,)).
        verdicts: of the soundness checks.
        rounded: label of a threat -> correct on the saved AEs after rounding to bytes (bool (N,)); empty where none
            were saved.
    """

    target: str
    weights: str
    clean_N: Tensor
    held: Mapping[str, Mapping[str, Tensor]]
    verdicts: Sequence[Verdict] = ()
    rounded: Mapping[str, Tensor] = field(default_factory=dict)

    def worst(self, threat: str) -> Tensor:
        """Correct without an attack and under all attacks of one threat -> bool (N,)."""
        return torch.stack([self.clean_N, *self.held[threat].values()]).all(0)

    @property
    def accuracy(self) -> dict[str, float]:
        """Shares in [0, 1]: clean, under each threat, and under all threats, image by image."""
        worst = {threat: self.worst(threat) for threat in self.held}
        union_N = torch.stack([self.clean_N, *worst.values()]).all(0)
        return {name: share(flags_N) for name, flags_N in {CLEAN: self.clean_N, **worst, UNION: union_N}.items()}

    @property
    def failed(self) -> list[Verdict]:
        """The checks that were not passed."""
        return [v for v in self.verdicts if not v.passed]

    @property
    def reportable(self) -> bool:
        """Whether there were checks, and all were passed."""
        return bool(self.verdicts) and not self.failed

    def summary(self) -> dict[str, Any]:
        """The entry of `targets`, but for the checks."""
        n, shares = len(self.clean_N), self.accuracy
        return {"target": self.target, "weights": self.weights, "n": n, "accuracy": shares,
                "interval_95": {name: wilson_interval(value, n) for name, value in shares.items()},
                "attacks": {threat: {name: share(flags_N & self.clean_N) for name, flags_N in attacks.items()}
                            for threat, attacks in self.held.items()},
                **({"accuracy_uint8": {threat: share(flags_N & self.clean_N) for threat, flags_N
                                       in self.rounded.items()}} if self.rounded else {})}

    def checked(self) -> dict[str, Any]:
        """What the checks add to the summary."""
        return {"reportable": self.reportable, "checks": [asdict(verdict) for verdict in self.verdicts]}


def share(flags_N: Tensor) -> float:
    """Share of true values."""
    return flags_N.double().mean().item()


def gather(found: Found, training: Sequence[Verdict] = ()) -> list[Survivors]:
    """What every target did on all chunks, in order. `training`: what is to be said of the model's training."""
    return [one for weights, chunks in found.items() for one in _gather(chunks, weights, training)]


def _gather(chunks: Chunks, weights: str, training: Sequence[Verdict]) -> list[Survivors]:
    labels_N = torch.tensor([label for chunk in chunks for label in chunk["labels"]])

    def correct(*path: str) -> Tensor:
        return torch.tensor([guess for chunk in chunks for guess in reduce(getitem, path, chunk)]) == labels_N

    found = []
    for name, first in chunks[0]["predictions"].items():
        held = {threat: {attack: correct("predictions", name, "threats", threat, attack) for attack in attacks}
                for threat, attacks in first["threats"].items()}
        counts = [chunk["checks"][name] for chunk in chunks if name in chunk["checks"]]
        rounded = {threat: correct("rounded", name, threat) for threat in chunks[0]["rounded"].get(name, {})}
        clean_N, verdicts = correct("predictions", name, CLEAN), [one for one in training if one.check == AS_TRAINED]
        if counts:
            sums = total(counts)
            attacks = itertools.chain.from_iterable(held.values())
            headline = judge_headline(share(clean_N), labels_N.tolist(), sums[""]["classes"], attacks)
            verdicts = [*judge(sums), *headline, *training]
        found.append(Survivors(name, weights, clean_N, held, verdicts, rounded))
    return found


def transfer_table(chunks: Chunks) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy of each target on the AEs of each other one: threat -> source -> target -> share."""
    n = sum(len(chunk["labels"]) for chunk in chunks)
    return {threat: {source: {target: sum(chunk["transfer"][threat][source][target] for chunk in chunks) / n
                              for target in counts} for source, counts in sources.items()}
            for threat, sources in chunks[0]["transfer"].items()}


# ------------------------------------------------------------------------------------------------ writing


def about_run(run: FinishedRun, label: str, device: str) -> dict[str, Any]:
    """What a document says of the run and the machine. `label`: best, last or step_N."""
    found = versions()
    system = found.pop("system")
    return {"format": FORMAT, "run": run.folder.path.resolve().name, "checkpoint": label, "step": run.manifest.step,
            "files": {entry.name: entry.sha256 for entry in run.manifest.files}, "subset_seed": run.config.run.seed,
            "precision": run.config.step.precision, "threads": run.config.run.threads, "device": device,
            "versions": found, "system": system, "config": run.config.model_dump(mode="json",
                                                                                 exclude={"run": {"name"}})}


def about_job(job: Job, chunk: int) -> dict[str, Any]:
    """What a document says of the attacks. `chunk`: images of one."""
    plans = {name: asdict(plan) | {"step_size": {t.label: plan.size(t) for t in job.threats},
                                   "restarts": max(map(plan.starts, job.threats))}
             for name, plan in job.plans.items()}
    return {"threats": [{"norm": t.norm, "eps": eps_text(t.eps), "eps_float": t.eps} for t in job.threats],
            "attacks": list(job.attacks), "plans": plans, "transfer": job.transfer, "seed": job.seed, "chunk": chunk}


def write_result(folder: Path, name: str, about: Mapping[str, Any], found: Found, *,
                 checked: bool, images: bool = True, training: Sequence[Verdict] = ()) -> Path:
    """Write the table of images, then the document -> the latter's path.

    A file of that name which says anything else but for the time stays, and -2, -3, ... is appended. Arguments as those
    of `document_of`; `images`: write the table too. Raises OutputError when the folder cannot be written.
    """
    with reported(folder):
        folder.mkdir(exist_ok=True)
    document = document_of(about, found, gather(found, training), checked=checked)
    table = image_rows(found) if images else None
    endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    paths = (folder / f"{name}{ending}.json" for ending in endings)
    path = next(path for path in paths if not path.exists() or _has(path, document, table))
    if table is not None:
        write_text(path.with_suffix(".csv"), table)
    write_json(path, document)
    return path


def document_of(about: Mapping[str, Any], found: Found, survivors: Sequence[Survivors], *,
                checked: bool) -> dict[str, Any]:
    """What a result file says.

    Args:
        about: what `about_run` and `about_job` and the caller say.
        survivors: what `gather` makes of `found`.
        checked: whether soundness checks were wanted.
    """
    targets = [one.summary() | (one.checked() if checked else {}) for one in survivors]
    some = next(iter(found.values()))
    warnings = sorted({text for chunks in found.values() for chunk in chunks for text in chunk["warnings"]})
    return {**about, "time": datetime.now(UTC).isoformat(timespec="seconds"), "n": len(survivors[0].clean_N),
            "images_digest": json_digest([chunk["images"] for chunk in some]),
            **({"reportable": all(one.reportable for one in survivors)} if checked else {}), "targets": targets,
            "transfer_accuracy": transfer_table(some), "autoattack_warnings": warnings}


def _has(path: Path, document: Mapping[str, Any], table: str | None) -> bool:
    """Whether the files there are these, but for what may differ between equal results."""
    try:
        there = parse_json(path.read_bytes())
        one, other = ({key: value for key, value in told.items() if key not in VOLATILE}
                      for told in (there, json.loads(json.dumps(document))))
        return one == other and (table is None or path.with_suffix(".csv").read_text() == table)
    except (OSError, ValueError, AttributeError):
        return False


def image_rows(found: Found) -> str:
    """The CSV file; images that are wrong without an attack are not attacked."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for weights, chunk in ((weights, chunk) for weights, chunks in found.items() for chunk in chunks):
        for target, rows in chunk["predictions"].items():
            for threat, attack, predictions in ((threat, attack, predictions) for threat, attacks
                                                in rows["threats"].items() for attack, predictions in attacks.items()):
                columns = zip(chunk["samples"], chunk["labels"], rows[CLEAN], predictions, strict=True)
                for sample, label, clean, under in columns:
                    writer.writerow([sample, label, threat, attack, target, weights, clean, under,
                                     int(clean == label == under), int(clean == label)])
    return out.getvalue()
