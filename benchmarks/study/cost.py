"""What the training of a row costs, and whether each row has the control that it needs, which costs as much or more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from benchmarks.study.plan import Problem, Suite
from mat_dist.config.schema import Config
from mat_dist.core.graph import CohortGraph
from mat_dist.tools.dryrun import training_passes

if TYPE_CHECKING:
    from benchmarks.study.tables import Entry

EQUAL_COST = 1.05  # two costs whose ratio is no larger count as equal
NOMINAL = 50_000  # images of a data set whose size is not known before it is read: what costs are compared with


def is_mutual(config: Config) -> bool:
    """Whether some peer learns from another one that trains in the same run: its AEs, or its opinion."""
    graph = CohortGraph.of(config.peers)
    training = {row.index for row in graph.peers if not row.me.frozen}
    for row in graph.peers:
        sources = {view.maker for view in row.learned} | set(graph.guides[row.index])
        sources |= {teacher for view in row.distilled for teacher in row.teachers(view)}
        if row.index in training and sources & training - {row.index}:
            return True
    return False


def planned_cost(entry: Entry) -> tuple[float, bool] | None:
    """Passes of an image that the settings of a row ask for, times its cost factor, and those of the rows that it
    starts from; and whether they are known, or made up for a data set of NOMINAL images. None: it cannot be trained."""
    total, known = 0.0, True
    for one in (entry, *entry.sources()):
        if one.first is None:
            return None
        config = one.first.config
        passes = training_passes(config)
        if passes is None:
            known = False
            passes = training_passes(config.model_copy(update={
                "data": config.data.model_copy(update={"train_size": NOMINAL})}))
        if passes is None:
            return None
        total += image_passes(config, passes) * one.row.cost_factor
    return total, known


def image_passes(config: Config, passes: tuple[int, int, int]) -> int:
    """Forward and backward passes of one image, of steps and passes of a batch."""
    return (passes[1] + passes[2]) * config.train.batch_size


def relative_cost(entry: Entry, control: Entry) -> float | None:
    """The row's cost by that of its control, as planned; None where one of them cannot be trained, or where only one
    of them says how many images it has."""
    mine, theirs = planned_cost(entry), planned_cost(control)
    if mine is None or theirs is None or mine[1] != theirs[1]:
        return None
    return mine[0] / theirs[0]


# ------------------------------------------------------------------------------------------------ what a plan needs


def cost_problems(name: str, suite: Suite, entries: Mapping[str, Entry]) -> Iterator[Problem]:
    """Rows of a suite that start from what is not there, and rows without a control that costs as much."""
    for title, table in suite.tables.items():
        for row in table.rows:
            here = ("suites", name, "tables", title, "rows", row)
            yield from _source_problems(here, entries[row], entries)
            yield from _control_problems(here, entries[row], {other: entries[other] for other in table.rows})


def _source_problems(here: tuple[str | int, ...], entry: Entry, entries: Mapping[str, Entry]) -> Iterator[Problem]:
    needs = entry.first.needs if entry.first else frozenset()
    for source in sorted(needs - entries.keys()):
        yield (*here, "settings"), f"RUN({source}) names no row of the suite", f"use {', '.join(entries)}"
    if entry in entry.sources():
        yield (*here, "settings"), f"{entry.name} starts from runs that start from its own", "start from other rows"


def _control_problems(here: tuple[str | int, ...], entry: Entry, rows: Mapping[str, Entry]) -> Iterator[Problem]:
    name, control = entry.name, rows.get(entry.row.control or "")
    if entry.first is None or control is entry:  # told elsewhere, and so is a control that is no row
        return
    if control is None:
        if entry.row.control is None and is_mutual(entry.first.config):
            yield (here, f"{name} has no control, and its peers learn from each other",
                   "write `control: ROW`, a row of this table that costs as much or more")
        return
    here = (*here, "control")
    ratio = relative_cost(entry, control)
    if ratio is None:
        yield (here, f"the cost of {name} cannot be compared with that of {control.name}",
               f"mend {control.name}, which cannot be trained: {control.error}" if control.error
               else "give both of them data.train_size")
    elif ratio > EQUAL_COST:
        yield (here, f"{control.name} costs less than {name}, which costs {ratio:.2f} times as much (by passes, cost "
               "factors and rows that it starts from)", f"give {control.name} {ratio:.2f} times as many epochs, or "
               "name a control that costs as much")
