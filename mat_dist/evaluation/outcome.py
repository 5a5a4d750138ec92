"""From chunks to numbers: accuracies, intervals and verdicts of each target, and the result files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mat_dist.checkpoints import json_digest
from mat_dist.evaluation.results import wilson_interval
from mat_dist.evaluation.soundness import Verdict, judge, total
from mat_dist.evaluation.sources import FROM
from mat_dist.runs.files import write_json, write_text

CLEAN, UNION = "clean", "union"
PLAIN_WIDTH = 140  # columns of a table that goes to a file or a pipe


@dataclass(frozen=True)
class Outcome:
    """What one target did on every image.

    Attributes:
        target: its name.
        clean_N: correct without an attack (bool).
        held: label of a threat -> attack -> correct under it (bool (N,)); False where clean is.
        verdicts: of the soundness checks.
        rounded: label of a threat -> correct on the saved AEs after rounding to bytes (bool (N,)); empty where none
            were saved.
    """

    target: str
    clean_N: Tensor
    held: Mapping[str, Mapping[str, Tensor]]
    verdicts: Sequence[Verdict]
    rounded: Mapping[str, Tensor] = field(default_factory=dict)

    def worst(self, threat: str) -> Tensor:
        """Correct under all attacks of one threat -> bool (N,)."""
        return torch.stack([self.clean_N, *self.held[threat].values()]).all(0)

    @property
    def union(self) -> Tensor:
        """Correct without an attack and under all attacks of all threats, image by image -> bool (N,)."""
        return torch.stack([self.clean_N, *map(self.worst, self.held)]).all(0)

    @property
    def failed(self) -> list[Verdict]:
        """The checks that were not passed."""
        return [v for v in self.verdicts if not v.passed]

    @property
    def reportable(self) -> bool:
        """Whether there were checks, and all were passed."""
        return bool(self.verdicts) and not self.failed

    def summary(self) -> dict[str, Any]:
        """Accuracies with 95 % intervals, by attack and over all attacks, and the verdicts, as JSON values."""
        n = len(self.clean_N)
        worst = {CLEAN: self.clean_N, **{threat: self.worst(threat) for threat in self.held}, UNION: self.union}
        shares = {name: share(flags_N) for name, flags_N in worst.items()}
        return {"target": self.target, "n": n, "reportable": self.reportable, "accuracy": shares,
                "interval_95": {name: wilson_interval(value, n) for name, value in shares.items()},
                "attacks": {threat: {name: share(flags_N) for name, flags_N in attacks.items()}
                            for threat, attacks in self.held.items()},
                **({"accuracy_uint8": {threat: share(flags_N & self.clean_N) for threat, flags_N
                                       in self.rounded.items()}} if self.rounded else {}),
                "checks": [asdict(verdict) for verdict in self.verdicts]}


def share(flags_N: Tensor) -> float:
    """Share of true values."""
    return flags_N.double().mean().item()


def gather(chunks: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """The outcome of every target from all chunks, in order."""
    labels_N = torch.tensor([label for chunk in chunks for label in chunk["labels"]])
    outcomes = []
    for name, first in chunks[0]["predictions"].items():
        rows = [chunk["predictions"][name] | {"rounded": chunk["rounded"].get(name, {})} for chunk in chunks]

        def correct(path: Sequence[str], rows: list[Any] = rows) -> Tensor:
            found: list[int] = []
            for row in rows:
                for key in path:
                    row = row[key]
                found += row
            return torch.tensor(found) == labels_N

        held = {threat: {attack: correct(("threats", threat, attack)) for attack in attacks}
                for threat, attacks in first["threats"].items()}
        counts = [chunk["checks"][name] for chunk in chunks if name in chunk["checks"]]
        rounded = {threat: correct(("rounded", threat)) for threat in rows[0]["rounded"]}
        outcomes.append(Outcome(name, correct((CLEAN,)), held, judge(total(counts)) if counts else [], rounded))
    return outcomes


def write_files(folder: Path, name: str, about: Mapping[str, Any], outcomes: Sequence[Outcome],
                chunks: Sequence[Mapping[str, Any]], weights: str) -> Path:
    """`<name>.csv` with a row per sample, threat, attack and target, then `<name>.json` -> the latter's path.

    The name identifies request, checkpoint and data, so files of that name have the same content but for the time.
    """
    path = folder / f"{name}.json"
    write_text(path.with_suffix(".csv"), as_csv(chunks, weights))
    warnings = sorted({text for chunk in chunks for text in chunk["warnings"]})
    targets = [{**outcome.summary(), "weights": weights} for outcome in outcomes]
    images = json_digest([chunk["images"] for chunk in chunks])
    write_json(path, {**about, "images_digest": images, "reportable": all(o.reportable for o in outcomes),
                      "targets": targets, "transfer_accuracy": transfer_table(chunks), "autoattack_warnings": warnings})
    return path


def transfer_table(chunks: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy of each target on the AEs of each other one: threat -> source -> target -> share."""
    n = sum(len(chunk["labels"]) for chunk in chunks)
    return {threat: {source: {target: sum(chunk["transfer"][threat][source][target] for chunk in chunks) / n
                              for target in counts} for source, counts in sources.items()}
            for threat, sources in chunks[0]["transfer"].items()}


