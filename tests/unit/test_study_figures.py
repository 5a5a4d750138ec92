"""The figure of each table: whose numbers, with which intervals, rows that are mutual apart from controls."""

from __future__ import annotations

import math
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.study.figures import figure, shown
from benchmarks.study.pages import evidence_page
from benchmarks.study.statistics import accuracy_interval, share_interval


def test_an_accuracy_of_one_seed_has_the_interval_of_two_images_more_of_each_kind() -> None:
    """Agresti and Coull: 7 of 10 right, 9 of 14 with those."""
    share = 9 / 14
    half = 1.959964 * math.sqrt(share * (1 - share) / 14)
    assert accuracy_interval([dict.fromkeys(range(7), 1.0) | dict.fromkeys(range(7, 10), 0.0)]) == pytest.approx(
        (0.7 - half, min(0.7 + half, 1.0)))


def test_an_accuracy_of_several_seeds_has_the_wider_interval_of_seeds_and_images() -> None:
    """Means .4 and .6 of 2,000 images: t of one degree of freedom, 12.706 times .1."""
    seeds = [dict.fromkeys(range(2000), 0.4), dict.fromkeys(range(2000), 0.6)]
    assert accuracy_interval(seeds) == (0.0, 1.0)  # 0.5 - 1.27 is cut
    near = [dict.fromkeys(range(2000), 0.49), dict.fromkeys(range(2000), 0.51)]
    assert accuracy_interval(near) == pytest.approx((0.5 - 0.12706, 0.5 + 0.12706), rel=1e-3)


def test_means_alone_give_no_narrower_interval_than_the_images_behind_them() -> None:
    """Single peers in all seeds alike: the same. Mean peers, or seeds that differ: narrower with the images."""
    right = {image: float(image < 60) for image in range(100)}
    assert accuracy_interval([right] * 3) == pytest.approx(share_interval([0.6] * 3, 100))
    mixed = {image: image % 4 / 3 for image in range(100)}
    wide, narrow = share_interval([0.5], 100), accuracy_interval([mixed])
    assert wide[1] - wide[0] > narrow[1] - narrow[0]


def cell(mean: float) -> dict[str, Any]:
    return {"mean": mean, "deviation": None, "by_seed": {"0": mean}, "images": 100,
            "interval": [mean - 0.1, mean + 0.1]}


def row(name: str, mutual: bool, accuracy: dict[str, Any], kinds: tuple[str, ...] = ("mean",)) -> dict[str, Any]:
    return {"row": name, "mutual": mutual, "kinds": list(kinds), "accuracy": accuracy, "peers": 2, "averages": False,
            "why": {"curves": {"robust": [[1.0, 0.2], [2.0, 0.3]]}, "peers": {}, "seeds": {}}}


def table(**more: Any) -> dict[str, Any]:
    rows = [row("at", False, {"last": {"mean": {"clean": cell(0.9), "pgd": cell(0.5)}}}),
            row("mat", True, {"last": {"mean": {"pgd": cell(0.6)}, "best": {"pgd": cell(0.7)}},
                              "best": {"mean": {"pgd": cell(0.65)}}}, ("mean", "best")),
            row("generalist", True, {"last": {"best": {"pgd": cell(0.3)}}}, ("best",)), row("later", False, {})]
    return {"title": "Small", "primary": "pgd", "columns": ["clean", "pgd", "apgd"], "rows": rows, **more}


def texts(chart: Any) -> list[str]:
    tree = ElementTree.fromstring(chart.svg)
    return [text for node in tree.iter() if node.tag.endswith("text") and (text := "".join(node.itertext()).strip())]


def test_mutual_rows_stand_apart_from_controls_and_rows_without_results_are_left_out() -> None:
    """The mean peer of each row, last and best checkpoint; the best peer, with a star, of one that has no mean."""
    made = figure(table())
    assert made is not None
    names = [text for text in texts(made) if text in ("mutual:", "mat", "generalist *", "controls:", "at", "later")]
    assert names == ["mutual:", "mat", "generalist *", "controls:", "at"]
    assert "pgd, last checkpoint" in texts(made) and "pgd, best checkpoint" in texts(made)
    assert made.description.endswith(
        "mat (mutual): pgd last 60.0 (50.0 to 70.0), pgd best 65.0 (55.0 to 75.0); "
        "generalist (mutual): pgd last 30.0 (20.0 to 40.0); at (controls): pgd last 50.0 (40.0 to 60.0)")
    assert "prefers-color-scheme:dark" in made.svg


def test_a_primary_column_without_a_best_checkpoint_has_one_beside_it_that_was_measured_at_both() -> None:
    one = table()
    assert shown(one) == [("pgd", "last"), ("pgd", "best")]
    for some in one["rows"]:
        for found in some["accuracy"].values():
            for columns in found.values():
                columns["apgd"] = cell(0.1)
                if found is some["accuracy"].get("best"):
                    del columns["pgd"]
    assert shown(one) == [("pgd", "last"), ("apgd", "last"), ("apgd", "best")]


def test_a_table_may_ask_for_curves_with_a_line_for_each_row() -> None:
    made = figure(table(figure="curves"))
    assert made is not None
    assert [text for text in texts(made) if text.split(",")[0] in ("mat", "generalist", "at", "later")] == [
        "mat, mutual", "generalist, mutual", "at", "later"]


def test_a_table_without_results_has_no_figure() -> None:
    assert figure(table(rows=[row("later", True, {})])) is None
    assert figure(table(figure="curves", rows=[])) is None


def test_every_table_of_a_page_begins_with_its_figure() -> None:
    empty = {"settings": [], "evaluations": {}, "controls": [], "differences": [],
             "comparisons": {"made": [], "column": "pgd", "left_out": [], "several": 0, "by_chance": 0.0}}
    rows = [{**one, "cost": None, "seeds": {}, "error": "", "says": "x", "remark": "", "settings": [], "tried": 1,
             "config_digest": "", "train_seconds": None} for one in table()["rows"]]
    document = {"suite": "cpu", "file": "plan.yaml", "file_digest": "0", "settings": [], "config": "digits",
                "base_settings": [], "seeds": [0], "git": None, "machines": [], "runs": {"done": 0, "all": 1},
                "tables": {"one": table(**empty, rows=rows), "two": table(**empty, rows=[])}}
    lines = evidence_page(document).splitlines()
    one, two = (number for number, line in enumerate(lines) if line == "## Small")
    assert lines[one + 2].startswith('<img src="cpu_figures/one.svg" width="700"')
    assert "<img" not in "\n".join(lines[two:])
