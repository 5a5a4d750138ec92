"""What mutual training is worth: many runs, trained, attacked and compared; from the repository's root.

python -m benchmarks.study evidence --suite overfit data.root=FOLDER [key=value ...]  mutual training and its controls
python -m benchmarks.study search --suite cpu data.root=FOLDER [key=value ...]        settings of the mutual loss
python -m benchmarks.study reasons RUN [images=500] [key=value ...]                   what peers do with others' AEs

Finished runs and evaluations are not repeated. Results are written after every run and say what is missing. A command
with --help lists its options.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.command import Command, read_command
from mat_dist.cli import run_entry
from mat_dist.config.help import count
from mat_dist.distributed.launch import Launch
from mat_dist.errors import EnvironmentFault
from mat_dist.screens import arrived

HERE = Path(__file__).resolve().parents[1]  # benchmarks/
EVIDENCE = """Trains and attacks all rows of a suite of benchmarks/evidence.yaml, and writes its tables with paired
differences. key=value: settings of every run, laid over those of the plan."""
SEARCH = """Searches settings of the mutual loss on the validation split, by benchmarks/search.yaml, and writes its
table. The test set is never attacked. key=value: settings of every run, laid over those of the space."""
REASONS = """Measures what the peers of a finished run do with each other's AEs: writes eval/reasons/<digest>.json of
the run, and prints a table. The test split is never touched.

  images=N            validation images, and as many training images (default 500)
  checkpoint=LABEL    best, last or step_N (default last)
  weights=WHICH       raw, ema, auto (default auto: averaged weights where they are kept)
  key=value           settings that python -m mat_dist.evaluate may change: run.device, data.root, ..."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command -> exit code of architecture.md."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_entry(lambda: run(words))


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The options; all words that are none are `words`. Raises ConfigError."""
    reasons = Command("study reasons", REASONS, "RUN [key=value ...]")
    reasons.add_plugin()
    reasons.add_argument("--dry-run", action="store_true", help="print what would be measured")
    found = read_command(words, {"evidence": _of_runs("evidence", EVIDENCE, "ROW", "--file"), "reasons": reasons,
                                 "search": _of_runs("search", SEARCH, "FAMILY", "--space")}, __doc__)
    return found


def _of_runs(name: str, about: str, only: str, alias: str) -> Command:
    """The options of a study that trains."""
    one = Command(f"study {name}", about)
    one.add_argument("--suite", metavar="NAME", help="suite of the file (default its first)")
    one.add_argument("--only", type=lambda text: tuple(filter(None, text.split(","))), default=(),
                     metavar=f"{only},...", help="these alone; the tables keep what others have")
    one.add_argument("--seeds", type=_seeds, default=(), metavar="0,1", help="these seeds alone")
    one.add_argument("--jobs", type=_jobs, default=1, metavar="N",
                     help="runs at a time, each on one thread (default 1); on a GPU all share it")
    one.add_argument("--budget", type=_seconds, metavar="SECONDS",
                     help="after these, save and stop with exit code 75; the same command goes on")
    one.add_argument("--root", type=Path, metavar="FOLDER", help=f"of the runs (default runs/{name}_<suite>)")
    one.add_argument(alias, dest="file", type=Path, default=HERE / f"{name}.yaml", metavar="FILE",
                     help=f"another plan (default benchmarks/{name}.yaml)")
    one.add_argument("--out", type=Path, default=HERE / "results", metavar="FOLDER",
                     help="of the results (default benchmarks/results)")
    one.add_argument("--dry-run", action="store_true", help="print runs and passes, and what cannot be trained")
    return one


def run(words: list[str]) -> None:
    """One of the commands. Raises MatError."""
    options = read_options(words)
    if Launch.from_environment().world > 1:
        raise EnvironmentFault("several ranks", options.command, "start it without torchrun: it starts its own runs")
    study: Callable[[argparse.Namespace], None] = importlib.import_module(f"benchmarks.study.{options.command}").main
    study(options)
    if options.dry_run:
        arrived()


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a list such as 0,1") from None


def _jobs(text: str) -> int:
    if (value := count(text)) > 256:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is more than 256")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number of seconds such as 500")
    return value


if __name__ == "__main__":
    sys.exit(main())
