"""The reader of result files: three formats give one result, and what is damaged or hostile is one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mat_dist.checkpoints import Meta
from mat_dist.config import load_config
from mat_dist.errors import NotReportable
from mat_dist.evaluation.results import Result, TargetResult, Verdict, read_images, read_result, read_results
from mat_dist.evaluation.soundness import judge_headline, judge_training

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


@pytest.mark.parametrize(("asked", "name", "whole"), [
    (None, "autoattack", True), ({"version": "standard", "custom": []}, "autoattack", True),
    ({"version": "plus", "custom": []}, "autoattack (plus)", True),
    ({"version": "rand", "custom": []}, "autoattack (rand)", False),
    ({"version": "custom", "custom": ["square", "fab"]}, "autoattack (square, fab)", False)])
def test_some_attacks_of_autoattack_are_not_called_autoattack(asked: Any, name: str, whole: bool,
                                                              tmp_path: Path) -> None:
    document = {**NEW, "attacks": ["pgd", "autoattack"], "autoattack": asked}
    found = read_result(write(tmp_path, document))
    assert (list(found.named_attacks()), found.by_autoattack) == (["PGD-20 x 2", name], whole)
    assert not read_result(write(tmp_path, NEW)).by_autoattack


@pytest.mark.parametrize("change", [
    {"format": 3}, {"format": [2]}, {"step": "x"}, {"targets": []}, {"targets": {}}, {"threats": []},
    {"autoattack": "standard"},
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


# ------------------------------------------------------------------------------------------------ what is reportable


@pytest.mark.parametrize(("clean", "labels", "failed"), [
    (0.9, [0, 1] * 6, ["too few images"]), (0.9, [0, 1] * 149, ["too few images"]), (0.9, [0, 1] * 150, []),
    (0.54, [0, 1] * 5000, ["near chance"]), (0.6, [0, 1] * 5000, []),
    (0.18, list(range(10)) * 100, ["near chance"]), (0.3, list(range(10)) * 100, []),
    (0.92, [0] * 900 + [1] * 100, ["near chance"]),  # nine of ten by always saying 0
    (0.0, [0, 1] * 6, ["too few images", "near chance"])])
def test_few_images_and_models_near_chance_are_no_headline(clean: float, labels: list[int], failed: list[str]) -> None:
    verdicts = judge_headline(clean, labels, len(set(labels)))
    assert [one.check for one in verdicts if not one.passed] == failed
    assert all(str(len(labels)) in one.found for one in verdicts if one.check == "too few images")


@pytest.mark.parametrize(("epoch", "settings", "extra", "passed"), [
    (15, [], {}, True), (14, [], {}, False), (4, ["train.epochs=4"], {}, False), (5, ["train.epochs=5"], {}, True),
    (6, ["train.max_steps=90"], {}, True), (1, ["train.max_steps=20"], {}, False),
    (3, ["train.epochs=3", "peers.all.init_from=runs/a"], {}, True),  # fine-tuning
    (1, ["train.epochs=3", "peers.all.init_from=runs/a"], {}, False), (0, [], {"imported": {}}, True)])
def test_an_unfinished_and_a_short_training_are_no_headline(epoch: int, settings: list[str], extra: dict[str, Any],
                                                           passed: bool) -> None:
    config = load_config(None, settings)
    meta = Meta(epoch, (), "", "", extra)
    verdict = judge_training(config, meta, 15 * epoch)
    assert verdict.passed is passed and verdict.found.startswith(f"{epoch} of {config.train.epochs} epochs")


def test_a_result_that_is_only_too_small_for_a_headline_is_sound() -> None:
    def result(*checks: tuple[str, bool]) -> Result:
        verdicts = tuple(Verdict(check, "", passed, "") for check, passed in checks)
        target = TargetResult("peer0", "raw", 400, {}, checks=verdicts)
        return Result(1, "test", "", 0, (), (target,), {}, (), reportable=all(passed for _, passed in checks))

    assert result(("noise", True)).sound and result(("noise", True), ("undertrained", False)).sound
    assert not result(("noise", False)).sound and not result(("noise", False), ("undertrained", False)).sound
    assert not replace(result(), reportable=False).sound  # no checks were made
    assert TargetResult("peer0", "raw", 12, {}).failed == ("too few images",)  # a file that says nothing of it
