"""What an exported model tells of itself, for the templates of its card and of RobustBench's list."""

from __future__ import annotations

from typing import Any

from mat_dist.checkpoints.load import ENSEMBLE, FinishedRun
from mat_dist.evaluation.results import accuracies, read_results, wilson_interval
from mat_dist.evaluation.targets import threats_of
from mat_dist.runs.console import counted
from mat_dist.runs.record import read_environment
from mat_dist.tools.dryrun import training_passes


def filled(template: str, values: dict[str, Any]) -> str:
    """The text of a template of this folder."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(loader=PackageLoader("mat_dist.tools"), undefined=StrictUndefined, trim_blocks=True,
                       lstrip_blocks=True, keep_trailing_newline=True)
    made.filters["counted"] = counted
    return made.get_template(f"{template}.j2").render(values, accuracies=accuracies, wilson=wilson_interval)


def facts(opened: FinishedRun, target: str) -> dict[str, Any]:
    """What the templates show of a peer or the ensemble; `results` are the evaluations of this checkpoint, the newest
    last. Raises NotReportable for a damaged result file."""
    config, step = opened.config, opened.manifest.step
    rule = config.eval.ensemble if target == ENSEMBLE else None
    peers = [spec for spec in config.peers if (spec.name == target if rule is None else not spec.frozen)]
    digests = {file.name: file.sha256 for file in opened.manifest.files}
    results = {(result.split, one.n, *result.named_attacks(), *one.accuracy.items()): (result, one)  # best may be last
               for result in read_results(opened.folder.eval, "*") for one in result.targets
               if result.step == step and result.files in ({}, digests)
               and one.target in (target, f"{ENSEMBLE}:{rule}") and one.weights == opened.weights}
    return {"config": config, "peers": peers, "threats": threats_of(peers), "images": opened.images, "target": target,
            "rule": rule, "step": step, "weights_kind": opened.weights, "results": list(results.values()),
            "run": opened.folder.path.resolve().name, "cost": training_passes(config, step) or (0, 0, 0),
            "made": read_environment(opened.folder) or {}, "imported": "imported" in opened.manifest.meta.extra}
