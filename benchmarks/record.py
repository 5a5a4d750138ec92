"""What a run reached, and how long it took: `python -m benchmarks.record RUN` writes it to benchmarks/results."""

from __future__ import annotations

import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from mat_dist.cli import run_entry
from mat_dist.config.tree import COMMAND_LINE
from mat_dist.errors import ConfigError
from mat_dist.evaluation.results import read_results, wilson_interval
from mat_dist.runs.files import write_json
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.record import read_environment, read_exit

RESULTS = Path("benchmarks/results")


def training_seconds(folder: RunFolder) -> float:
    """Wall time of all attempts, from the start of the process to its end, evaluations of the training included.

    Raises ConfigError where one has not told its end.
    """
    began, ended = read_environment(folder), read_exit(folder)
    starts = {one["attempt"]: one["started"] for one in (began or {}).get("attempts", [])}
    ends = {one["attempt"]: one["time"] for one in (ended or {}).get("attempts", [])}
    if not starts or set(starts) - set(ends):
        raise ConfigError("the training has not told its end", str(folder.path), "start it again to finish it")
    return sum((datetime.fromisoformat(ends[n]) - datetime.fromisoformat(starts[n])).total_seconds() for n in starts)


def record(path: Path) -> dict[str, Any]:
    """The newest result of a run's peer, with its intervals, and what it took. Raises ConfigError."""
    folder = RunFolder(path)
    results = read_results(folder.eval, "evaluate_*")
    environment = read_environment(folder)
    if not results or environment is None:
        raise ConfigError("there is no result", str(path), f"python -m mat_dist.evaluate {path} attacks=autoattack")
    newest, target = results[-1], results[-1].targets[0]
    return {"device": environment["devices"][0], "training_s": training_seconds(folder), "images": target.n,
            "accuracy": target.accuracy,
            "interval": {name: wilson_interval(share, target.n) for name, share in target.accuracy.items()},
            "attacks": list(newest.attacks), "sound": newest.sound, "reportable": newest.reportable,
            "step": newest.step, "git": environment["git"], "versions": environment["versions"],
            "command": environment["command"]}


def main(words: list[str]) -> None:
    """Write and show it. Raises ConfigError."""
    if len(words) != 1:
        raise ConfigError(f"{len(words)} folders", COMMAND_LINE, "write the folder of one run")
    found = record(Path(words[0]))
    device = re.sub(r"[^A-Za-z0-9]", "_", found["device"])
    file = RESULTS / device / "record.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, found)
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in found["accuracy"].items())
    print(f"{found['device']}: {found['training_s']:.0f} s of training, {found['images']} images: {shares}; {file}")


if __name__ == "__main__":
    sys.exit(run_entry(lambda: main(sys.argv[1:])))
