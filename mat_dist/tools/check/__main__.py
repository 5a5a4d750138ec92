"""Look in one process for everything that would stop a run, without starting it; end with the code of the first error.

Looked at: settings, versions, rank count, devices, data and a first batch, each model forward and backward, memory of a
rank, run folder and lock, disk for the checkpoints, port, address and interfaces; with several nodes also whether
run.root is on a file system that they share. Nothing is downloaded, no cache is built, nothing stays behind. Run it on
a node of the kind that will train; with several nodes on each of them (srun --ntasks-per-node=1).
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from mat_dist.cli import run_entry
from mat_dist.config import (
    TrainingOptions,
    config_name,
    config_warnings,
    count,
    load_config,
    load_plugins,
    recipe_notes,
)
from mat_dist.config.schema import Config, parse_trackers
from mat_dist.distributed.launch import Endpoint, Launch
from mat_dist.errors import EnvironmentFault, error_line
from mat_dist.screens import arrived
from mat_dist.tools.check import Answer, Report, machine


def main(argv: Sequence[str] | None = None) -> int:
    """The command -> exit code of architecture.md."""
    words = list(sys.argv[1:] if argv is None else argv)
    report = Report()
    return run_entry(lambda: check(words, report)) or report.code


def check(words: list[str], report: Report) -> None:
    """All checks, in the order in which their errors decide; then what they found."""
    parser = TrainingOptions("check", __doc__)
    parser.add_argument("--ranks", metavar="N", type=count, default=1,
                        help="ranks of the launch, on all nodes together (1)")
    parser.add_argument("--nodes", metavar="M", type=count, default=1, help="nodes of the launch (1)")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    options = parser.read(words)
    if Launch.from_environment().world > 1:
        raise EnvironmentFault("mat_dist.check was started as one of several ranks", "torchrun",
                               "start it as one process: python -m mat_dist.check --ranks N")
    config = report.ask("config", _load, options)
    torch_works = report.ask("versions", machine.check_versions)
    if torch_works:
        from mat_dist.tools.check import run  # imports torch

        run.check_run(report, config, options.ranks, options.nodes, config_name(options.config, config))
        if config is not None and config.log.trackers is not None:
            report.ask("trackers", _trackers, config)
    endpoint = report.ask("environment", _endpoint)
    report.ask("port", machine.check_port, endpoint, options.ranks)
    report.ask("address", machine.check_address, endpoint, options.nodes)
    report.ask("interfaces", machine.check_interfaces, endpoint, options.nodes)
    if options.json:
        print(report.as_json())
    else:
        report.show()
    if report.errors:
        print(error_line(report.errors[0]), file=sys.stderr)
    else:
        arrived()


def _load(options: Namespace) -> Answer[Config]:
    plugins = load_plugins(options.plugin)
    config = load_config(options.config, options.words)
    name = options.config or config_name(None)
    found = f"{name}: {len(config.peers)} peers, data {config.data.name}, batch {config.train.batch_size}"
    if plugins:
        found += f", plug-ins {', '.join(plugins)}"
    return Answer(config, found, "; ".join([*recipe_notes(options.config, config), *config_warnings(config)]))


def _trackers(config: Config) -> Answer[None]:
    from mat_dist.runs.trackers import require_trackers  # imports torch

    require_trackers(config.log)
    return Answer(None, f"{' and '.join(parse_trackers(config.log.trackers))} can be imported")


def _endpoint() -> Answer[Endpoint]:
    endpoint = Endpoint.from_environment()
    where = f"{endpoint.address or 'this node'}, port {endpoint.port}"
    return Answer(endpoint, f"ranks meet at {where}" + ("" if endpoint.given else " (torchrun's default)"))


if __name__ == "__main__":
    sys.exit(main())
