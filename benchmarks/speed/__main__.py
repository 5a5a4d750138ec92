"""Measure a training step on made-up images, from the repository's root.

python -m benchmarks.speed step [options] [key=value ...]      its parts, its limit, what the guards cost
python -m benchmarks.speed naive [options] [key=value ...]     against the plain trainers of speed/references.py
python -m benchmarks.speed scale [options] [key=value ...]     against batch, image size, attack steps
python -m benchmarks.speed memory [options] [key=value ...]    peak memory against the naive trainer
python -m benchmarks.speed engines [options] [key=value ...]   eager, captured, compiled; kernels by class
python -m benchmarks.speed summary FOLDER                      one table of the JSON files of a folder
torchrun --nproc_per_node=2 -m benchmarks.speed step peers=2   the same on several ranks

CPU times are of all threads; compare machines with one thread per rank (run.threads=1, the default). Ctrl-C ends a
measurement: the figures are then those of the rounds until there. A command with --help lists its options.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command import Command, Watch, read_command
from mat_dist.cli import run_entry, tell
from mat_dist.config import load_config, load_plugins
from mat_dist.config.help import count
from mat_dist.config.schema import Config
from mat_dist.config.tree import COMMAND_LINE
from mat_dist.distributed.launch import Launch
from mat_dist.errors import ConfigError
from mat_dist.runs.files import write_text
from mat_dist.screens import arrived

COMMANDS = {"step": ("Parts of a step, its limit, what the guards cost", 15),  # what, rounds
            "naive": ("The step against a naive and a careful trainer", 3),
            "scale": ("A cost model over batch, image size and attack steps", 15),
            "memory": ("Peak memory against the naive trainer", 1),
            "engines": ("The step under each engine, and what a GPU does meanwhile", 20)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command -> exit code of architecture.md."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_entry(lambda: run(words))


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """The options; all words that are none are `words`. Raises ConfigError."""
    commands = {"summary": Command("speed summary", "One table of the JSON files of a folder.", "FOLDER")}
    for name, (what, rounds) in COMMANDS.items():
        commands[name] = one = Command(f"speed {name}", f"{what}. key=value: as for mat_dist.train.")
        one.add_argument("--rounds", type=count, default=rounds, metavar="N",
                         help="timed rounds, in each of which all contestants take turns (default %(default)s)")
        one.add_argument("--image", type=_shape, default=(3, 32, 32), metavar="CxHxW",
                         help="shape of the images (default 3x32x32)")
        one.add_argument("--classes", type=count, default=10, metavar="K", help="classes (default %(default)s)")
        one.add_argument("--json", type=Path, metavar="FILE", help="also write all figures as JSON")
        one.add_argument("--config", default="bench_small", metavar="FILE",
                         help="settings (default %(default)s: the small CNN with 4 peers)")
        one.add_plugin()
    return read_command(words, commands, __doc__)


def _shape(text: str) -> tuple[int, int, int]:
    """CxHxW."""
    try:
        channels, height, width = map(count, text.split("x"))
    except (argparse.ArgumentTypeError, ValueError):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not three whole numbers such as 3x32x32") from None
    return channels, height, width


def run(words: list[str]) -> None:
    """Settings, ranks, measurement, table. Raises MatError."""
    options = read_options(words)
    if options.command == "summary":
        from benchmarks.speed.tables import print_summary

        if len(options.words) != 1:
            raise ConfigError(f"{len(options.words)} folders", COMMAND_LINE, "write the folder of benchmarks/gpu.sh")
        print_summary(Path(options.words[0]))
        return
    load_plugins(options.plugin)
    config = load_config(options.config, options.words)

    from benchmarks.speed.tables import print_result
    from mat_dist.distributed.groups import choose_device, device_name, open_mesh, prepare_torch
    from mat_dist.distributed.stopping import watching
    from mat_dist.runs.record import git_revision, versions

    launch = Launch.from_environment()
    device = choose_device(config, launch.local_rank)
    prepare_torch(config)
    what = describe(config, options, launch, device_name(device))
    with watching() as stop, open_mesh(len(config.peers), config.comm, device, launch, stop=stop) as mesh:
        watch = Watch(stop, tell if launch.speaks_for() else None)
        watch.say(f"{options.command}: {what}")
        figures = measure(options, config, mesh, watch)
        if any(mesh.gather_json(watch.stopped)):
            figures["notes"] = [*figures.get("notes", []), "stopped by a signal: what was measured until then"]
    if not launch.speaks_for():
        return
    result = {"command": options.command, "what": what, "device": device_name(device), "versions": versions(),
              "git": git_revision(), "ranks": launch.world, "arguments": [
                  options.command, "--config", options.config, "--rounds", str(options.rounds), *options.words],
              "figures": figures}
    print_result(result)
    if options.json:
        write_text(options.json, json.dumps(result, indent=1) + "\n")
    else:
        arrived()


def measure(options: argparse.Namespace, config: Config, mesh: Any, watch: Watch) -> dict[str, Any]:
    """The figures of the command."""
    from benchmarks.speed.engines import measure_engines
    from benchmarks.speed.measures import measure_against_references, measure_memory, measure_step
    from benchmarks.speed.scale import measure_scale
    from benchmarks.speed.subject import Subject

    if options.command == "scale":
        return measure_scale(config, mesh, options.image, options.classes, options.rounds, watch)
    if options.command == "memory":
        return measure_memory(config, options.image, options.classes, mesh, watch)
    if options.command == "engines":
        return measure_engines(config, mesh, options.image, options.classes, options.rounds, watch)
    subject = Subject.make(config, mesh, options.image, options.classes)
    measured = measure_step if options.command == "step" else measure_against_references
    figures = measured(subject, options.rounds, watch)
    return {**figures, "notes": subject.notes()}


def describe(config: Config, options: argparse.Namespace, launch: Launch, device: str) -> str:
    """What is measured, in one line."""
    def number(of: int, noun: str) -> str:
        return f"{of} {noun}{'' if of == 1 else 's'}"

    models = ", ".join(sorted({peer.model.name for peer in config.peers}))
    return (f"{models}, {'x'.join(map(str, options.image))}, batch {config.train.batch_size}, "
            f"{number(len(config.peers), 'peer')} on {number(launch.world, 'rank')}, "
            f"{config.peers[0].attack.steps} attack steps, {config.step.precision}, {device}")


if __name__ == "__main__":
    sys.exit(main())
