"""Search settings of the mutual loss on the validation split, by benchmarks/search.yaml, and write its table.

python -m mat_dist.bench search --suite cpu data.root=FOLDER [key=value ...]

  --suite NAME        suite of the file (default cpu)
  --only FAMILY,...   these families alone (the table keeps what others have)
  --seeds 0,1         these seeds alone
  --jobs N            so many runs at a time (default 1), each on one thread; on a GPU all share it
  --budget SECONDS    after these, save and stop with exit code 75; the same command goes on
  --root FOLDER       folder of the runs (default runs/search_<suite>)
  --space FILE        another space (default benchmarks/search.yaml)
  --out FOLDER        folder of search_<suite>.json and search_<suite>.md (default benchmarks/results)
  --dry-run           print the settings and their passes
  key=value           settings of every run, laid over those of the space

The test set is never attacked. Finished runs are not repeated; the table is written after every run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from mat_dist import checkpoints
from mat_dist.bench.evidence import file_digest, hidden
from mat_dist.bench.study.jobs import run_all
from mat_dist.bench.study.options import Options, chosen
from mat_dist.bench.study.pages import search_page
from mat_dist.bench.study.plan import SearchSuite, Words, read_search
from mat_dist.bench.study.runs import Enough, Job, Runner, machines, train
from mat_dist.bench.study.tables import summary
from mat_dist.checkpoints.load import EMA, ENSEMBLE, RAW
from mat_dist.cli import tell
from mat_dist.distributed.stopping import watching
from mat_dist.errors import ConfigError, MatError, NotReportable, StopRequested
from mat_dist.runs.environment import git_revision
from mat_dist.runs.files import parse_json, reported, write_json, write_text
from mat_dist.tools.dryrun import training_passes

SPACE = "benchmarks/search.yaml"
NEVER_TESTED = "eval.test=false"


@dataclass
class Candidate:
    """A setting of the search.

    Attributes:
        point: what it has of its own within its family.
        jobs: by seed; empty where this version refuses it, which `error` explains.
        failures: seed -> why it failed.
    """

    family: str
    name: str
    point: Words
    jobs: dict[int, Job] = field(default_factory=dict)
    error: str = ""
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def passes(self) -> int | None:
        """Forward and backward passes of its training."""
        first = next(iter(self.jobs.values()), None)
        steps = next((checkpoints.load_manifest(job.folder).step for job in self.jobs.values() if job.done), None)
        found = training_passes(first.config, steps) if first is not None else None
        return found[1] + found[2] if found else None

    @property
    def state(self) -> str:
        """`done`, or what keeps it."""
        left = [seed for seed, job in self.jobs.items() if not job.done]
        failed = "; ".join(f"seed {seed}: {text}" for seed, text in self.failures.items())
        return self.error or failed or (f"missing: seeds {', '.join(map(str, left))}" if left else "done")


def main(words: Sequence[str]) -> None:
    """The command. Raises ConfigError, StopRequested when the time is over, NotReportable where runs failed."""
    options = Options.read(words, "search", SPACE)
    study = read_search(options.file)
    suite = study.suites[chosen([options.suite], list(study.suites), "suite")[0]]
    found = candidates(suite, options)
    if options.dry_run:
        for one in found:
            print(f"{one.name}: {' '.join(one.point) or '-'}: "
                  f"{one.error or f'{len(one.jobs)} runs, {one.passes} passes of a batch each'}")
        return
    wanted = set(chosen(options.only, list(suite.families), "family"))
    seeds = [int(seed) for seed in chosen([str(s) for s in options.seeds], [str(s) for s in suite.seeds], "seed")]
    with watching() as stop:
        runner = Runner(stop, options.budget, tell)
        try:
            execute([one for one in found if one.family in wanted], seeds, options.jobs, runner,
                    lambda: write(options, suite, found))
        except Enough:
            left = sum(not job.done for one in found for job in one.jobs.values())
            raise StopRequested(f"the time is over or a signal came; {left} runs are left", f"suite {options.suite}",
                                "start the same command again to continue") from None
        finally:
            write(options, suite, found)
    failed = [f"{one.name}: {one.state}" for one in found if one.family in wanted and (one.error or one.failures)]
    if failed:
        raise NotReportable(f"{len(failed)} settings failed: {' | '.join(failed[:4])}", "search",
                            "mend that and start the same command again: finished runs are not repeated")


def candidates(suite: SearchSuite, options: Options) -> list[Candidate]:
    """Every setting with its runs. Names come from the settings: a changed file keeps the runs of the others."""
    found = []
    for title, family in suite.families.items():
        common = (f"peers={family.peers or suite.peers}", *suite.settings, *family.settings)
        for point in family.points():
            settings = (*common, *point, *options.settings, NEVER_TESTED)
            key = hashlib.sha256("\n".join((*common, *point)).encode()).hexdigest()[:8]
            one = Candidate(title, f"{title}_{key}", point)
            try:
                one.jobs = {seed: Job.make(one.name, seed, options.root, suite.config, settings)
                            for seed in suite.seeds}
            except ConfigError as error:
                one.error = "; ".join(f"{problem.what} ({problem.where})" for problem in error.problems)
            found.append(one)
    return found


def execute(found: Sequence[Candidate], seeds: Sequence[int], jobs: int, runner: Runner,
            write: Callable[[], None]) -> None:
    """Train all with the first seed, then with the next. Raises Enough."""
    left = [(one, seed) for seed in seeds for one in found if seed in one.jobs and not one.jobs[seed].done]
    tasks = [(one.jobs[seed], partial(train, one.jobs[seed], runner)) for one, seed in left]

    def ended(number: int, error: MatError | None) -> None:
        one, seed = left[number]
        if error is not None:
            one.failures[seed] = str(error)

    run_all(tasks, jobs, runner, ended, write)


def scores(job: Job, weights: str) -> dict[str, float]:
    """Validation accuracies of the last epoch: of the mean peer and the ensemble under PGD, and clean."""
    step = checkpoints.load_manifest(job.folder).step
    file = job.folder.eval / f"validation_{checkpoints.step_name(step)}.json"
    try:
        rows = parse_json(file.read_bytes())["targets"]
    except (OSError, ValueError, KeyError) as error:
        raise NotReportable(f"no validation after the last epoch: {error}", str(file), "set eval.every to 1 or more") \
            from error
    kept = EMA if weights == "auto" and any(row["weights"] == EMA for row in rows) else weights
    rows = [row for row in rows if row["weights"] == (RAW if kept == "auto" else kept)]
    peers = [row["accuracy"] for row in rows if row["target"] != ENSEMBLE]
    if not peers:
        raise NotReportable(f"the run keeps no {kept} weights", str(file), "set optim.ema_decay, or weights: raw")
    return {"mean": sum(one["union"] for one in peers) / len(peers),
            "clean": sum(one["clean"] for one in peers) / len(peers),
            "ensemble": next(row["accuracy"]["union"] for row in rows if row["target"] == ENSEMBLE)}


def write(options: Options, suite: SearchSuite, found: Sequence[Candidate]) -> None:
    """`search_<suite>.json` and `.md`, each whole or as before."""
    cheapest = min((one.passes for one in found if one.passes), default=None)
    tried: list[dict[str, Any]] = []
    for one in found:
        by_seed = {seed: scores(job, suite.weights) for seed, job in one.jobs.items() if job.done}
        first = next(iter(one.jobs.values()), None)
        tried.append({
            "name": one.name, "family": one.family, "point": list(one.point), "state": one.state,
            "command": first.command if first else "", "config_digest": first.digest if first else "",
            "passes": one.passes, "cost": one.passes / cheapest if one.passes and cheapest else None,
            "scores": {key: summary({seed: {0: values[key]} for seed, values in by_seed.items()})
                       for key in ("mean", "ensemble", "clean")} if by_seed else {}})
    tried.sort(key=lambda one: -one["scores"]["mean"]["mean"] if one["scores"] else 1.0)
    runs = [job for one in found for job in one.jobs.values()]
    document = {
        "suite": options.suite, "file": options.file.rpartition("/")[2], "file_digest": file_digest(options.file),
        "settings": hidden(options.settings), "config": suite.config, "base_settings": list(suite.settings),
        "peers": suite.peers, "weights": suite.weights, "seeds": list(suite.seeds),
        "git": git_revision(), "machines": machines(runs),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": {"done": sum(job.done for job in runs), "all": len(found) * len(suite.seeds)},
        "families": {name: {"says": family.says, "settings": list(family.settings),
                            "tried": sum(one.family == name for one in found),
                            "done_runs": sum(job.done for one in found if one.family == name
                                             for job in one.jobs.values())}
                     for name, family in suite.families.items()},
        "settings_tried": tried}
    with reported(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / f"search_{options.suite}.json", document)
    write_text(options.out / f"search_{options.suite}.md", search_page(document))
