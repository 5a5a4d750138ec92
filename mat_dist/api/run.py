"""A run as programs see it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mat_dist.config import load_config
from mat_dist.config.schema import Config
from mat_dist.errors import optional
from mat_dist.evaluation.results import CLEAN, Result, read_results, wilson_interval
from mat_dist.evaluation.settings import find_run

if TYPE_CHECKING:
    from pandas import DataFrame


def frame(rows: Sequence[dict[str, Any]]) -> DataFrame:
    """The rows as a data frame. Raises EnvironmentFault without pandas."""
    frames: DataFrame = optional("pandas", "data frames", "pip install 'mat_dist[pandas]'").DataFrame(rows)
    return frames


def result_rows(result: Result) -> Iterator[dict[str, Any]]:
    """A row for each accuracy of each target: without an attack, under each attack of each threat, under all of them
    (attack: worst), and under all threats (threat: union)."""
    for one in result.targets:
        values = {(name, "none" if name == CLEAN else "worst"): value for name, value in one.accuracy.items()}
        values |= {(threat, name): value for threat, found in one.attacks.items() for name, value in found.items()}
        for (threat, attack), value in values.items():
            low, high = wilson_interval(value, one.n)
            yield {"target": one.target, "weights": one.weights, "threat": threat, "attack": attack, "accuracy": value,
                   "low": low, "high": high, "n": one.n, "reportable": None if one.checks is None else not one.failed}


@dataclass(frozen=True)
class Run:
    """The folder of a run, for `mat_dist.load` too. Raises ConfigError where it is none."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", find_run(str(self.path), "run").path.resolve())

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__

    @property
    def config(self) -> Config:
        """The complete settings."""
        return load_config(str(self.path / "config.yaml"))

    def metrics(self, kind: str = "step") -> DataFrame:
        """metrics.jsonl as a data frame: a row for each log step, or with kind="epoch" for each evaluation; columns
        such as `loss/peer0`. Raises EnvironmentFault without pandas."""
        from mat_dist.report.files import read_records
        from mat_dist.runs.metrics import series

        peers = [str(spec.name) for spec in self.config.peers]
        return frame([{"step": one["step"], **series(one, peers)} for one in
                      read_records(self.path / "metrics.jsonl", [], growing=True) if one["kind"] == kind])

    def results(self) -> DataFrame:
        """All result files as a data frame, see `result_rows`. Raises NotReportable for a damaged one."""
        return frame([{"file": result.file.name, "checkpoint": result.checkpoint, "step": result.step,
                       "split": result.split, **row}
                      for result in read_results(self.path / "eval", "*") for row in result_rows(result)])
