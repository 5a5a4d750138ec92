"""The accuracies that docs/evidence.md and README.md quote are those of the committed results."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from tests.documents import ROOT, heads, table

PAGE = "docs/evidence.md"
FIRST = ROOT / "benchmarks/results/first"


@cache
def results(suite: str, title: str) -> dict[str, Any]:
    """Rows of a table by name, and its primary column."""
    document = json.loads((FIRST / f"{suite}.json").read_text(encoding="utf-8"))
    found = document["tables"][title]
    return {"primary": found["primary"], "rows": {row["row"]: row for row in found["rows"]}}


def percent(row: dict[str, Any], kind: str, column: str) -> str:
    return f"{100 * row['accuracy']['last'][kind][column]['mean']:.1f}"


def seeds(row: dict[str, Any], column: str) -> int:
    return max(len(found[column]["by_seed"]) for found in row["accuracy"]["last"].values() if column in found)


def test_mean_peer_and_ensemble_of_every_table_are_quoted_as_measured() -> None:
    heading = "### Mutual against independent peers"
    names = [re.findall(r"`(\w+)`", head) for head in heads(PAGE, heading)]
    for first, count, *cells in table(PAGE, heading):
        suite, title = re.findall(r"`(\w+)`", first)[:2]
        found = results(suite, title)
        for (name,), cell in zip(names[2:], cells, strict=True):
            known = [row for key, row in found["rows"].items()
                     if key.removeprefix("long_").removeprefix("over_").replace("_x2", "_x3") == name]
            if cell == "-":
                assert not known or not known[0]["accuracy"], (first, name)
                continue
            (row,) = known
            measured = ", ".join(percent(row, kind, found["primary"]) for kind in ("mean", "ensemble"))
            fewer = seeds(row, found["primary"])
            assert cell == measured + (f" ({fewer})" if fewer < int(count) else ""), (first, name)


def test_the_union_is_quoted_as_measured() -> None:
    heading = "### Three norms"
    columns = [head.partition(" ")[0] for head in heads(PAGE, heading)][2:]
    found = results("cpu", "union")["rows"]
    rows = table(PAGE, heading)
    assert len(rows) == len(found)
    for name, count, *cells in rows:
        row = found[name.strip("`")]
        kind = "best" if "mean" not in row["accuracy"]["last"] else "mean"
        assert cells == [percent(row, kind, column) for column in columns], name
        assert str(seeds(row, "union")) == count, name


# The rows of README.md in their order: suite and table of the committed results.
QUOTED = (("cpu", "linf"), ("cpu", "overfit"), ("cpu_cifar10", "linf"), ("gpu", "linf"))


def test_the_readme_quotes_accuracies_and_differences_as_measured() -> None:
    rows = table("README.md", "## What it is worth")
    assert len(rows) == len(QUOTED)
    for (suite, title), (_, _, count, *cells) in zip(QUOTED, rows, strict=True):
        document = json.loads((FIRST / f"{suite}.json").read_text(encoding="utf-8"))["tables"][title]
        column = document["primary"]
        by_name = {row["row"].removeprefix("over_").replace("_x2", "_x3"): row for row in document["rows"]}
        found = [one for one in document["differences"] if one["kind"] == "mean" and one["checkpoint"] == "last"
                 and one["column"] == column and one["row"] == by_name["mat"]["row"]
                 and one["control"] == by_name["at_x3"]["row"]]
        assert len(found) == 1
        points = "{:+.2f} ({:+.2f} to {:+.2f})".format(*(100 * found[0][key] for key in ("mean", "low", "high")))
        assert cells == [percent(by_name["at_x3"], "mean", column), percent(by_name["mat"], "mean", column), points]
        assert seeds(by_name["mat"], column) == int(count)
