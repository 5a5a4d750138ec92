"""The files `benchmarks/evidence.yaml` and `benchmarks/search.yaml`, read with all problems at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from mat_dist.config.help import nearest
from mat_dist.config.schema import Integer, Number, Section
from mat_dist.config.tree import joined, locate, plain, read
from mat_dist.errors import ConfigError, MatError
from mat_dist.evaluation.settings import Arguments, parse

Words = tuple[str, ...]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]{0,39}$")]
Kind = Literal["mean", "best", "ensemble"]
Label = Literal["best", "last"]
KINDS: dict[Kind, str] = {"mean": "mean peer", "best": "best peer", "ensemble": "ensemble"}
Problem = tuple[tuple[str | int, ...], str, str]  # path in the file, what is wrong, how to mend it
OWN_SETTINGS = ("checkpoint", "targets", "split", "weights")  # of an evaluation: the study sets them
S = TypeVar("S", bound=Section)


class Evaluation(Section):
    """An evaluation of finished runs: columns of the table."""

    settings: Words = Field(min_length=1, description="key=value of python -m mat_dist.evaluate")
    checkpoints: tuple[Label, ...] = Field(("last",), min_length=1, description="best, last")
    rows: tuple[str, ...] | None = Field(None, description="for these rows alone; default all")
    seeds: tuple[Integer, ...] | None = Field(None, description="for these seeds alone; default all")
    who: Literal["all", "peers", "first"] = Field("all", description="whom it attacks of a cohort: its peers and their "
                                                                     "ensemble, the peers, the first of them")

    @property
    def arguments(self) -> Arguments:
        """As the command understands it. Raises ConfigError."""
        return parse(("run", *self.settings))

    def columns(self, name: str) -> tuple[str, ...]:
        """Its columns: one of its own name, or one per norm and their union where it names several threats."""
        norms = [threat.partition(":")[0] for threat in self.arguments.request.threats]
        return (name,) if len(norms) < 2 else (*norms, "union")

    def applies(self, row: str, seed: int) -> bool:
        """Whether it is made for this run."""
        return (self.rows is None or row in self.rows) and (self.seeds is None or seed in self.seeds)


class Row(Section):
    """A way to train, in as many runs as there are seeds."""

    says: str = Field(min_length=1, description="what it is, in a few words")
    settings: Words = Field((), description="key=value of python -m mat_dist.train")
    peers: Integer = Field(1, ge=1, description="size of the cohort")
    report: tuple[Kind, ...] | None = Field(None, description="mean peer, best peer by validation, ensemble; default "
                                                              "all, of a single peer the mean")
    tried: Integer = Field(1, ge=1, description="settings that were tried to choose this one")
    cost_factor: Number = Field(1.0, gt=0, description="cost of a pass against one of the others' networks")
    control: str | None = Field(None, description="row of the table that costs as much or more: its control")
    remark: str = Field("", description="what the reader must know")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What is reported of it."""
        return self.report or (("mean",) if self.peers == 1 else ("mean", "best", "ensemble"))


class TablePlan(Section):
    """Rows that share evaluations and are compared with each other."""

    title: str = Field(min_length=1, description="heading")
    settings: Words = Field((), description="of all its rows")
    primary: str = Field(description="the column that decides, of the last checkpoint")
    controls: tuple[str, ...] = Field((), description="rows that every row is compared with")
    figure: Literal["intervals", "curves"] = Field("intervals", description="intervals of the primary column, or "
                                                                            "curves of validation over epochs")
    evaluations: dict[Name, Evaluation] = Field(min_length=1, description="columns")
    rows: dict[Name, Row] = Field(min_length=1, description="rows")

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns but the accuracy without attack, in order."""
        return tuple(dict.fromkeys(c for name, one in self.evaluations.items() for c in one.columns(name)))


class Reasons(Section):
    """What is measured of every cohort beside its accuracies; never on the test split."""

    images: Integer = Field(500, ge=1, description="validation images, and as many training images")


class Suite(Section):
    """What is trained on one kind of machine."""

    config: str = Field(min_length=1, description="configuration that all rows build on")
    settings: Words = Field((), description="key=value for all rows")
    seeds: tuple[Integer, ...] = Field(min_length=1, description="run.seed of the runs of a row")
    search_budget: Integer = Field(1, ge=1, description="settings that may be tried, at most, to choose those of a row")
    reasons: Reasons | None = Field(None, description="strength of peers' AEs and what teachers know, of every cohort")
    tables: dict[Name, TablePlan] = Field(min_length=1, description="tables")


class Evidence(Section):
    """The whole of `evidence.yaml`."""

    suites: dict[Name, Suite] = Field(min_length=1, description="suites by name")


class Family(Section):
    """Settings of the search that vary the same thing: each of `each`, combined with each point of `grid`."""

    says: str = Field(min_length=1, description="what is varied, in a few words")
    settings: Words = Field((), description="of all its settings")
    each: tuple[Words, ...] = Field(((),), min_length=1, description="lists of key=value, one trained setting each")
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict, description="key -> values; all combinations")
    peers: Integer | None = Field(None, ge=1, description="size of the cohort; default that of the suite")

    def points(self) -> Iterator[Words]:
        """The settings of each of its points, without those that all share."""
        axes = [[f"{key}={_text(value)}" for value in values] for key, values in self.grid.items()]
        for some in self.each:
            for combination in itertools.product(*axes):
                yield (*some, *combination)


class SearchSuite(Section):
    """A search on the validation split."""

    config: str = Field(min_length=1, description="configuration that all settings build on")
    settings: Words = Field((), description="key=value for all")
    peers: Integer = Field(ge=1, description="size of the cohorts")
    seeds: tuple[Integer, ...] = Field(min_length=1, description="run.seed of the runs of a setting")
    weights: Literal["auto", "raw", "ema"] = Field("auto", description="weights that are scored; auto: averaged ones "
                                                                       "where they are kept")
    families: dict[Name, Family] = Field(min_length=1, description="what is varied")


class Search(Section):
    """The whole of `search.yaml`."""

    suites: dict[Name, SearchSuite] = Field(min_length=1, description="suites by name")


def _text(value: Any) -> str:
    """A value as it would be written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


