"""Attack a trained run: each peer and the ensemble, chunk by chunk on all ranks, with soundness checks.

python -m mat_dist.evaluate RUN [--plugin FILE.py] [key=value ...]
torchrun --standalone --nproc_per_node=N -m mat_dist.evaluate RUN [key=value ...]
python -m mat_dist.evaluate FILE.pt model=NAME data.name=NAME mean=M,M,M std=S,S,S threats=NORM:EPS [key=value ...]
python -m mat_dist.evaluate --compare RUN_A RUN_B ...

Results: eval/<id>.json and eval/<id>.csv in the run's folder; a state dict that is not ours gets a run folder first. A
killed evaluation goes on where it was when the same command is started again. Exit code 16: a check failed, the numbers
must not be reported. See docs/evaluation.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mat_dist.cli import as_main
from mat_dist.config import load_config, load_plugins
from mat_dist.config.tree import COMMAND_LINE
from mat_dist.distributed.launch import Launch
from mat_dist.errors import ConfigError
from mat_dist.evaluation.settings import Arguments, find_run, is_file, parse, refuse_unfinished


def evaluate(words: list[str]) -> None:
    """Settings, ranks, then the evaluation or the comparison."""
    arguments = parse(words, __doc__)
    if arguments.compare:
        from mat_dist.evaluation.compare import compare

        compare([find_run(run) for run in arguments.runs])
        return
    run(arguments, words)


def run(arguments: Arguments, words: list[str]) -> None:
    """Evaluate one run, or one file, on the ranks of this launch."""
    importing, request, subject = arguments.importing, arguments.request, arguments.runs[0]
    for word in (subject, *request.sources):
        if is_file(word) and not Path(word).is_file():
            raise ConfigError(f"there is no file {word[:200]!r}", COMMAND_LINE, "give a state dict, or a run's folder")
    load_plugins(arguments.plugins)
    folder = None if importing is not None and importing.subject is not None else find_run(subject)
    if folder is not None:
        refuse_unfinished(folder)
        config = load_config(str(folder.config), arguments.settings)
        new = importing.config(arguments.settings, config, folder.path) if importing is not None else config
    else:
        assert importing is not None
        config = new = importing.config(arguments.settings, threats=bool(request.threats))

    # torch is imported from here on: --help and mistakes in the settings answer at once.
    from mat_dist.distributed.groups import choose_device, open_mesh, prepare_torch
    from mat_dist.distributed.stopping import watching
    from mat_dist.evaluation.command import evaluate_run
    from mat_dist.evaluation.foreign import import_files
    from mat_dist.evaluation.targets import make_job

    launch = Launch.from_environment()
    device = choose_device(config, launch.local_rank)
    prepare_torch(config)
    # Chunks, not peers, are shared: any number of ranks fits.
    with watching() as stop, open_mesh(launch.world, config.comm, device, launch, stop=stop) as mesh:
        if importing is not None:
            files = [word for word in ([subject] if folder is None else []) + list(request.sources) if is_file(word)]
            made = dict(zip(files, import_files(
                [Path(word) for word in files], new, importing, make_job(request, config).threats, request.split, words,
                mesh, launch, stop), strict=True))
            request = request.model_copy(update={"sources": tuple(
                str(made[word].path) if word in made else word for word in request.sources)})
            if folder is None:
                folder = made[subject]
                config = load_config(str(folder.config), arguments.settings)
        assert folder is not None
        evaluate_run(folder, config, request, mesh, launch, stop)


main = as_main(evaluate)

if __name__ == "__main__":
    sys.exit(main())
