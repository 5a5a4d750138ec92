"""The study `search`: settings of the mutual loss on the validation split, by benchmarks/search.yaml."""

from __future__ import annotations

import hashlib
import statistics
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.command import chosen
from benchmarks.study.cost import image_passes
from benchmarks.study.pages import search_page
from benchmarks.study.plan import SearchSuite, Words, read_search
from benchmarks.study.runs import Job, Trained, carry_out, choose_suite, head_document, train, write_results
from benchmarks.study.tables import summary
from mat_dist import checkpoints
from mat_dist.checkpoints.load import EMA, ENSEMBLE, RAW, candidates, validation_file
from mat_dist.errors import NotReportable
from mat_dist.evaluation.results import CLEAN, UNION, read_result

NEVER_TESTED = "eval.test_steps=0"


@dataclass
class Candidate(Trained):
    """A setting of the search. `point` is what it has of its own within its family."""

    family: str = field(kw_only=True)
    point: Words = field(kw_only=True)

    @property
    def cost(self) -> int | None:
        """Forward and backward passes of an image in its training."""
        return image_passes(self.first.config, self.passes) if self.first and self.passes else None

    @property
    def state(self) -> str:
        """`done`, or what keeps it."""
        left = [seed for seed, job in self.jobs.items() if not job.done]
        failed = "; ".join(f"seed {seed}: {text}" for seed, text in self.failures.items())
        return self.error or failed or (f"missing: seeds {', '.join(map(str, left))}" if left else "done")


def main(options: Namespace) -> None:
    """The study, by the options of `__main__.py`.

    Raises ConfigError, StopRequested when the time is over, NotReportable where runs failed.
    """
    study = read_search(str(options.file))
    suite = choose_suite(options, study.suites)
    found = settings_of(suite, options)
    if options.dry_run:
        for one in found:
            print(f"{one.name}: {' '.join(one.point) or '-'}: "
                  f"{one.error or f'{len(one.jobs)} runs, {one.cost} passes of an image each'}")
        return
    families = chosen(options.only, list(suite.families), "family")
    asked = [one for one in found if one.family in families]
    work = [(one, seed, lambda runner, job=one.jobs[seed]: train(job, runner))
            for seed in chosen(options.seeds, suite.seeds, "seed") for one in asked
            if seed in one.jobs and not one.jobs[seed].done]
    carry_out(options, work, lambda: write(options, suite, found))
    failed = [f"{one.name}: {one.state}" for one in asked if one.error or one.failures]
    if failed:
        raise NotReportable(f"{len(failed)} settings failed: {' | '.join(failed[:4])}", "search",
                            "mend that and start the same command again: finished runs are not repeated")


def settings_of(suite: SearchSuite, options: Namespace) -> list[Candidate]:
    """Every setting with its runs. Names come from the settings: a changed file keeps the runs of the others."""
    found = []
    for title, family in suite.families.items():
        common = (f"peers={family.peers or suite.peers}", *suite.settings, *family.settings)
        for point in family.points():
            key = hashlib.sha256("\n".join((*common, *point)).encode()).hexdigest()[:8]
            one = Candidate(f"{title}_{key}", family=title, point=point)
            one.plan(suite, options.root, (*common, *point, *options.words, NEVER_TESTED))
            found.append(one)
    return found


def scores(job: Job, weights: str) -> dict[str, float]:
    """Validation accuracies of the last epoch, under PGD and clean: of the mean over the peers that may be the best one
    (the generalists, where there are some), and of the ensemble."""
    step = checkpoints.load_manifest(job.folder).step
    file = validation_file(job.folder, step)
    if not file.is_file():
        raise NotReportable("no validation after the last epoch", str(file), "set eval.every to 1 or more")
    rows = read_result(file).targets
    kept = (EMA if any(row.weights == EMA for row in rows) else RAW) if weights == "auto" else weights
    found = {row.target: row.accuracy for row in rows if row.weights == kept}
    if not found:
        raise NotReportable(f"the run keeps no {kept} weights", str(file), "set optim.ema_decay, or weights: raw")
    peers = [found[name] for name in candidates(job.config.peers)]
    mean = {key: statistics.fmean(one[column] for one in peers) for key, column in (("mean", UNION), ("clean", CLEAN))}
    return {**mean, "ensemble": found[ENSEMBLE][UNION] if ENSEMBLE in found else mean["mean"]}


def candidate_document(one: Candidate, cheapest: int | None, weights: str) -> dict[str, Any]:
    """A setting: what it is, what it costs and scored."""
    by_seed = {seed: scores(job, weights) for seed, job in one.jobs.items() if job.done}
    return {"name": one.name, "family": one.family, "point": list(one.point), "state": one.state,
            "command": one.first.command if one.first else "", "config_digest": one.first.digest if one.first else "",
            "passes": one.cost, "cost": one.cost / cheapest if one.cost and cheapest else None,
            "scores": {key: summary({seed: {0: values[key]} for seed, values in by_seed.items()})
                       for key in ("mean", "ensemble", "clean")} if by_seed else {}}


def write(options: Namespace, suite: SearchSuite, found: Sequence[Candidate]) -> None:
    """`search_<suite>.json` and `.md`, each whole or as before."""
    cheapest = min((one.cost for one in found if one.cost), default=None)
    tried = [candidate_document(one, cheapest, suite.weights) for one in found]
    tried.sort(key=lambda one: -one["scores"]["mean"]["mean"] if one["scores"] else 1.0)
    runs = [job for one in found for job in one.jobs.values()]
    document = {**head_document(options, suite, found), "peers": suite.peers, "weights": suite.weights,
                "untested": NEVER_TESTED,
                "runs": {"done": sum(job.done for job in runs), "all": len(found) * len(suite.seeds)},
                "families": {name: {"says": family.says,
                                    "settings": [*(f"peers={size}" for size in [family.peers] if size),
                                                 *family.settings],
                                    "tried": sum(one.family == name for one in found),
                                    "done_runs": sum(job.done for one in found if one.family == name
                                                     for job in one.jobs.values())}
                             for name, family in suite.families.items()},
                "settings_tried": tried}
    write_results(options, f"search_{options.suite}", document, search_page(document))