def as_csv(chunks: Sequence[Mapping[str, Any]], weights: str) -> str:
    """A row per sample, threat, attack and target; images that are wrong without an attack are not attacked."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["sample", "label", "threat", "attack", "target", "weights", "clean_prediction", "prediction",
                     "robust", "attacked"])
    for chunk in chunks:
        for target, rows in chunk["predictions"].items():
            for threat, attacks in rows["threats"].items():
                for attack, predictions in attacks.items():
                    columns = zip(chunk["samples"], chunk["labels"], rows[CLEAN], predictions, strict=True)
                    for sample, label, clean, found in columns:
                        writer.writerow([sample, label, threat, attack, target, weights, clean, found,
                                         int(clean == label == found), int(clean == label)])
    return out.getvalue()


def as_table(title: str, outcomes: Sequence[Outcome], weights: str) -> Table:
    """A row per target: per cent with half the 95 % interval, worst over attacks; whether it may be reported."""
    threats = list(outcomes[0].held)
    shown = [CLEAN, *threats, *([UNION] if len(threats) > 1 else [])]
    table = Table(title=title)
    for name in ("target", "weights"):
        table.add_column(name, no_wrap=True)
    for name in (*(f"{name} %" for name in shown), "n"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("reportable", overflow="fold", min_width=len("reportable"))
    for outcome in outcomes:
        row = outcome.summary()
        cells = [f"{100 * row['accuracy'][name]:.2f} [{100 * low:.1f}, {100 * high:.1f}]"
                 for name in shown for low, high in [row["interval_95"][name]]]
        failed = ", ".join(dict.fromkeys(v.check for v in outcome.failed))
        table.add_row(outcome.target, weights, *(cell.replace("[", r"\[") for cell in cells), str(row["n"]),
                      f"NO: {failed}" if failed else "yes" if outcome.reportable else "not checked")
    return table


def attacks_table(outcomes: Sequence[Outcome]) -> Table:
    """A row per target and threat: per cent that withstand each attack alone."""
    names = list(dict.fromkeys(name for outcome in outcomes for held in outcome.held.values() for name in held
                               if not name.startswith(FROM)))
    table = Table(title="Accuracy under each attack alone, %")
    for name in ("target", "threat"):
        table.add_column(name, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        for threat, held in outcome.held.items():
            table.add_row(outcome.target, threat, *(f"{100 * share(held[name]):.2f}" if name in held else "-"
                                                    for name in names))
    return table


def sources_table(outcomes: Sequence[Outcome]) -> Table:
    """A row per other checkpoint and threat: per cent of each target that withstand that one's AEs."""
    table = Table(title="Accuracy on AEs of other checkpoints, %")
    for name in ("source", "threat"):
        table.add_column(name, no_wrap=True)
    for outcome in outcomes:
        table.add_column(outcome.target, justify="right", no_wrap=True)
    for threat, held in outcomes[0].held.items():
        for name in held:
            if name.startswith(FROM):
                table.add_row(name, threat, *(f"{100 * share(outcome.held[threat][name]):.2f}" for outcome in outcomes))
    return table


def show(table: Table) -> None:
    """On the screen; where that is no terminal, plain text of a fixed width."""
    screen = Console()
    if not screen.is_terminal:
        screen = Console(width=PLAIN_WIDTH, color_system=None)
    screen.print(table)
