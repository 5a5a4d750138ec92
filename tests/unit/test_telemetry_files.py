"""Files of the reporter: metrics.jsonl, summary.csv, rank logs."""

from __future__ import annotations

import csv
import errno
import io
import json
import logging
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mat_dist.errors import OutputError
from mat_dist.runs import metrics
from mat_dist.runs.console import per_peer
from mat_dist.runs.metrics import Reporter, RunReporter
from mat_dist.runs.session import close_logger, rank_logger

EPOCH = {"epoch": 1, "step": 12, "loss": [1.5, math.nan], "clean_acc": [0.5, 0.25], "robust_acc": [0.4, None],
         "images_per_s": 100.0, "lr": 0.1}


def reporter(folder: Path, attempt: int = 1) -> RunReporter:
    made = RunReporter(folder, console="off", attempt=attempt)
    made.start(100, ["a", "b"])
    return made


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_log_step_is_one_json_object_with_kind_and_attempt(tmp_path):
    out = reporter(tmp_path, attempt=3)
    out.log({"step": 1, "loss": [0.5, 0.25], "note": None})
    out.log({"step": 2, "loss": [0.5, 0.25], "deep": {"x": [1, 2]}})
    assert lines(tmp_path) == [
        {"kind": "step", "attempt": 3, "step": 1, "loss": [0.5, 0.25], "note": None},
        {"kind": "step", "attempt": 3, "step": 2, "loss": [0.5, 0.25], "deep": {"x": [1, 2]}}]


def test_a_record_is_on_disk_when_log_returns(tmp_path):
    out = reporter(tmp_path)
    out.log({"step": 1})
    assert len(lines(tmp_path)) == 1  # not closed, read through another handle


def test_non_finite_numbers_become_null_and_are_named():
    line = metrics.json_line({"loss": [1.0, math.nan], "deep": {"worst": -math.inf}, "ok": 2})
    assert json.loads(line, parse_constant=pytest.fail) == {
        "loss": [1.0, None], "deep": {"worst": None}, "ok": 2,
        "non_finite": {"loss.1": "nan", "deep.worst": "-inf"}}


def test_a_value_that_json_cannot_hold_is_refused():
    with pytest.raises(TypeError):
        metrics.json_line({"step": object()})


NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.none() | st.booleans()


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=5), NUMBERS | st.text(max_size=5) | st.lists(st.lists(NUMBERS, max_size=2),
                                                                                      max_size=2), max_size=3))
def test_finite_records_survive_the_round_trip(record):
    line = metrics.json_line(record)
    assert line.count("\n") == 1
    assert json.loads(line) == record


def test_summary_has_a_row_per_epoch_and_peer(tmp_path):
    out = reporter(tmp_path, attempt=1)
    out.epoch(EPOCH)
    out.epoch({**EPOCH, "epoch": 2, "ema_clean_acc": [0.6, 0.7]})
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [(row["epoch"], row["peer"]) for row in rows] == [("1", "a"), ("1", "b"), ("2", "a"), ("2", "b")]
    assert rows[0] == {"epoch": "1", "step": "12", "attempt": "1", "peer": "a", "loss": "1.5", "clean_acc": "0.5",
                       "robust_acc": "0.4", "ema_clean_acc": "", "ema_robust_acc": "", "images_per_s": "100.0",
                       "lr": "0.1"}
    assert (rows[1]["loss"], rows[1]["robust_acc"], rows[3]["ema_clean_acc"]) == ("nan", "", "0.7")
    assert [line["kind"] for line in lines(tmp_path)] == ["epoch", "epoch"]


def test_summary_takes_what_the_epoch_record_lacks_from_the_last_log_step(tmp_path):
    out = reporter(tmp_path)
    out.log({"step": 11, "loss": [3.0, 4.0], "images_per_s": 50.0, "lr": [0.1, 0.2], "clean_acc": [0.1, 0.1]})
    out.epoch({"epoch": 1, "step": 12, "lr": [0.3, 0.4]})
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert [(row["loss"], row["images_per_s"], row["lr"], row["clean_acc"]) for row in rows] == [
        ("3.0", "50.0", "0.3", ""), ("4.0", "50.0", "0.4", "")]
    assert "loss" not in lines(tmp_path)[-1]


def test_a_resumed_run_appends_below_one_header(tmp_path):
    reporter(tmp_path).epoch(EPOCH)
    reporter(tmp_path, attempt=2).epoch({**EPOCH, "epoch": 2})
    rows = list(csv.reader((tmp_path / "summary.csv").open()))
    assert rows[0] == list(metrics.SUMMARY_COLUMNS)
    assert [row[0] for row in rows[1:]] == ["1", "1", "2", "2"]
    assert [line["attempt"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("tail", ['{"step": 2, "lo', "x" * 200_000])
def test_a_half_written_record_is_cut_off_on_resume(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":0}\n{"step":1}\n' + tail)
    reporter(tmp_path).log({"step": 1})
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 1]


@pytest.mark.parametrize(("before", "after"), [("", ""), ("half", ""), ("whole\n", "whole\n"), ("\nhalf", "\n")])
def test_only_the_text_after_the_last_line_end_is_cut(tmp_path, before, after):
    path = tmp_path / "file"
    path.write_text(before)
    metrics.drop_partial_line(path)
    assert path.read_text() == after


def test_a_summary_with_other_columns_is_refused(tmp_path):
    (tmp_path / "summary.csv").write_text("epoch,peer\n1,a\n")
    with pytest.raises(OutputError, match=r"another version.*summary\.csv.*run\.name"):
        RunReporter(tmp_path, console="off")
    assert (tmp_path / "summary.csv").read_text() == "epoch,peer\n1,a\n"


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    out = reporter(tmp_path)
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: FullDisk())
    with pytest.raises(OutputError, match=r"No space left on device; .*free \(.*metrics\.jsonl\): free some space"):
        out.log({"step": 1})


def test_a_missing_folder_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match=r"summary\.csv"):
        RunReporter(tmp_path / "absent", console="off")


def test_a_wrong_number_of_peers_is_refused():
    with pytest.raises(ValueError, match="3 values for 2 peers"):
        per_peer([1, 2, 3], 2)


def test_the_reporter_of_the_other_ranks_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    silent = Reporter()
    silent.start(1, ["a"], first_step=0)
    for verb in ("log", "epoch", "note", "table"):
        getattr(silent, verb)({})
    silent.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_rank_log_holds_tracebacks_and_the_console_nothing(tmp_path, capsys):
    before = list(logging.getLogger().handlers)
    log = rank_logger(tmp_path, 2)
    log.debug("too small")
    log.info("begin %d", 7)
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        log.exception("failed")
    close_logger(log)
    text = (tmp_path / "rank_2.log").read_text()
    assert "Z [rank 2] INFO begin 7\n" in text
    assert "Traceback" in text and "RuntimeError: broken" in text and "too small" not in text
    assert capsys.readouterr() == ("", "")
    assert logging.getLogger().handlers == before
    assert log.name not in logging.Logger.manager.loggerDict


def test_rank_logs_of_two_runs_in_one_process_stay_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = rank_logger(tmp_path / "a", 0), rank_logger(tmp_path / "b", 0)
    first.info("to a")
    second.info("to b")
    close_logger(first)
    close_logger(second)
    assert "to b" not in (tmp_path / "a" / "rank_0.log").read_text()
    assert (tmp_path / "b" / "rank_0.log").read_text().count("\n") == 1


def test_a_rank_log_that_cannot_be_opened_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match=r"rank_0\.log"):
        rank_logger(tmp_path / "absent", 0)
