"""The study `evidence`: train and attack all rows of a suite of benchmarks/evidence.yaml, and write its tables."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial

from rich.table import Table

from benchmarks.command import chosen
from benchmarks.study.cost import cost_problems, relative_cost
from benchmarks.study.figures import write_pictures
from benchmarks.study.pages import evidence_page
from benchmarks.study.plan import Evidence, Problem, Suite, TablePlan, read_evidence
from benchmarks.study.runs import Runner, carry_out, choose_suite, head_document, train, write_results
from benchmarks.study.tables import Entry, evaluate, find, labels, table_document
from benchmarks.study.why import explain
from mat_dist.checkpoints.load import candidates
from mat_dist.cli import tell
from mat_dist.errors import ConfigError, NotReportable
from mat_dist.evaluation.targets import make_job
from mat_dist.runs.console import show_table
from mat_dist.tools.dryrun import training_passes


def main(options: Namespace) -> None:
    """The study, by the options of `__main__.py`. Raises ConfigError for the plan, and what `conduct` raises."""
    conduct(options, *planned(options))


def conduct(options: Namespace, suite: Suite, entries: Sequence[Entry]) -> None:
    """Carry a plan out.

    Raises:
        ConfigError: at the end, rows that this version cannot train.
        StopRequested: the budget is over, or a signal came: start again to continue.
        NotReportable: an evaluation failed its soundness checks; any other error of a run, after all others.
    """
    for entry in entries:
        if entry.error:
            tell(f"warning: row {entry.name} cannot be trained: {entry.error}")
    if options.dry_run:
        show_plan(suite, entries)
        return
    take_up(suite, entries)
    rows = chosen(options.only, [entry.name for entry in entries], "row")
    work = [(entry, seed, partial(complete, suite.tables[entry.table], entry, seed))
            for seed in chosen(options.seeds, suite.seeds, "seed") for entry in entries
            if entry.name in rows and seed in entry.jobs and entry.missing(suite.tables[entry.table], seed)]
    carry_out(options, work, lambda: write(options, suite, entries))
    judge([entry for entry in entries if entry.name in rows])


def planned(options: Namespace) -> tuple[Suite, list[Entry]]:
    """The suite and its rows. Raises ConfigError: mistakes of the file, rows without a control that costs as much."""
    entries: list[Entry] = []

    def costs(study: Evidence) -> Iterator[Problem]:
        if options.suite in (None, *study.suites):
            suite = choose_suite(options, study.suites)
            entries.extend(plan_entries(suite, options))
            yield from cost_problems(options.suite, suite, {entry.name: entry for entry in entries})

    return choose_suite(options, read_evidence(str(options.file), costs).suites), entries


def plan_entries(suite: Suite, options: Namespace) -> list[Entry]:
    """Every row with its runs; a row whose settings this version refuses has none, and the reason."""
    entries = []
    for title, table in suite.tables.items():
        for name, row in table.rows.items():
            images = suite.reasons.images if suite.reasons and row.peers > 1 else 0
            entry = Entry(name, table=title, row=row, reasons=images)
            entry.plan(suite, options.root, (f"peers={row.peers}", *suite.settings, *table.settings, *row.settings,
                                             *options.words))
            entries.append(entry)
    for entry in entries:
        entry.starts_from = [one for one in entries if entry.first and one.name in entry.first.needs]
    return entries


def take_up(suite: Suite, entries: Sequence[Entry]) -> None:
    """Read the results that are there and were not read before, whichever command made them."""
    for entry in entries:
        for seed, job in entry.jobs.items():
            read = entry.results.setdefault(seed, {})
            for name, one in suite.tables[entry.table].evaluations.items():
                if job.done and one.applies(entry.name, seed):
                    for label, used in labels(job, one).items():
                        if (name, label) not in read and (found := find(job, name, one, used)) is not None:
                            read[name, label] = found


def complete(table: TablePlan, entry: Entry, seed: int, runner: Runner) -> None:
    """Train one run and evaluate it. Raises Enough, MatError."""
    job = entry.jobs[seed]
    train(job, runner)
    for name, one in table.evaluations.items():
        if one.applies(entry.name, seed):
            for used in dict.fromkeys(labels(job, one).values()):
                evaluate(job, name, one, used, runner)
    explain(job, entry.reasons, runner)


def write(options: Namespace, suite: Suite, entries: Sequence[Entry]) -> None:
    """`<suite>.json` and `<suite>.md` with its pictures, each whole or as before; also of what others did meanwhile."""
    take_up(suite, entries)
    pairs = [(entry, seed) for entry in entries for seed in suite.seeds]
    done = [entry for entry, seed in pairs if entry.jobs and not entry.missing(suite.tables[entry.table], seed)]
    document = {**head_document(options, suite, entries), "runs": {"done": len(done), "all": len(pairs)},
                "tables": {title: table_document(table, [e for e in entries if e.table == title])
                           for title, table in suite.tables.items()}}
    write_results(options, options.suite, document, evidence_page(document))
    write_pictures(options.out, document)


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


# ------------------------------------------------------------------------------------------------ --dry-run


def show_plan(suite: Suite, entries: Sequence[Entry]) -> None:
    """Rows, runs and passes of an image."""
    table = Table("table", "row", "peers", "runs", "steps", "million passes, training", "million passes, tests (most)",
                  "cost by that of its control", title_justify="left",
                  title=f"{suite.config}, seeds {', '.join(map(str, suite.seeds))}")
    runs, training, testing = 0, 0.0, 0.0
    for entry in entries:
        if entry.first is None:
            table.add_row(entry.table, entry.name, str(entry.row.peers), "0: refused", "", "", "", "")
            continue
        passes = training_passes(entry.first.config)
        trained = (passes[1] + passes[2]) * entry.first.config.train.batch_size / 1e6 if passes else 0.0
        tested = sum(tests(suite.tables[entry.table], entry, seed) for seed in entry.jobs) / 1e6
        runs, training, testing = runs + len(entry.jobs), training + trained * len(entry.jobs), testing + tested
        table.add_row(entry.table, entry.name, str(entry.row.peers), str(len(entry.jobs)),
                      str(passes[0]) if passes else "?", f"{trained * len(entry.jobs):.2f}", f"{tested:.2f}",
                      against_control(entry, entries))
    table.add_row("all", "", "", str(runs), "", f"{training:.2f}", f"{testing:.2f}", "")
    show_table(table)
    print("Passes: forward and backward of one image, all seeds. Tests: PGD and APGD alone, all steps for all images. "
          "Not counted: AutoAttack and other attacks, validation, checks, reasons."
          "\nThe cost of a row that starts from finished peers of others includes the training of those.")


def against_control(entry: Entry, entries: Sequence[Entry]) -> str:
    """The row's cost by that of its control, and the name of that."""
    control = next((one for one in entries if one.name == entry.row.control), None)
    ratio = relative_cost(entry, control) if control else None
    return f"{ratio:.2f} of {control.name}" if control and ratio else "-"


def tests(plan: TablePlan, entry: Entry, seed: int) -> float:
    """Passes of an image in the PGD and APGD of one run, as if no image were broken before the last step; an ensemble
    counts as its members."""
    config = entry.jobs[seed].config
    peers, total = len(candidates(config.peers)), 0.0
    for one in plan.evaluations.values():
        units = {"first": 1, "peers": peers, "all": peers if peers == 1 else 2 * peers}[one.who]
        request = one.arguments.request
        if one.applies(entry.name, seed) and request.images:
            job = make_job(request, config)
            steps = sum(attack.steps * attack.starts(threat) * max(attack.targets, 1)
                        for attack in job.plans.values() for threat in job.threats)
            total += 2.0 * units * steps * request.images * len(one.checkpoints)
    return total
