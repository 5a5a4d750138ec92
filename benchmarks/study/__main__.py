"""What mutual training is worth: many runs, trained, attacked and compared; from the repository's root.

python -m benchmarks.study evidence --suite overfit data.root=FOLDER [key=value ...]  mutual training and its controls
python -m benchmarks.study slices --suite gpu --out FOLDER data.root=FILE [key=value]  evidence, a few minutes of it
python -m benchmarks.study search --suite overfit data.root=FOLDER [key=value ...]    settings of the mutual loss
python -m benchmarks.study reasons RUN [images=500] [key=value ...]                   what peers do with others' AEs
python -m benchmarks.study units RUN ... [images=500] [key=value ...]                 width that training has lost

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
SLICES = """Takes up what an earlier slice of a suite left, goes on as `evidence` does, and leaves page, numbers and
state in --out: benchmarks/slice.sh. key=value: settings of every run, laid over those of the plan."""
REASONS = """Measures what the peers of a finished run do with each other's AEs: writes eval/reasons/<digest>.json of
the run, and prints a table. The test split is never touched.

  images=N            validation images, and as many training images (default 500)
  checkpoint=LABEL    best, last or step_N (default last)
  weights=WHICH       raw, ema, auto (default auto: averaged weights where they are kept)
  key=value           settings that python -m mat_dist.evaluate may change: run.device, data.root, ..."""

UNITS = """Measures how many inputs of the last linear layer of each peer are 0 on all images, and prints a table.

  images=N            validation images (default 500)
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
    units = Command("study units", UNITS, "RUN ... [key=value ...]")
    units.add_plugin()
    units.add_argument("--json", type=Path, metavar="FILE", help="write the shares of every peer there, too")
    units.set_defaults(dry_run=False)
    return read_command(words, {"evidence": _of_runs("evidence", EVIDENCE, "ROW", "--file"), "slices": _slices(),
                                "search": _of_runs("search", SEARCH, "FAMILY", "--space"), "reasons": reasons,
                                "units": units}, __doc__)


def _slices() -> Command:
    """The options of `evidence`, and those of what is brought back."""
    one = _of_runs("evidence", SLICES, "ROW", "--file", "slices")
    one.add_argument("--state", type=_folder, metavar="FOLDER", help="--out of an earlier slice; default -, for none")
    one.add_argument("--most", type=_mib, default=64.0, metavar="MIB", help="of all files in --out (default 64)")
    one.add_argument("--part", type=_mib, default=16.0, metavar="MIB", help="of one file of the state (default 16)")
    return one


def _of_runs(name: str, about: str, only: str, alias: str, command: str = "") -> Command:
    """The options of a study that trains."""
    one = Command(f"study {command or name}", about)
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


def _folder(text: str) -> Path | None:
    return None if text == "-" else Path(text)


def _mib(text: str) -> float:
    return _positive(text, "MiB such as 64")


def _seconds(text: str) -> float:
    return _positive(text, "seconds such as 500")


def _positive(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number of {what}")
    return value


if __name__ == "__main__":
    sys.exit(main())
