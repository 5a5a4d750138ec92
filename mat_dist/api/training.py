"""Train a cohort of peers that learn from each other's adversarial examples and predictions.

  torchrun --nproc_per_node=4 -m mat_dist.train ...   one rank per peer (4 peers)
  python -m mat_dist.train ...                        one process hosts all peers
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mat_dist.api.run import Run
from mat_dist.api.words import path_text, setting_words
from mat_dist.cli import run_entry
from mat_dist.config import (
    Config,
    TrainingOptions,
    config_name,
    config_warnings,
    load_config,
    load_plugins,
    recipe_notes,
)
from mat_dist.distributed.launch import Launch
from mat_dist.distributed.leaving import abort_groups
from mat_dist.distributed.stopping import StopFlag, watching
from mat_dist.runs.starts import Start, recording

if TYPE_CHECKING:
    import torch

    from mat_dist.runs.trackers import Callbacks

Told = Callable[[dict[str, Any]], object]


def main(argv: Sequence[str] | None = None) -> int:
    """The command -> exit code of this rank."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_entry(lambda: command(words))


def command(words: list[str]) -> None:
    """A start, which leaves its end in the folder of its run however far it comes, and hears signals from here on."""
    with recording(words) as start, watching() as stop:
        _start(words, start, stop)


def train(config: str | Path | None = None, *, plugins: Sequence[str | Path] = (), on_step: Told | None = None,
          on_evaluation: Told | None = None, on_checkpoint: Callable[[Path], object] | None = None,
          **settings: Any) -> Run:
    """Train as the command does, in this process or as one rank of torchrun -> the run. Afterwards signal handlers and
    torch's settings are as they were.

    Args:
        config: a YAML file, or the name of one in the project's configs; None: `digits`.
        plugins: Python files that register models, norms, methods or data.
        on_step: called with the record of each log step (`log.every`), as in metrics.jsonl.
        on_evaluation: with the accuracies of each evaluation; its `split` is `val` or `test`.
        on_checkpoint: with the folder of each checkpoint. Callbacks run on rank 0; what they raise ends the run.
        settings: as on the command line: peers=2, attack={"steps": 4}, or **{"attack.steps": 4}.

    Raises MatError: a setting, data, or environment that cannot be used; StopRequested after Ctrl-C, saved.
    """
    words = [*([] if config is None else [f"--config={path_text(config, 'config')}"]),
             *(f"--plugin={path_text(file, 'plugins')}" for file in plugins), *setting_words(settings)]
    callbacks = {"step": on_step, "evaluation": on_evaluation, "checkpoint": on_checkpoint}
    with recording(words) as start, watching(leaving=False) as stop:
        try:
            folder = _start(words, start, stop, callbacks)
        except BaseException:
            if start.launch.world > 1:
                abort_groups()
            raise
    assert folder is not None
    return Run(folder)


@dataclass(frozen=True)
class Wanted:
    """What a command line asks for: settings, the name of their file, plug-ins (SHA-256 by path), lines to tell."""

    config: Config
    name: str
    words: list[str]
    plugins: dict[str, str]
    notes: list[str]
    dry_run: bool


def _start(words: list[str], start: Start, stop: StopFlag, callbacks: Callbacks | None = None) -> Path | None:
    """Settings, then the training -> the folder of the run; None after a dry run."""
    wanted, launch = _wanted(words), start.launch
    start.learn(wanted.config, wanted.name)

    # torch is imported from here on: --help and mistakes in the settings answer at once.
    from mat_dist.core.optim import check_optimizers
    from mat_dist.distributed.groups import choose_device, prepared_torch
    from mat_dist.runs.trackers import require_trackers
    from mat_dist.tools.dryrun import show_run

    require_trackers(wanted.config.log)
    device = choose_device(wanted.config, launch.local_rank)
    with prepared_torch(wanted.config):
        check_optimizers(wanted.config)
        if wanted.dry_run:
            show_run(wanted.config, launch, device, wanted.notes)
            return None
        return _train(wanted, launch, stop, device, callbacks)


def _wanted(words: list[str]) -> Wanted:
    options = TrainingOptions("train", __doc__)
    options.add_argument("--dry-run", action="store_true", help="show what would be run, and stop")
    asked = options.read(words)
    plugins = load_plugins(asked.plugin)
    config = load_config(asked.config, asked.words)
    return Wanted(config, config_name(asked.config, config), words, plugins, recipe_notes(asked.config, config),
                  asked.dry_run)


def _train(wanted: Wanted, launch: Launch, stop: StopFlag, device: torch.device, callbacks: Callbacks | None) -> Path:
    """Ranks, run folder, data, training: in this order."""
    from mat_dist.data import load_data, place
    from mat_dist.distributed.groups import open_mesh
    from mat_dist.evaluation.during_training import Evaluations
    from mat_dist.runs.session import open_run
    from mat_dist.runs.trackers import open_reporter
    from mat_dist.training.trainer import Trainer

    config = wanted.config
    with (open_mesh(len(config.peers), config.comm, device, launch, stop=stop) as mesh,
          open_run(config, mesh, launch, config_name=wanted.name, argv=wanted.words, plugins=wanted.plugins) as run):
        run.notes += [*wanted.notes, *config_warnings(config)]
        data = run.together("data", load_data, config.data, seed=config.run.seed, batch_size=config.train.batch_size,
                            build_cache=launch.local_rank == 0, stop=stop)
        data = run.together("placing the data", place, data, config.data.residency, device, sharing=mesh.sharing)
        reporter = open_reporter(run, config, callbacks)
        Trainer(config, mesh, run, data, stop, Evaluations(config, mesh, run, data, stop, reporter)).fit()
        for line in next_commands(run.folder.path, wanted.plugins):
            reporter.note(line)
        return run.folder.path


def next_commands(folder: Path, plugins: Iterable[str]) -> list[str]:
    """What to do with a finished run."""
    words = shlex.join([str(folder), *(word for path in plugins for word in ("--plugin", path))])
    return [f"next: python -m mat_dist.evaluate {words}", f"      python -m mat_dist.report {words}"]
