"""The reader of result files: three formats give one result, and what is damaged or hostile is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mat_dist.errors import NotReportable
from mat_dist.evaluation.results import read_images, read_result, read_results

SHARES = {"clean": 0.75, "linf 1/10": 0.5, "union": 0.5}
NEW: dict[str, Any] = {
    "format": 2, "step": 8, "split": "test", "time": "2030-01-01", "seed": 3, "checkpoint": "best", "config": {},
    "threats": [{"norm": "linf", "eps": "1/10", "eps_float": 0.1}], "attacks": ["pgd"],
    "plans": {"pgd": {"steps": 20, "restarts": 2, "step_size": {"linf 1/10": 0.0125}, "loss": "ce", "start": "uniform",
                      "momentum": None, "reach": 2.5, "targets": 0}},
    "targets": [{"target": "peer0", "weights": "raw", "n": 4, "accuracy": SHARES}]}
# What version 0.1 wrote at the end of a training; its evaluate command wrote NEW without its number.
OLD = {key: value for key, value in NEW.items() if key not in ("format", "checkpoint", "attacks", "plans")} | {
    "attack": {"name": "PGD", "loss": "ce", "start": "uniform", "steps": 20, "restarts": 2,
               "step_size": {"linf 1/10": 0.0125}}}
TABLES = {
    "new": "sample,label,threat,attack,target,weights,clean_prediction,prediction,robust,attacked\n"
           "3,1,linf 1/10,pgd,peer0,raw,1,1,1,1\n3,1,linf 1/10,cw,peer0,raw,1,0,0,1\n"
           "5,0,linf 1/10,pgd,peer0,raw,0,0,1,1\n5,0,linf 1/10,cw,peer0,raw,0,0,1,1\n",
    "old": "sample,label,attack,target,weights,clean_correct,robust,attacked\n"
           "3,1,linf 1/10,peer0,raw,1,0,1\n5,0,linf 1/10,peer0,raw,1,1,1\n"}


def write(folder: Path, document: Any, table: str = "new", name: str = "test_best_step_00000008") -> Path:
    file = folder / f"{name}.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    file.with_suffix(".csv").write_text(TABLES.get(table, table))
    return file


@pytest.mark.parametrize(("document", "table"), [
    (NEW, "new"), ({key: value for key, value in NEW.items() if key != "format"}, "new"), (OLD, "old")])
def test_three_formats_are_one_result(document: dict[str, Any], table: str, tmp_path: Path) -> None:
    found = read_result(write(tmp_path, document, table))
    assert (found.step, found.split, found.seed, found.checkpoint) == (8, "test", 3, "best")
    assert (found.attacks, found.plans) == (("pgd",), NEW["plans"]) and list(found.named_attacks()) == ["PGD-20 x 2"]
    assert [one.label for one in found.threats] == ["linf 1/10"] and found.targets[0].accuracy == SHARES
    one = found.images["peer0", "raw"]
    assert one.labels == {3: 1, 5: 0}
    assert one.correct == {"clean": {3: True, 5: True}, "linf 1/10": {3: False, 5: True},
                           "union": {3: False, 5: True}}


@pytest.mark.parametrize("change", [
    {"format": 3}, {"format": [2]}, {"step": "x"}, {"targets": []}, {"targets": {}}, {"threats": []},
    {"targets": [{"target": "a", "weights": "raw", "n": 0, "accuracy": SHARES}]},
    {"targets": [{"target": "a", "weights": "raw", "n": 4, "accuracy": SHARES | {"union": 1.5}}]},
    {"targets": [{"target": "a", "weights": "raw", "n": 4, "accuracy": {"clean": 1.0, "union": 1.0}}]},
    {"plans": {"pgd": {"steps": "many", "restarts": 1}}}, {"plans": {"pgd": {}}}, {"sources": [{}]}, {"attack": 3},
    {"config": {"data": "x"}}, {"attack": {"steps": 1}, "split": None}])
def test_a_document_that_says_something_else_is_refused_in_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path, NEW | change)
    with pytest.raises(NotReportable, match="not a result file") as error:
        read_result(file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"step": NaN}', '{"step": 1, "step": 2}', "[" * 100_000, "\0"])
def test_a_file_that_is_no_document_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    with pytest.raises(NotReportable, match="not a result file") as error:
        read_result(write(tmp_path, text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("table", ["sample\n1\n", "\0", TABLES["new"].replace("3,1", "x,1"), "\n".join(
    [TABLES["new"], "7"])])
def test_a_table_that_is_damaged_is_refused_in_one_line(table: str, tmp_path: Path) -> None:
    file = write(tmp_path, NEW, table).with_suffix(".csv")
    if table == "\0":
        file.unlink()
    with pytest.raises(NotReportable, match="not a table of images") as error:
        read_images(file)
    assert "\n" not in str(error.value)


def test_results_come_from_the_oldest_to_the_newest(tmp_path: Path) -> None:
    for number, time in (("", "2"), ("-2", "2"), ("-10", "2"), ("-3", "1")):
        write(tmp_path, NEW | {"time": time}, name=f"test_best_step_00000008{number}")
    assert [one.number for one in read_results(tmp_path, "test_best_*")] == [3, 1, 2, 10]
