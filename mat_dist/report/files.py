"""What a run folder holds, read for the report: nothing is changed, and what is missing or damaged is noted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mat_dist.config import load_config
from mat_dist.config.schema import Config
from mat_dist.errors import ConfigError, OutputError
from mat_dist.report.evaluations import Evaluation, read_evaluations
from mat_dist.runs.files import parse_json
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.lock import RunLock


@dataclass(frozen=True)
class RunFiles:
    """A run as its files tell it. `notes` say what is missing, one line each."""

    folder: RunFolder
    config: Config
    environment: dict[str, Any]
    exit: dict[str, Any]
    steps: list[dict[str, Any]]
    epochs: list[dict[str, Any]]
    evaluations: list[Evaluation]
    notes: list[str]

    @property
    def name(self) -> str:
        return self.folder.path.resolve().name

    @property
    def peers(self) -> list[str]:
        return [str(peer.name) for peer in self.config.peers]

    @property
    def averaged(self) -> bool:
        """Whether averaged weights are kept."""
        return any(peer.averages for peer in self.config.peers)

    @property
    def headline(self) -> Evaluation | None:
        """The most telling evaluation, see `read_evaluations`."""
        return self.evaluations[0] if self.evaluations else None


def read_run(path: Path) -> RunFiles:
    """Read the folder of a run that nobody writes into now.

    Raises ConfigError for something that is no run folder, OutputError while the run is being written.
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise ConfigError(f"{str(path)!r} is not the folder of a run", "command line", "give folders like runs/NAME")
    holder = RunLock(folder, None).held_by()
    if holder is not None:
        raise OutputError(f"the run is being written by {holder}", str(path), "wait until it ends, or stop it")
    config = load_config(str(folder.config))
    notes: list[str] = []
    records = read_records(folder.metrics, notes)
    evaluations = read_evaluations(folder.eval, config.eval.ensemble, notes)
    if not any(one.split == "test" for one in evaluations):
        notes.append("no evaluation on the test set: the run has not ended, or has eval.test_steps=0")
    return RunFiles(folder, config, _document(folder.environment, notes), _document(folder.exit, notes),
                    [one for one in records if one["kind"] == "step"],
                    [one for one in records if one["kind"] == "epoch"], evaluations, notes)


def _document(file: Path, notes: list[str]) -> dict[str, Any]:
    try:
        document = parse_json(file.read_bytes())
    except FileNotFoundError:
        notes.append(f"there is no {file.name}")
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{file.name} cannot be read: {error}")
        return {}
    return document if isinstance(document, dict) else {}


def read_records(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Records in the order of steps; of those with the same step and kind the one of the highest attempt."""
    newest: dict[tuple[str, int], tuple[int, dict[str, Any]]] = {}
    damaged = 0
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        notes.append("there is no metrics.jsonl: no training curves")
        return []
    for line in lines:
        try:
            one = json.loads(line)
            key = (str(one["kind"]), int(one["step"]))
            float(one.get("epoch", 0))
            attempt = int(one.get("attempt", 1))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            damaged += 1
            continue
        if key not in newest or attempt >= newest[key][0]:
            newest[key] = attempt, one
    if damaged:
        notes.append(f"metrics.jsonl: {damaged} damaged lines are left out")
    return [newest[key][1] for key in sorted(newest, key=lambda key: key[1])]
