"""Look in one process for everything that would stop a run, without starting it; end with the code of the first error.

python -m mat_dist.check [--ranks N] [--nodes M] [--json] [--config FILE] [--plugin FILE.py] [key=value ...]

  --ranks N   ranks of the launch, on all nodes together (default: 1, as python -m mat_dist.train)
  --nodes M   nodes of the launch (default: 1)
  --json      the result as JSON
  --config, --plugin and key=value as for mat_dist.train, see python -m mat_dist.train --help

Looked at: settings, versions, rank count, devices, data and a first batch, each model forward and backward, memory of a
rank, run folder and lock, disk for the checkpoints, port, address and interfaces; with several nodes also whether
run.root is on a file system that they share. Nothing is downloaded, no cache is built, nothing stays behind. Run it on
a node of the kind that will train; with several nodes on each of them (srun --ntasks-per-node=1).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mat_dist.cli import run_entry
from mat_dist.config import Arguments, config_name, config_warnings, load_config, load_plugins, parse_command_line
from mat_dist.config.schema import Config
from mat_dist.config.words import split, whole_number
from mat_dist.distributed.endpoint import Endpoint
from mat_dist.distributed.launch import Launch
from mat_dist.errors import ConfigError, EnvironmentFault
from mat_dist.tools.check import network, versions
from mat_dist.tools.check.findings import Answer, Report


def main(argv: Sequence[str] | None = None) -> int:
    """The command -> exit code of architecture.md."""
    words = list(sys.argv[1:] if argv is None else argv)
    report = Report()
    return run_entry(lambda: check(words, report)) or report.code


@dataclass(frozen=True)
class Options:
    """What this command alone understands."""

    ranks: int = 1
    nodes: int = 1
    json: bool = False


def check(words: list[str], report: Report) -> None:
    """All checks, in the order in which their errors decide; then what they found."""
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return
    options, rest = split_options(words)
    arguments = parse_command_line(rest, prog="python -m mat_dist.check", description="")
    if arguments.dry_run:
        raise ConfigError("--dry-run with mat_dist.tools.check", "command line", "leave it out: a check starts nothing")
    if Launch.from_environment().world > 1:
        raise EnvironmentFault("mat_dist.tools.check was started as one of several ranks", "torchrun",
                               "start it as one process: python -m mat_dist.check --ranks N")
    config = report.ask("config", _load, arguments)
    torch_works = report.ask("versions", versions.check_versions)
    if torch_works:
        from mat_dist.tools.check import run  # imports torch

        run.check_run(report, config, options.ranks, options.nodes, config_name(arguments.config_path))
        if config is not None and (config.log.tensorboard or config.log.wandb is not None):
            report.ask("trackers", _trackers, config)
    endpoint = report.ask("environment", _endpoint)
    report.ask("port", network.check_port, endpoint, options.ranks)
    report.ask("address", network.check_address, endpoint, options.nodes)
    report.ask("interfaces", network.check_interfaces, endpoint, options.nodes)
    if options.json:
        print(report.as_json())
    else:
        report.show()
    report.complain()


def split_options(words: Sequence[str]) -> tuple[Options, list[str]]:
    """This command's own options, and the other words. Raises ConfigError for a number that is none."""
    found = split(words, {"--ranks": "N", "--nodes": "M"}, ("--json",))
    found.complain()
    ranks, nodes = (whole_number(option, found.last(option) or "1") for option in ("--ranks", "--nodes"))
    return Options(ranks, nodes, bool(found.flags)), list(found.rest)


def _load(arguments: Arguments) -> Answer[Config]:
    plugins = load_plugins(arguments.plugins)
    config = load_config(arguments.config_path, arguments.overrides)
    name = arguments.config_path or config_name(None)
    found = f"{name}: {len(config.peers)} peers, data {config.data.name}, batch {config.train.batch_size}"
    if plugins:
        found += f", plug-ins {', '.join(plugins)}"
    return Answer(config, found, "; ".join(config_warnings(config)))


def _trackers(config: Config) -> Answer[None]:
    from mat_dist.runs.trackers import require_trackers  # imports torch

    require_trackers(config.log)
    asked = ["TensorBoard"] * config.log.tensorboard + ["W&B"] * (config.log.wandb is not None)
    return Answer(None, f"{' and '.join(asked)} can be imported")


def _endpoint() -> Answer[Endpoint]:
    endpoint = Endpoint.from_environment()
    where = f"{endpoint.address or 'this node'}, port {endpoint.port}"
    return Answer(endpoint, f"ranks meet at {where}" + ("" if endpoint.given else " (torchrun's default)"))


if __name__ == "__main__":
    sys.exit(main())
