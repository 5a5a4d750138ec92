"""Train a cohort of peers that learn from each other's adversarial examples and predictions.

  torchrun --nproc_per_node=4 -m mat_dist.train ...   one rank per peer (4 peers)
  python -m mat_dist.train ...                        one process hosts all peers
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mat_dist.cli import as_main
from mat_dist.config import TrainingOptions, config_name, config_warnings, load_config, load_plugins, recipe_notes
from mat_dist.config.load import of_a_call, setting_words
from mat_dist.distributed.leaving import abort_groups
from mat_dist.distributed.stopping import StopFlag, watching
from mat_dist.runs.record import Start, recording

if TYPE_CHECKING:
    from mat_dist.api.run import Run
    from mat_dist.runs.metrics import Callbacks

Told = Callable[[dict[str, Any]], object]


def command(words: list[str]) -> None:
    """A start, which leaves its end in the folder of its run however far it comes, and hears signals from here on."""
    with recording(words) as start, watching() as stop:
        _start(words, start, stop)


main = as_main(command)


def train(config: str | Path | None = None, *, plugins: Sequence[str | Path] = (), on_step: Told | None = None,
          on_evaluation: Told | None = None, on_checkpoint: Callable[[Path], object] | None = None,
          **settings: Any) -> Run:
    """Train as the command does, in this process or as one rank of torchrun -> the run. Afterwards signal handlers and
    torch's settings are as they were.

    Args:
        config: a YAML file, or the name of one in the project's configs; None: `digits`.
        plugins: Python files that register models, norms, methods or data.
        on_step, on_evaluation, on_checkpoint: called on rank 0 with the record of each log step (`log.every`) and each
            evaluation (`split` is `val` or `test`), and the folder of each checkpoint; what they raise ends the run.
        settings: as on the command line: peers=2, attack={"steps": 4}, or **{"attack.steps": 4}.

    Raises MatError; StopRequested after Ctrl-C, saved.
    """
    files = [plugins] if isinstance(plugins, str) else plugins
    words = [*([] if config is None else [f"--config={config}"]), *(f"--plugin={file}" for file in files),
             *setting_words(settings)]
    callbacks = {"step": on_step, "evaluation": on_evaluation, "checkpoint": on_checkpoint}
    with of_a_call(), recording(words) as start, watching(leaving=False) as stop:
        try:
            folder = _start(words, start, stop, callbacks)
        except BaseException:
            if start.launch.world > 1:
                abort_groups()
            raise
    from mat_dist.api.run import Run  # the command does not wait for it

    assert folder is not None
    return Run(folder)


def _start(words: list[str], start: Start, stop: StopFlag, callbacks: Callbacks | None = None) -> Path | None:
    """Plug-ins, settings, ranks, run folder, data, training: in this order -> the folder; None after a dry run."""
    options = TrainingOptions("train", __doc__)
    options.add_argument("--dry-run", action="store_true", help="show what would be run, and stop")
    asked = options.read(words)
    plugins = load_plugins(asked.plugin)
    config, launch = load_config(asked.config, asked.words), start.launch
    name, notes = config_name(asked.config, config), recipe_notes(asked.config, config)
    start.learn(config, name)

    # torch is imported from here on: --help and mistakes in the settings answer at once.
    from mat_dist.core.optim import check_optimizers
    from mat_dist.data import load_data, place
    from mat_dist.distributed.groups import choose_device, open_mesh, prepared_torch
    from mat_dist.evaluation.during_training import Evaluations
    from mat_dist.runs.session import open_run
    from mat_dist.runs.trackers import open_reporter, require_trackers
    from mat_dist.tools.dryrun import show_run
    from mat_dist.training.trainer import Trainer

    require_trackers(config.log)
    device = choose_device(config, launch.local_rank)
    check_optimizers(config)
    if asked.dry_run:
        with prepared_torch(config):
            show_run(config, launch, device, notes)
        return None
    with (prepared_torch(config), open_mesh(len(config.peers), config.comm, device, launch, stop=stop) as mesh,
          open_run(config, mesh, launch, config_name=name, argv=words, plugins=plugins) as run):
        run.notes += [*notes, *config_warnings(config)]
        data = run.together("data", load_data, config.data, seed=config.run.seed, batch_size=config.train.batch_size,
                            build_cache=launch.local_rank == 0, stop=stop)
        data = run.together("placing the data", place, data, config.data.residency, device, sharing=mesh.sharing)
        reporter = open_reporter(run, config, callbacks)
        Trainer(config, mesh, run, data, stop, Evaluations(config, mesh, run, data, stop, reporter)).fit()
        text = shlex.join([str(run.folder.path), *(word for path in plugins for word in ("--plugin", path))])
        reporter.note(f"next: python -m mat_dist.evaluate {text}")
        reporter.note(f"      python -m mat_dist.report {text}")
        return run.folder.path
