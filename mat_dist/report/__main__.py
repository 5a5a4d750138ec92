"""Make a page of a finished run: report/index.html in its folder, one file without scripts or network, to look at.

python -m mat_dist.report RUN [RUN ...] [--images N] [--device D] [--no-attack] [--plugin FILE.py]

  RUN           folder of a run, e.g. runs/NAME. Several: their comparison, report/comparison.html in the first one
  --images N    test images that are attacked for the page (default 128)
  --device D    cpu or cuda (default: a GPU where there is one)
  --no-attack   only what the run's files tell: no pictures, no curves against radius and steps, no loss surface
  --plugin      the file that registers the run's model or data; may be given several times

The charts lie beside the page as SVG, the pictures as PNG. The run's own files are only read. Exit codes: 2 no such
run, 4 no checkpoint, or a damaged one (--no-attack needs none), 5 the run is being written, or its folder cannot be.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mat_dist.cli import run_entry
from mat_dist.config import load_plugins
from mat_dist.config.nodes import COMMAND_LINE
from mat_dist.config.words import split, whole_number
from mat_dist.errors import CheckpointError, ConfigError, EnvironmentFault, MatError

if TYPE_CHECKING:
    import torch

    from mat_dist.report.files import RunFiles
    from mat_dist.report.measure import Measured
    from mat_dist.report.subject import Subject


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    runs: tuple[str, ...]
    images: int = 128
    device: str = "auto"
    attack: bool = True
    plugins: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """The command -> exit code of architecture.md."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_entry(lambda: report(words))


def report(words: Sequence[str]) -> None:
    """Write the report of one run, or the comparison of several."""
    if not words or any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return
    options = parse(words)

    from mat_dist.report.compare import comparison_page
    from mat_dist.report.files import read_run
    from mat_dist.report.page import run_page, write_report

    runs = [read_run(Path(word)) for word in options.runs]
    if len(runs) > 1:
        page, book = comparison_page(runs)
        print(write_report(runs[0].folder.report, page, book, "comparison.html"))
        return
    load_plugins(options.plugins)
    subject, measured, notes = attacked(runs[0], options)
    page, book = run_page(runs[0], subject, measured, notes)
    print(write_report(runs[0].folder.report, page, book))


def attacked(run: RunFiles, options: Options) -> tuple[Subject | None, Measured | None, list[str]]:
    """What the checkpoint does under attack; without it, why not. Raises CheckpointError."""
    if not options.attack:
        return None, None, ["--no-attack was given: no pictures, radius, steps and loss surface"]
    from mat_dist.report.measure import measure
    from mat_dist.report.subject import find_checkpoint, load_subject

    manifest = find_checkpoint(run)
    try:
        subject = load_subject(run, manifest, options.images, choose(options.device))
    except (CheckpointError, EnvironmentFault):
        raise
    except MatError as error:  # images that are elsewhere, a plug-in that was not given: the files still tell a lot
        return None, None, [f"no pictures, radius, steps and loss surface: {error}"]
    print(f"attacking {len(subject.samples_N)} test images on {subject.device}", file=sys.stderr)
    return subject, measure(subject, lambda what: print(f"  {what}", file=sys.stderr)), []


def choose(name: str) -> torch.device:
    """The device that is asked for. Raises EnvironmentFault where there is none."""
    import torch

    gpu = torch.cuda.is_available()
    if name == "cuda" and not gpu:
        raise EnvironmentFault("no GPU is visible", "--device cuda", "leave it out, or use --device cpu")
    return torch.device("cuda" if gpu and name != "cpu" else "cpu")


def parse(words: Sequence[str]) -> Options:
    """Raises ConfigError for an unknown option, a missing value, or no run."""
    found = split(words, {"--images": "N", "--device": "cpu", "--plugin": "FILE.py"}, ("--no-attack",))
    found.complain()
    for word in found.rest:
        if word.startswith("-"):
            raise ConfigError(f"unknown option {word!r}", COMMAND_LINE, "see python -m mat_dist.report --help")
    if not found.rest:
        raise ConfigError("no run is given", COMMAND_LINE, "give the folder of a run, e.g. runs/NAME")
    images, device = whole_number("--images", found.last("--images") or "128"), found.last("--device") or "auto"
    if device not in ("cpu", "cuda", "auto"):
        raise ConfigError(f"--device {device!r}", COMMAND_LINE, "use cpu or cuda")
    return Options(found.rest, images, device, not found.flags, found.values.get("--plugin", ()))


if __name__ == "__main__":
    sys.exit(main())
