"""Measure a training step on made-up images.

python -m mat_dist.bench step [options] [--config FILE] [key=value ...]     its parts, its limit, what the guards cost
python -m mat_dist.bench naive [options] [--config FILE] [key=value ...]    against benchmarks/naive.py and careful.py
python -m mat_dist.bench scale [options] [--config FILE] [key=value ...]    against batch, image size, attack steps
python -m mat_dist.bench memory [options] [--config FILE] [key=value ...]   peak memory against benchmarks/naive.py
torchrun --nproc_per_node=2 -m mat_dist.bench step peers=2                  the same on several ranks
python -m mat_dist.bench evidence --help                                    what mutual training is worth: all rows
python -m mat_dist.bench search --help                                      settings of the mutual loss, on validation
python -m mat_dist.bench reasons RUN                                        what a run's peers do with each other's AEs

  --rounds N          timed rounds (default 15; all contestants take turns in each)
  --image CxHxW       shape of the images (default 3x32x32)
  --classes K         classes (default 10)
  --json FILE         also write all figures as JSON
  --config, --plugin and key=value as for mat_dist.train; without --config: bench_small, the small CNN with 4 peers

CPU times are of all threads; compare machines with one thread per rank (run.threads=1, the default).
"""

from __future__ import annotations

import importlib
import json
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mat_dist.cli import run_entry
from mat_dist.config import TrainingOptions, count, load_config, load_plugins
from mat_dist.config.schema import Config
from mat_dist.distributed.launch import Launch
from mat_dist.errors import ConfigError, EnvironmentFault
from mat_dist.runs.files import write_text

COMMANDS = ("step", "naive", "scale", "memory")
STUDIES = ("evidence", "search", "reasons")  # of trained runs, in one process; with options of their own
DEFAULT_CONFIG = "bench_small"


def main(argv: Sequence[str] | None = None) -> int:
    """The command -> exit code of architecture.md."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_entry(lambda: bench(words))


def bench(words: list[str]) -> None:
    """Settings, ranks, measurement, table."""
    if words and words[0] in STUDIES:
        study(words[0], words[1:])
        return
    if not words or any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return
    options = read_options(words)
    load_plugins(options.plugin)
    config = load_config(options.config or DEFAULT_CONFIG, options.words)

    from mat_dist.distributed.device import choose_device, device_name, prepare_torch
    from mat_dist.distributed.groups import open_mesh
    from mat_dist.distributed.stopping import watching
    from mat_dist.runs.environment import git_revision, versions

    launch = Launch.from_environment()
    device = choose_device(config, local_rank=launch.local_rank, local_world=launch.local_world)
    prepare_torch(config)
    with watching() as stop, open_mesh(len(config.peers), config.comm, device, launch, stop=stop) as mesh:
        figures = measure(options, config, mesh)
    if not launch.speaks_for():
        return
    result = {"command": options.command, "what": describe(config, launch, device_name(device), options.image),
              "device": device_name(device), "versions": versions(), "git": git_revision(), "ranks": launch.world,
              "arguments": [options.command, "--rounds", str(options.rounds), *words[1:]], "figures": figures}
    from mat_dist.bench.show import print_result

    print_result(result)
    if options.json:
        write_text(Path(options.json), json.dumps(result, indent=1) + "\n")


def study(command: str, words: list[str]) -> None:
    """One of STUDIES."""
    module = importlib.import_module(f"mat_dist.bench.{command}")
    if any(word in ("-h", "--help") for word in words):
        print(module.__doc__)
    elif Launch.from_environment().world > 1:
        raise EnvironmentFault("several ranks", f"bench {command}", "start it without torchrun: it starts its own runs")
    else:
        module.main(words)


def measure(options: Namespace, config: Config, mesh: Any) -> dict[str, Any]:
    """The figures of the command."""
    from mat_dist.bench.memory import measure_memory
    from mat_dist.bench.parts import measure_step
    from mat_dist.bench.references import measure_against_references
    from mat_dist.bench.scale import measure_scale
    from mat_dist.bench.subject import Subject

    if options.command == "scale":
        return measure_scale(config, mesh, options.image, options.classes, options.rounds)
    if options.command == "memory":
        if mesh.placement.world > 1:
            raise EnvironmentFault("each contestant has a process of its own", "bench memory",
                                   "start it without torchrun")
        return measure_memory(config, options.image, options.classes, mesh.device)
    subject = Subject.make(config, mesh, options.image, options.classes)
    measured = measure_step if options.command == "step" else measure_against_references
    figures = measured(subject, options.rounds)
    return {**figures, "notes": subject.notes()}


def describe(config: Config, launch: Launch, device: str, image: tuple[int, int, int]) -> str:
    """What was measured, in one line."""
    shape = "x".join(map(str, image))
    models = ", ".join(sorted({peer.model.name for peer in config.peers}))
    return (f"{models}, {shape}, batch {config.train.batch_size}, {_count(len(config.peers), 'peer')} on "
            f"{_count(launch.world, 'rank')}, {config.peers[0].attack.steps} attack steps, "
            f"{config.step.precision}, {device}")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def read_options(words: Sequence[str]) -> Namespace:
    """The command and its options. Raises ConfigError for what cannot be understood."""
    if words[0] not in COMMANDS:
        raise ConfigError(f"unknown benchmark {words[0]!r}", "command line",
                          f"use one of {', '.join((*COMMANDS, *STUDIES))}")
    options = TrainingOptions("bench", __doc__)
    options.add_argument("--rounds", metavar="N", type=count, default=15)
    options.add_argument("--image", metavar="CxHxW", type=_shape, default=(3, 32, 32))
    options.add_argument("--classes", metavar="K", type=count, default=10)
    options.add_argument("--json", metavar="FILE")
    found = options.read(words[1:])
    found.command = words[0]
    return found


def _shape(value: str) -> tuple[int, int, int]:
    try:
        channels, height, width = (count(part) for part in value.split("x"))
    except (ArgumentTypeError, ValueError):
        raise ArgumentTypeError(f"{value[:40]!r} is not three whole numbers such as 3x32x32") from None
    return channels, height, width


if __name__ == "__main__":
    sys.exit(main())
