"""The accuracies that docs/evidence.md, the page of the first results and README.md quote are those of the results."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from tests.documents import ROOT, heads, table

PAGE, WHOLE, FIRST = "docs/evidence.md", "benchmarks/results/first/README.md", ROOT / "benchmarks/results/first"


@cache
def document(suite: str, title: str) -> dict[str, Any]:
    """A table of the committed results."""
    found: dict[str, Any] = json.loads((FIRST / f"{suite}.json").read_text(encoding="utf-8"))["tables"][title]
    return found


def results(suite: str, title: str) -> dict[str, Any]:
    """Rows of a table by name, and its primary column."""
    found = document(suite, title)
    return {"primary": found["primary"], "rows": {row["row"]: row for row in found["rows"]}}


def plain(name: str) -> str:
    """A row's name as the pages have it: without its table's prefix, as if all cohorts had three peers."""
    return name.removeprefix("long_").removeprefix("over_").replace("_x2", "_x3")


def percent(row: dict[str, Any], kind: str, column: str) -> str:
    return f"{100 * row['accuracy']['last'][kind][column]['mean']:.1f}"


def seeds(row: dict[str, Any], column: str) -> int:
    return max(len(found[column]["by_seed"]) for found in row["accuracy"]["last"].values() if column in found)


def difference(suite: str, title: str, checkpoint: str = "last", kind: str = "mean") -> str:
    """mat minus at_x3 in points, with its interval."""
    found = document(suite, title)
    (one,) = [one for one in found["differences"] if (one["kind"], one["checkpoint"], one["column"]) == (
        kind, checkpoint, found["primary"]) and (plain(one["row"]), plain(one["control"])) == ("mat", "at_x3")]
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*(100 * one[key] for key in ("mean", "low", "high")))


def measured(suite: str, title: str) -> list[str]:
    """at_x3, mat and their difference as a page quotes them."""
    found = results(suite, title)
    by_name = {plain(name): row for name, row in found["rows"].items()}
    return [*(percent(by_name[name], "mean", found["primary"]) for name in ("at_x3", "mat")), difference(suite, title)]


def test_the_answer_quotes_accuracies_and_differences_as_measured() -> None:
    rows = table(PAGE, "## Mutual against independent peers")
    assert len(rows) == 5
    for first, attack, count, *cells in rows:
        suite, title = re.findall(r"`(\w+)`", first)
        found = results(suite, title)
        assert cells == [*measured(suite, title), difference(suite, title, "best")], first
        assert attack.replace("-", "").lower() == found["primary"]
        assert {seeds(row, found["primary"]) for name, row in found["rows"].items()
                if plain(name) in ("at_x3", "mat")} == {int(count)}


def test_the_answer_shows_the_figure_of_every_table_that_was_measured() -> None:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    shown = re.findall(r'<img src="\.\./benchmarks/results/first/([^"]+)"', text)
    assert sorted(shown) == sorted(str(file.relative_to(FIRST)) for file in FIRST.glob("*_figures/*.svg"))


def test_mean_peer_and_ensemble_of_every_table_are_quoted_as_measured() -> None:
    heading = "## Mutual against independent peers"
    names = [re.findall(r"`(\w+)`", head) for head in heads(WHOLE, heading)]
    for first, count, *cells in table(WHOLE, heading):
        suite, title = re.findall(r"`(\w+)`", first)[:2]
        found = results(suite, title)
        for (name,), cell in zip(names[2:], cells, strict=True):
            known = [row for key, row in found["rows"].items() if plain(key) == name]
            if cell == "-":
                assert not known or not known[0]["accuracy"], (first, name)
                continue
            (row,) = known
            shown = ", ".join(percent(row, kind, found["primary"]) for kind in ("mean", "ensemble"))
            fewer = seeds(row, found["primary"])
            assert cell == shown + (f" ({fewer})" if fewer < int(count) else ""), (first, name)


def test_the_union_is_quoted_as_measured() -> None:
    heading = "## Three norms"
    columns = [head.partition(" ")[0] for head in heads(WHOLE, heading)][2:]
    found = results("cpu", "union")["rows"]
    rows = table(WHOLE, heading)
    assert len(rows) == len(found)
    shares = {}
    for name, count, *cells in rows:
        row = found[name.strip("`")]
        kind = "best" if "mean" not in row["accuracy"]["last"] else "mean"
        assert cells == [percent(row, kind, column) for column in columns], name
        assert str(seeds(row, "union")) == count, name
        shares[row["row"]] = f"{100 * row['accuracy']['last'][kind]['union']['mean']:.0f}"
    text = " ".join((ROOT / PAGE).read_text(encoding="utf-8").split())
    assert (f"alone withstand {shares['generalist']} to {shares['generalist_max']} %; with AEs of their own "
            f"{shares['generalist_msd']} %, below `max` and `ramp` at {shares['max']} %") in text
    assert shares["max"] == shares["ramp"]


# The rows of README.md in their order: suite and table of the committed results.
QUOTED = (("cpu", "linf"), ("cpu", "overfit"), ("cpu_cifar10", "linf"), ("gpu", "linf"))


def test_the_readme_quotes_accuracies_and_differences_as_measured() -> None:
    rows = table("README.md", "## What it is worth")
    assert len(rows) == len(QUOTED)
    for (suite, title), (_, _, count, *cells) in zip(QUOTED, rows, strict=True):
        assert cells == measured(suite, title)
        found = results(suite, title)
        by_name = {plain(name): row for name, row in found["rows"].items()}
        assert seeds(by_name["mat"], found["primary"]) == int(count)
