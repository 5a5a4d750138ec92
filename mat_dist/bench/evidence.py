"""Train and attack all rows of a suite of benchmarks/evidence.yaml, and write its tables.

python -m mat_dist.bench evidence --suite cpu data.root=FOLDER [key=value ...]

  --suite NAME        suite of the file (default cpu)
  --only ROW,...      these rows alone (the tables keep what others have)
  --seeds 0,1         these seeds alone
  --jobs N            so many runs at a time (default 1), each on one thread; on a GPU all share it
  --budget SECONDS    after these, save and stop with exit code 75; the same command goes on
  --root FOLDER       folder of the runs (default runs/evidence_<suite>)
  --file FILE         another plan (default benchmarks/evidence.yaml)
  --out FOLDER        folder of <suite>.json and <suite>.md (default benchmarks/results)
  --dry-run           print the plan: runs, passes, rows that this version cannot train
  key=value           settings of every run, laid over those of the plan

Finished runs and evaluations are not repeated. Written after every run, the tables say what is missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mat_dist.bench.study.jobs import run_all
from mat_dist.bench.study.options import Options, chosen
from mat_dist.bench.study.pages import evidence_page
from mat_dist.bench.study.plan import Suite, TablePlan, read_evidence
from mat_dist.bench.study.runs import PLACES, Enough, Job, Runner, machines, train
from mat_dist.bench.study.scores import evaluate, find, labels
from mat_dist.bench.study.tables import Entry, table_document
from mat_dist.bench.study.why import explain
from mat_dist.bench.study.why_page import write_charts
from mat_dist.cli import tell
from mat_dist.distributed.stopping import watching
from mat_dist.errors import ConfigError, MatError, NotReportable, StopRequested
from mat_dist.runs.files import reported, write_json, write_text
from mat_dist.runs.record import git_revision
from mat_dist.tools.dryrun import training_passes

PLAN = "benchmarks/evidence.yaml"


def main(words: Sequence[str]) -> None:
    """The command.

    Raises:
        ConfigError: the command line, the plan; at the end, rows that this version cannot train.
        StopRequested: the budget is over, or a signal came: start again to continue.
        NotReportable: an evaluation failed its soundness checks; any other error of a run, after all others.
    """
    options = Options.read(words, "evidence", PLAN)
    study = read_evidence(options.file)
    suite = study.suites[chosen([options.suite], list(study.suites), "suite")[0]]
    entries = plan_entries(suite, options)
    for entry in entries:
        if entry.error:
            tell(f"warning: row {entry.name} cannot be trained: {entry.error}")
    if options.dry_run:
        show_plan(suite, entries)
        return
    wanted = set(chosen(options.only, [entry.name for entry in entries], "row"))
    seeds = [int(seed) for seed in chosen([str(s) for s in options.seeds], [str(s) for s in suite.seeds], "seed")]
    with watching() as stop:
        runner = Runner(stop, options.budget, tell)
        take_up(suite, entries)
        try:
            execute(suite, entries, wanted, seeds, options.jobs, runner, lambda: write(options, suite, entries))
        except Enough:
            left = [f"{e.name}_{seed}" for e in entries for seed in e.jobs if e.missing(suite.tables[e.table], seed)]
            raise StopRequested(f"the time is over or a signal came; {len(left)} runs are left: {', '.join(left[:12])}"
                                f"{', ...' if len(left) > 12 else ''}", f"suite {options.suite}",
                                "start the same command again to continue") from None
        finally:
            write(options, suite, entries)
    judge([entry for entry in entries if entry.name in wanted])


def plan_entries(suite: Suite, options: Options) -> list[Entry]:
    """Every row with its runs; a row whose settings this version refuses has none, and the reason."""
    entries = []
    for title, table in suite.tables.items():
        for name, row in table.rows.items():
            entry = Entry(title, name, row, reasons=suite.reasons.images if suite.reasons and row.peers > 1 else 0)
            settings = (f"peers={row.peers}", *suite.settings, *table.settings, *row.settings, *options.settings)
            try:
                entry.jobs = {seed: Job.make(name, seed, options.root, suite.config, settings) for seed in suite.seeds}
            except ConfigError as error:
                entry.error = "; ".join(f"{one.what} ({one.where})" for one in error.problems)
            entries.append(entry)
    return entries


def take_up(suite: Suite, entries: Sequence[Entry]) -> None:
    """Read the results that are there already."""
    for entry in entries:
        for seed, job in entry.jobs.items():
            for name, one in suite.tables[entry.table].evaluations.items():
                if job.done and one.applies(entry.name, seed):
                    for label, used in labels(job, one).items():
                        if (found := find(job, name, one, used)) is not None:
                            entry.results.setdefault(seed, {})[name, label] = found


def execute(suite: Suite, entries: Sequence[Entry], rows: set[str], seeds: Sequence[int], jobs: int, runner: Runner,
            write: Callable[[], None]) -> None:
    """Train and evaluate what is asked for: all rows with the first seed, then with the next. Raises Enough."""
    left = [(entry, seed) for seed in seeds for entry in entries if entry.name in rows and seed in entry.jobs
            and entry.missing(suite.tables[entry.table], seed)]
    tasks = [(entry.jobs[seed], partial(complete, suite.tables[entry.table], entry, seed, runner))
             for entry, seed in left]

    def ended(number: int, error: MatError | None) -> None:
        entry, seed = left[number]
        if error is not None:
            entry.failures[seed] = str(error)
        take_up(suite, [entry])

    run_all(tasks, jobs, runner, ended, write)


def complete(table: TablePlan, entry: Entry, seed: int, runner: Runner) -> None:
    """Train one run and evaluate it. Raises Enough, MatError."""
    job = entry.jobs[seed]
    train(job, runner)
    for name, one in table.evaluations.items():
        if one.applies(entry.name, seed):
            for used in dict.fromkeys(labels(job, one).values()):
                evaluate(job, name, one, used, runner)
    explain(job, entry.reasons, runner)


def write(options: Options, suite: Suite, entries: Sequence[Entry]) -> None:
    """`<suite>.json` and `<suite>.md`, each whole or as before."""
    pairs = [(entry, seed) for entry in entries for seed in suite.seeds]
    done = [entry for entry, seed in pairs if entry.jobs and not entry.missing(suite.tables[entry.table], seed)]
    document = {
        "suite": options.suite, "file": Path(options.file).name, "file_digest": file_digest(options.file),
        "settings": hidden(options.settings), "config": suite.config, "base_settings": list(suite.settings),
        "seeds": list(suite.seeds), "git": git_revision(),
        "machines": machines(job for entry in entries for job in entry.jobs.values()),
        "time": datetime.now(UTC).isoformat(timespec="seconds"), "runs": {"done": len(done), "all": len(pairs)},
        "tables": {title: table_document(table, [e for e in entries if e.table == title])
                   for title, table in suite.tables.items()},
    }
    with reported(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / f"{options.suite}.json", document)
    write_charts(options.out, document)
    write_text(options.out / f"{options.suite}.md", evidence_page(document))


def judge(entries: Sequence[Entry]) -> None:
    """Raise what went wrong, when everything else is done. Raises ConfigError, MatError, NotReportable."""
    refused = [entry.name for entry in entries if entry.error]
    failed = [f"{entry.name}, seed {seed}: {text}" for entry in entries for seed, text in entry.failures.items()]
    unsound = [f"{entry.name}, seed {seed}: {text}" for entry in entries for seed, found in entry.results.items()
               for one in found.values() for text in one.unsound]
    if failed:
        raise NotReportable(f"{len(failed)} runs failed: {' | '.join(failed[:4])}", "evidence",
                            "mend that and start the same command again: finished runs are not repeated")
    if refused:
        raise ConfigError(f"this version cannot train the rows {', '.join(refused)}", "evidence",
                          "the reasons stand above and in the table; use --only for the others")
    if unsound:
        raise NotReportable(f"failed soundness checks: {'; '.join(unsound[:4])}", "evidence",
                            "the tables mark these rows; docs/evaluation.md says what each check means")


# ------------------------------------------------------------------------------------------------ small things


def file_digest(file: str) -> str:
    """SHA-256 of the plan."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def hidden(settings: Sequence[str]) -> list[str]:
    """The settings without the folders of this machine."""
    return [word for word in settings if word.partition("=")[0] not in PLACES]


