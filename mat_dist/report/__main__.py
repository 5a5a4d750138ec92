"""Make a page of a run: report/index.html in its folder, one file without scripts or network, to look at.

RUN is the folder of a run, e.g. runs/NAME. Several: their comparison, report/comparison.html in the first one.

A run that goes on is shown as far as it is. The figures lie beside the page as files, the pictures as PNG. The run's
own files are only read. Exit codes: 2 no such run, 4 no checkpoint, or a damaged one (--no-attack needs none), 5 the
folder cannot be written.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mat_dist.cli import as_main
from mat_dist.config import Options, count, load_plugins
from mat_dist.errors import CheckpointError, EnvironmentFault, MatError
from mat_dist.evaluation.settings import find_runs

if TYPE_CHECKING:
    from mat_dist.report.files import RunFiles
    from mat_dist.report.measure import Measured, Victims


def report(words: Sequence[str]) -> None:
    """Write the report of one run, or the comparison of several."""
    known = Options("report", __doc__, "RUN [RUN ...]")
    known.add_argument("--images", metavar="N", type=count, default=128, help="test images that are attacked (128)")
    known.add_argument("--device", metavar="cpu|cuda", choices=("auto", "cpu", "cuda"), default="auto",
                       help="default: a GPU where there is one")
    known.add_argument("--no-attack", action="store_true", help="only what the run's files tell: no pictures, no "
                       "curves against radius and steps, no loss surface")
    known.add_argument("--figures", choices=("svg", "pdf", "png"), default="svg",
                       help="format of the figures' files (svg)")
    known.add_plugin()
    options = known.read(words)
    load_plugins(options.plugin)

    from mat_dist.report.compare import comparison_page
    from mat_dist.report.files import read_run
    from mat_dist.report.page import run_page, write_report

    runs = [read_run(folder) for folder in find_runs(options.words)]
    folder = runs[0].folder.report
    if len(runs) > 1:
        print(write_report(folder, comparison_page(runs), "comparison.html", options.figures))
        return
    print(write_report(folder, run_page(runs[0], *attacked(runs[0], options)), kind=options.figures))


def attacked(run: RunFiles, options: Namespace) -> tuple[Victims | None, Measured | None, list[str]]:
    """What the checkpoint does under attack; without it, why not. Raises CheckpointError."""
    if options.no_attack:
        return None, None, ["--no-attack was given: no pictures, radius, steps and loss surface"]
    from mat_dist.checkpoints.load import open_run
    from mat_dist.distributed.groups import choose_device
    from mat_dist.report.measure import load_victims, measure

    try:
        opened = open_run(run.folder.path, config=run.config)
        settings = run.config.run.model_copy(update={"device": options.device})
        device = choose_device(run.config.model_copy(update={"run": settings}), 0)
        victims = load_victims(opened, options.images, device)
    except (CheckpointError, EnvironmentFault) as error:
        if run.writer is None or isinstance(error, EnvironmentFault):
            raise
        return None, None, [f"no pictures, radius, steps and loss surface yet: {error}"]
    except MatError as error:  # images that are elsewhere, a plug-in that was not given: the files still tell a lot
        return None, None, [f"no pictures, radius, steps and loss surface: {error}"]
    print(f"attacking {len(victims.samples_N)} test images on {victims.device}", file=sys.stderr)
    other = opened.other_network
    told = [f"pictures, radius, steps and loss surface of the network that was trained: {other}"] if other else []
    return victims, measure(victims, lambda what: print(f"  {what}", file=sys.stderr)), told


main = as_main(report)

if __name__ == "__main__":
    sys.exit(main())