# ------------------------------------------------------------------------------------------------ reading


def read_evidence(path: str, more: Callable[[Evidence], Iterable[Problem]] = lambda study: ()) -> Evidence:
    """`evidence.yaml`; `more` finds problems beside those of the file alone. Raises ConfigError; `problems` has all."""
    return _read(path, Evidence, lambda study: itertools.chain(_evidence_problems(study), more(study)))


def read_search(path: str) -> Search:
    """`search.yaml`. Raises ConfigError; `problems` has all of them."""
    return _read(path, Search, _search_problems)


def _read(path: str, model: type[S], check: Callable[[S], Iterable[Problem]]) -> S:
    problems: list[ConfigError] = []
    tree = read(path, path, problems)
    found: S | None = None
    try:
        found = model.model_validate(plain(tree))
    except ValidationError as error:
        for one in error.errors(include_url=False):
            node, _ = locate(tree, [part for part in one["loc"] if part != "[key]"])
            key = ".".join(map(str, one["loc"]))
            problems.append(ConfigError(f"{key}: {one['msg']}", node.where, "see docs/studies.md for the format"))
    if found is not None and not problems:
        problems += [ConfigError(what, locate(tree, place)[0].where, how) for place, what, how in check(found)]
    if problems or found is None:
        raise joined(problems, path)
    return found


def _evidence_problems(study: Evidence) -> Iterator[Problem]:
    for suite_name, suite in study.suites.items():
        at: tuple[str | int, ...] = ("suites", suite_name)
        yield from _words((*at, "settings"), suite.settings)
        taken: dict[str, str] = {}
        for title, table in suite.tables.items():
            for name, row in table.rows.items():
                here = (*at, "tables", title, "rows", name)
                if name in taken:
                    yield here, f"table {taken[name]} has a row {name} too", "rename one"
                taken.setdefault(name, title)
                if row.tried > suite.search_budget:
                    yield ((*here, "tried"), f"{row.tried} settings tried for {name}, search_budget is "
                           f"{suite.search_budget}", "give every row the same budget")
            yield from _table_problems((*at, "tables", title), table, suite.seeds)


def _table_problems(at: tuple[str | int, ...], table: TablePlan, seeds: Sequence[int]) -> Iterator[Problem]:
    yield from _words((*at, "settings"), table.settings)
    sound = True
    for name, one in table.evaluations.items():
        here = (*at, "evaluations", name)
        for word in one.rows or ():
            yield from _known((*here, "rows"), word, table.rows)
        if absent := set(one.seeds or ()) - set(seeds):
            yield (*here, "seeds"), f"seeds {sorted(absent)} are not among those of the suite", "write some of those"
        own = [word for word in one.settings if word.partition("=")[0] in OWN_SETTINGS]
        if own:
            yield (*here, "settings"), f"{', '.join(own)} is not free here", "leave it out: the study sets it"
        try:
            _ = one.arguments
        except ConfigError as error:
            sound = False
            for problem in error.problems:
                yield from _told((*here, "settings"), problem)
    for name, row in table.rows.items():
        yield from _words((*at, "rows", name, "settings"), row.settings)
        if row.control == name:
            yield (*at, "rows", name, "control"), f"{name} is its own control", "name another row"
        elif row.control is not None:
            yield from _known((*at, "rows", name, "control"), row.control, table.rows)
    for control in table.controls:
        yield from _known((*at, "controls"), control, table.rows)
    if sound:
        yield from _known((*at, "primary"), table.primary, table.columns)


def _search_problems(study: Search) -> Iterator[Problem]:
    for name, suite in study.suites.items():
        at = ("suites", name)
        yield from _words((*at, "settings"), suite.settings)
        for title, family in suite.families.items():
            here = (*at, "families", title)
            yield from _words((*here, "settings"), family.settings)
            for n, some in enumerate(family.each):
                yield from _words((*here, "each", n), some)
            for key, values in family.grid.items():
                if not values or any(isinstance(value, (dict, list, tuple)) for value in values):
                    yield (*here, "grid", key), f"{key} is not a list of values", "write [0.5, 1]"


def _words(at: tuple[str | int, ...], words: Sequence[str]) -> Iterator[Problem]:
    for n, word in enumerate(words):
        key, equals, _ = word.partition("=")
        if not equals:
            yield (*at, n), f"{word!r} is not a setting", "write key=value"
        elif key in ("run.name", "run.root", "run.seed", "peers"):
            yield (*at, n), f"{key} is not free here", "leave it out: the study sets it (`peers: N` of a row, --root)"


def _known(at: tuple[str | int, ...], word: str, names: Any) -> Iterator[Problem]:
    if word not in names:
        near = nearest(word, names)
        yield at, f"there is no {word!r} in this table", f"did you mean {near}?" if near else f"use {', '.join(names)}"


def _told(at: tuple[str | int, ...], problem: MatError) -> Iterator[Problem]:
    yield at, problem.what, problem.how
