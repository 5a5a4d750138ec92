"""Train a cohort of peers that learn from each other's adversarial examples and predictions.

  torchrun --nproc_per_node=4 -m mat_dist.train ...   one rank per peer (4 peers)
  python -m mat_dist.train ...                        one process hosts all peers
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from mat_dist.cli import run_entry
from mat_dist.config import TrainingOptions, config_name, config_warnings, load_config, load_plugins, recipe_notes
from mat_dist.distributed.stopping import StopFlag, watching
from mat_dist.runs.starts import Start, recording


def main(argv: Sequence[str] | None = None) -> int:
    """The command -> exit code of this rank."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_entry(lambda: train(words))


def train(words: list[str]) -> None:
    """A start, which leaves its end in the folder of its run however far it comes, and hears signals from here on."""
    with recording(words) as start, watching() as stop:
        _train(words, start, stop)


def _train(words: list[str], start: Start, stop: StopFlag) -> None:
    """Plug-ins, settings, ranks, run folder, data, training: in this order."""
    options = TrainingOptions("train", __doc__)
    options.add_argument("--dry-run", action="store_true", help="show what would be run, and stop")
    asked = options.read(words)
    plugins = load_plugins(asked.plugin)
    config, launch = load_config(asked.config, asked.words), start.launch
    name = config_name(asked.config, config)
    start.learn(config, name)

    # torch is imported from here on: --help and mistakes in the settings answer at once.
    from mat_dist.core.optim import check_optimizers
    from mat_dist.core.trainer import Trainer
    from mat_dist.data import load_data, place
    from mat_dist.distributed.groups import choose_device, open_mesh, prepare_torch, ranks_per_device
    from mat_dist.evaluation.during_training import Evaluations
    from mat_dist.runs.session import open_run
    from mat_dist.runs.trackers import open_reporter, require_trackers
    from mat_dist.tools.dryrun import show_run

    require_trackers(config.log)
    device = choose_device(config, local_rank=launch.local_rank, local_world=launch.local_world)
    prepare_torch(config)
    check_optimizers(config)
    if asked.dry_run:
        return show_run(config, launch, device, recipe_notes(asked.config, config))
    with (open_mesh(len(config.peers), config.comm, device, launch, stop=stop) as mesh,
          open_run(config, mesh, launch, config_name=name, argv=words, plugins=plugins) as run):
        run.notes += [*recipe_notes(asked.config, config), *config_warnings(config)]
        data = run.together("data", load_data, config.data, seed=config.run.seed, batch_size=config.train.batch_size,
                            build_cache=launch.local_rank == 0, stop=stop)
        data = run.together("placing the data", place, data, config.data.residency, device,
                            sharing=ranks_per_device(device, launch.local_world))
        reporter = open_reporter(run, config)
        Trainer(config, mesh, run, data, stop, Evaluations(config, mesh, run, data, stop, reporter)).fit()
        for line in next_commands(run.folder.path, plugins):
            reporter.note(line)


def next_commands(folder: Path, plugins: Iterable[str]) -> list[str]:
    """What to do with a finished run."""
    words = shlex.join([str(folder), *(word for path in plugins for word in ("--plugin", path))])
    return [f"next: python -m mat_dist.evaluate {words}", f"      python -m mat_dist.report {words}"]


if __name__ == "__main__":
    sys.exit(main())