def show_plan(suite: Suite, entries: Sequence[Entry]) -> None:
    """Rows, runs and passes; of a batch for the training, of an image for the evaluations."""
    table = Table("table", "row", "peers", "runs", "steps", "million passes, training", "million passes, PGD of tests",
                  title=f"{suite.config}, seeds {', '.join(map(str, suite.seeds))}", title_justify="left")
    sums = [0, 0.0, 0.0]
    for entry in entries:
        first = next(iter(entry.jobs.values()), None)
        passes = training_passes(first.config) if first is not None else None
        if first is None:
            table.add_row(entry.table, entry.name, str(entry.row.peers), "0: refused", "", "", "")
            continue
        trained = (passes[1] + passes[2]) * first.config.train.batch_size / 1e6 if passes else 0.0
        tested = [tests(suite.tables[entry.table], entry, seed) / 1e6 for seed in entry.jobs]
        sums = [sums[0] + len(entry.jobs), sums[1] + trained * len(entry.jobs), sums[2] + sum(tested)]
        steps = str(passes[0]) if passes else "?"
        table.add_row(entry.table, entry.name, str(entry.row.peers), str(len(entry.jobs)), steps,
                      f"{trained * len(entry.jobs):.2f}", f"{sum(tested):.2f}")
    table.add_row("all", "", "", str(sums[0]), "", f"{sums[1]:.2f}", f"{sums[2]:.2f}")
    screen = Console()
    (screen if screen.is_terminal else Console(width=120)).print(table)
    print("Passes: forward and backward of one image, all seeds. Not counted: validation, AutoAttack, checks, reasons.")


def tests(plan: TablePlan, entry: Entry, seed: int) -> float:
    """Passes of an image in the PGD and CW attacks of one run; an ensemble counts as its members."""
    units = entry.row.peers * (1 if entry.row.peers == 1 else 2)
    total = 0.0
    for one in plan.evaluations.values():
        request = one.arguments.request
        attacks = [name for name in request.attacks if name in ("pgd", "cw")]
        if one.applies(entry.name, seed) and attacks and request.images:
            steps = (request.steps or entry.jobs[seed].config.eval.test_steps) * (request.restarts or 1)
            total += 2.0 * units * len(attacks) * steps * request.images * len(one.checkpoints)
    return total
