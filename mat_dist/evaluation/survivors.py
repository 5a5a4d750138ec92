"""What survived: from chunks to the accuracies of each target, and into the result files (see results.py)."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
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
from mat_dist.evaluation.results import AS_TRAINED, CLEAN, COLUMNS, FORMAT, UNION, Verdict, wilson_interval
from mat_dist.evaluation.soundness import judge, judge_headline, total
from mat_dist.runs.files import parse_json, reported, write_json, write_text
from mat_dist.runs.record import versions

VOLATILE = ("time", "chosen_on_validation", "system")  # none of them changes a result

Chunks = Sequence[Mapping[str, Any]]  # what mat_dist/evaluation/chunks.py tells of each chunk
Found = Mapping[str, Chunks]  # weights -> chunks; empty on all ranks but the first


def target_rows(found: Found, training: Sequence[Verdict] = (), *, checked: bool = False) -> list[dict[str, Any]]:
    """What a document says of every target, in order; see `document_of`."""
    return [row for weights, chunks in found.items() for row in _target_rows(chunks, weights, training, checked)]


def _target_rows(chunks: Chunks, weights: str, training: Sequence[Verdict], checked: bool) -> Iterator[dict[str, Any]]:
    labels_N = torch.tensor([label for chunk in chunks for label in chunk["labels"]])

    def correct(*path: str) -> Tensor:
        return torch.tensor([guess for chunk in chunks for guess in reduce(getitem, path, chunk)]) == labels_N

    for name, first in chunks[0]["predictions"].items():
        clean_N = correct("predictions", name, CLEAN)
        held = {threat: {attack: correct("predictions", name, "threats", threat, attack) & clean_N
                         for attack in attacks} for threat, attacks in first["threats"].items()}
        worst = {threat: torch.stack([clean_N, *attacks.values()]).all(0) for threat, attacks in held.items()}
        union_N = torch.stack([clean_N, *worst.values()]).all(0)
        shares = {key: share(flags_N) for key, flags_N in {CLEAN: clean_N, **worst, UNION: union_N}.items()}
        row = {"target": name, "weights": weights, "n": len(labels_N), "accuracy": shares,
               "interval_95": {key: wilson_interval(value, len(labels_N)) for key, value in shares.items()},
               "attacks": {threat: {attack: share(flags_N) for attack, flags_N in attacks.items()}
                           for threat, attacks in held.items()}}
        if bytes_held := {threat: share(correct("rounded", name, threat) & clean_N)
                          for threat in chunks[0]["rounded"].get(name, ())}:
            row["accuracy_uint8"] = bytes_held
        if checked:
            verdicts = _verdicts([chunk["checks"][name] for chunk in chunks if name in chunk["checks"]], shares[CLEAN],
                                 labels_N.tolist(), itertools.chain.from_iterable(held.values()), training)
            row |= {"reportable": bool(verdicts) and all(one.passed for one in verdicts),
                    "checks": [asdict(verdict) for verdict in verdicts]}
        yield row


def _verdicts(counts: Sequence[Any], clean: float, labels: Sequence[int], attacks: Iterable[str],
              training: Sequence[Verdict]) -> list[Verdict]:
    if not counts:
        return [one for one in training if one.check == AS_TRAINED]
    sums = total(counts)
    return [*judge(sums), *judge_headline(clean, labels, sums[""]["classes"], attacks), *training]


def share(flags_N: Tensor) -> float:
    """Share of true values."""
    return flags_N.double().mean().item()


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


def write_result(folder: Path, name: str, document: Mapping[str, Any], table: str | None = None) -> Path:
    """Write the table of images (`image_rows`), then the document (`document_of`) -> the latter's path.

    A file of that name which says anything else but for the time stays, and -2, -3, ... is appended. Raises OutputError
    when the folder cannot be written.
    """
    with reported(folder):
        folder.mkdir(exist_ok=True)
    endings = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    paths = (folder / f"{name}{ending}.json" for ending in endings)
    path = next(path for path in paths if not path.exists() or _has(path, document, table))
    if table is not None:
        write_text(path.with_suffix(".csv"), table)
    write_json(path, document)
    return path


def document_of(about: Mapping[str, Any], found: Found, *, checked: bool,
                training: Sequence[Verdict] = ()) -> dict[str, Any]:
    """What a result file says.

    Args:
        about: what `about_run` and `about_job` and the caller say.
        checked: whether soundness checks were wanted.
        training: what is to be said of the model's training.
    """
    targets = target_rows(found, training, checked=checked)
    some, n = next(iter(found.values())), targets[0]["n"]
    # Accuracy of each target on the AEs of each other one: threat -> source -> target -> share.
    transfer = {threat: {source: {target: sum(chunk["transfer"][threat][source][target] for chunk in some) / n
                                  for target in counts} for source, counts in sources.items()}
                for threat, sources in some[0]["transfer"].items()}
    warnings = sorted({text for chunks in found.values() for chunk in chunks for text in chunk["warnings"]})
    return {**about, "time": datetime.now(UTC).isoformat(timespec="seconds"), "n": n,
            "images_digest": json_digest([chunk["images"] for chunk in some]),
            **({"reportable": all(one["reportable"] for one in targets)} if checked else {}), "targets": targets,
            "transfer_accuracy": transfer, "autoattack_warnings": warnings}


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
