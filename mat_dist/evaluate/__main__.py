"""Attack a trained run: each peer and the ensemble, chunk by chunk on all ranks, with soundness checks.

python -m mat_dist.evaluate RUN [--plugin FILE.py] [key=value ...]
torchrun --standalone --nproc_per_node=N -m mat_dist.evaluate RUN [key=value ...]
python -m mat_dist.evaluate --compare RUN_A RUN_B ...

Results: eval/<id>.json and eval/<id>.csv in the run's folder. A killed evaluation goes on where it was when the same
command is started again. Exit code 16: a check failed, the numbers must not be reported. See docs/evaluation.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mat_dist.config import load_config, load_plugins
from mat_dist.entry import run_entry
from mat_dist.errors import ConfigError, OutputError
from mat_dist.evaluate.menu import MENU
from mat_dist.evaluate.request import FREE_SETTINGS, Arguments, Request, parse
from mat_dist.mesh.launch import Launch
from mat_dist.runfolder import RunFolder, RunLock


def main(argv: Sequence[str] | None = None) -> int:
    """The command -> exit code of this rank."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_entry(lambda: evaluate(words))


def evaluate(words: Sequence[str]) -> None:
    """Settings, ranks, then the evaluation or the comparison."""
    if not words or any(word in ("-h", "--help") for word in words):
        print(help_text())
        return
    arguments = parse(words)
    folders = [find_run(run) for run in arguments.runs]
    if arguments.compare:
        from mat_dist.evaluate.compare import compare

        compare(folders)
        return
    run(folders[0], arguments)


def run(folder: RunFolder, arguments: Arguments) -> None:
    """Evaluate one run on the ranks of this launch."""
    holder = RunLock(folder, None).held_by()
    if holder is not None:
        raise OutputError(f"the run is still being written by {holder}", str(folder.path), "wait until it ends")
    config = load_config(str(folder.config), arguments.settings)
    load_plugins(arguments.plugins)

    # torch is imported from here on: --help and mistakes in the settings answer at once.
    from mat_dist.device import choose_device, prepare_torch
    from mat_dist.evaluate.evaluation import evaluate_run
    from mat_dist.mesh.mesh import open_mesh
    from mat_dist.stopping import watching

    launch = Launch.from_environment()
    device = choose_device(config, local_rank=launch.local_rank, local_world=launch.local_world)
    prepare_torch(config)
    # Chunks, not peers, are shared: any number of ranks fits.
    with watching() as stop, open_mesh(launch.world, config.comm, device, launch, stop=stop) as mesh:
        evaluate_run(folder, config, arguments.request, mesh, launch, stop)


def find_run(word: str) -> RunFolder:
    """The folder of a run. Raises ConfigError where it is none."""
    folder = RunFolder(Path(word))
    if not folder.path.is_dir():
        raise ConfigError(f"there is no run folder {word[:200]!r}", "command line",
                          "give the folder of a run, e.g. runs/NAME")
    if not folder.config.is_file():
        raise ConfigError(f"{word[:200]!r} is not the folder of a run: it has no config.yaml", "command line",
                          "give the folder of a run, e.g. runs/NAME")
    return folder


def help_text() -> str:
    """The docstring, then every setting with its default and meaning, and every attack."""
    lines = [__doc__ or "", "Settings: key=default, meaning"]
    for name, field in Request.model_fields.items():
        default = field.default
        shown = ",".join(default) if isinstance(default, tuple) else "" if default is None else str(default).lower()
        lines.append(f"  {f'{name}={shown}':<30} {field.description}")
    lines.append(f"  Settings of the run that may change: {', '.join(FREE_SETTINGS)}")
    return "\n".join([*lines, "Attacks:", *(f"  {name:<12} {kind.meaning}" for name, kind in MENU.items())])


if __name__ == "__main__":
    sys.exit(main())
