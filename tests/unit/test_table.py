"""The table over seeds, on made-up result files, against numbers worked out by hand."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mat_dist.tools.table import differing, main


def write(root: Path, run: str, seed: int, shares: dict[str, tuple[float, float]], *, label: str = "last",
          step: int = 100, suffix: str = "", time: str = "2026-01-01T00:00:00+00:00", steps: int = 20,
          threats: tuple[str, ...] = ("linf 8/255",), **settings: Any) -> str:
    """A result file with (clean, robust) for each target; the weakest threat's share is the union's."""
    folder = root / run
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").touch()
    targets = [{"target": target, "weights": "raw", "n": 100,
                "accuracy": {"clean": clean, **dict.fromkeys(threats, robust), "union": robust}}
               for target, (clean, robust) in shares.items()]
    document = {"format": 2, "checkpoint": label, "step": step, "split": "test", "time": time, "seed": seed,
                "targets": targets,
                "threats": [dict(zip(("norm", "eps"), threat.split(), strict=True)) for threat in threats],
                "attacks": ["pgd"], "plans": {"pgd": {"steps": steps, "restarts": 1}},
                "config": {"run": {"seed": seed, "root": str(root)}, "train": {"epochs": 3, **settings}}}
    (folder / "eval" / f"test_{label}_step_{step:08d}{suffix}.json").write_text(json.dumps(document))
    return str(folder)


@pytest.fixture
def table(capsys: pytest.CaptureFixture[str]):
    """The rows of the Markdown table for some folders, as lists of cells, with the exit code and stderr."""
    def run(*folders: str) -> tuple[list[list[str]], int, str]:
        code = main(folders)
        out, err = capsys.readouterr()
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()
                if line.startswith("| ")], code, err
    return run


def test_the_mean_and_the_sample_deviation_are_those_worked_out_by_hand(table, tmp_path):
    # clean 0.80, 0.84, 0.85: mean 0.83, deviations -3, 1, 2 (squares 9 + 1 + 4 = 14), sqrt(14 / 2) = 2.6458 points.
    # robust 0.40, 0.50, 0.60: mean 0.50, sqrt((100 + 0 + 100) / 2) = 10 points.
    folders = [write(tmp_path, f"digits-seed{seed}", seed, {"peer0": values})
               for seed, values in enumerate([(0.80, 0.40), (0.84, 0.50), (0.85, 0.60)])]
    rows, code, err = table(*folders)
    assert (code, err) == (0, "")
    assert rows == [["runs", "target", "weights", "checkpoint", "attack", "clean %", "linf 8/255 %", "seeds"],
                    ["---"] * 5 + ["---:"] * 3,
                    ["digits", "peer0", "raw", "last", "PGD-20", "83.00 ± 2.65", "50.00 ± 10.00", "3: 0, 1, 2"]]


def test_one_seed_has_a_mean_and_no_deviation(table, tmp_path):
    rows, _, _ = table(write(tmp_path, "a-seed7", 7, {"peer0": (0.5, 0.25)}))
    assert rows[2] == ["a", "peer0", "raw", "last", "PGD-20", "50.00", "25.00", "1: 7"]


def test_runs_that_differ_in_more_than_the_seed_are_rows_of_their_own(table, tmp_path):
    folders = [write(tmp_path, "a-seed0", 0, {"peer0": (0.5, 0.2), "ensemble": (0.7, 0.3)}),
               write(tmp_path, "a-seed1", 1, {"peer0": (0.7, 0.4), "ensemble": (0.7, 0.3)}),
               write(tmp_path, "b-seed0", 0, {"peer0": (0.9, 0.6)}, lr=0.1),
               write(tmp_path / "again", "a-seed2", 2, {"peer0": (0.1, 0.0)}, lr=0.2)]
    rows, _, _ = table(*folders)
    assert [(row[0], row[1], row[2], row[6], row[-1]) for row in rows[2:]] == [
        ("a", "train.lr=null", "peer0", "60.00 ± 14.14", "2: 0, 1"),
        ("a", "train.lr=null", "ensemble", "70.00 ± 0.00", "2: 0, 1"),
        ("b", "train.lr=0.1", "peer0", "90.00", "1: 0"), ("a (2)", "train.lr=0.2", "peer0", "10.00", "1: 2")]


@pytest.mark.parametrize(("runs", "name"), [
    (["mat-s0", "mat-s1"], "mat"), (["mat_lr0.1_s1", "mat_lr0.1_s10"], "mat_lr0.1"), (["run1", "run2"], "run"),
    (["digits-20260101T000000Z", "digits-20260102T000000Z"], "digits"), (["a", "b"], "a"), (["mat-s0"], "mat-s0"),
    (["mat_seed3"], "mat"), (["7", "8"], "7")])
def test_a_row_is_called_by_what_its_runs_have_in_common(table, tmp_path, runs, name):
    folders = [write(tmp_path, run, seed, {"peer0": (0.5, 0.2)}) for seed, run in enumerate(runs)]
    ((label, *_, seeds),) = table(*folders)[0][2:]
    assert (label, seeds) == (name, f"{len(runs)}: {', '.join(map(str, range(len(runs))))}")


def test_checkpoints_and_several_threats_have_rows_and_columns_of_their_own(table, tmp_path):
    for label, step, robust in (("best", 80, 0.3), ("last", 100, 0.2)):
        folder = write(tmp_path, "a", 0, {"peer0": (0.5, robust)}, label=label, step=step,
                       threats=("linf 1/10", "l2 1/2"))
    other = write(tmp_path, "b", 0, {"peer0": (0.5, 0.1)}, steps=50)
    rows, _, _ = table(folder, other)
    assert rows[0][5:] == ["clean %", "linf 1/10 %", "l2 1/2 %", "linf 8/255 %", "union %", "seeds"]
    assert [row[3:] for row in rows[2:]] == [
        ["best", "PGD-20", "50.00", "30.00", "30.00", "-", "30.00", "1: 0"],
        ["last", "PGD-20", "50.00", "20.00", "20.00", "-", "20.00", "1: 0"],
        ["last", "PGD-50", "50.00", "-", "-", "10.00", "-", "1: 0"]]


def test_runs_whose_images_lie_elsewhere_share_a_row_and_those_with_other_images_do_not(table, tmp_path):
    folders = []
    for seed, root, digest in ((0, "/here", "12"), (1, "/there", "12"), (2, "/here", "34")):
        folders.append(write(tmp_path, f"a-s{seed}", seed, {"peer0": (0.5, 0.2)}))
        (file,) = Path(folders[-1], "eval").iterdir()
        document = json.loads(file.read_text())
        document["config"]["data"] = {"name": "folder", "root": root, "cache": root}
        file.write_text(json.dumps({**document, "data_digest": digest}))
    rows, code, _ = table(*folders)
    assert [(row[0], row[1], row[-1]) for row in rows[2:]] == [
        ("a", "data digest=12", "2: 0, 1"), ("a-s2", "data digest=34", "1: 2")] and code == 0


def peers(*loss: str, **more: Any) -> list[dict[str, Any]]:
    return [{"name": f"peer{index}", "loss": {"preset": preset, "kd_weight": len(preset)}, "model": more}
            for index, preset in enumerate(loss)]


def test_a_group_is_labelled_by_the_settings_in_which_it_differs_alone():
    """What all peers share stands there once; what follows from a preset does not stand beside it."""
    same = {"data": {"name": "digits"}, "optim": {"args": {"a": [1, 2]}}}
    groups = {"one": {**same, "peers": peers("mat", "mat", width=1)},
              "two": {**same, "peers": peers("at", "at", width=1)},
              "three": {**same, "peers": peers("mat", "at", width=2)}, "four": {"peers": peers("mat", width=1)}}
    found = differing(groups)
    assert found["one"] == {"peers": 2, "data.name": "digits", "optim.args.a": [1, 2], "loss.preset": "mat",
                            "model.width": 1, "peers.0.loss.preset": None, "peers.1.loss.preset": None}
    assert (found["two"]["loss.preset"], found["three"]["model.width"], found["four"]["peers"]) == ("at", 2, 1)
    assert found["three"]["peers.1.loss.preset"] == "at" and not any("kd_weight" in key for key in found["three"])
    assert differing({"one": groups["one"]}) == {"one": {}}


def test_programs_get_the_same_numbers_as_csv_and_as_json(tmp_path, capsys):
    folders = [write(tmp_path, f"a-seed{seed}", seed, {"peer0": (share, 0.25)}) for seed, share in ((0, 0.8), (1, 0.4))]
    folders.append(write(tmp_path, "b", 0, {"peer0": (0.5, 0.125)}, lr=0.1, threats=("l2 1/2",)))
    assert main(["--json", *folders]) == 0
    one, other = json.loads(capsys.readouterr().out)
    assert one["mean"] == {"clean": pytest.approx(0.6), "linf 8/255": 0.25, "union": 0.25} and one["seeds"] == [0, 1]
    assert one["deviation"]["clean"] == pytest.approx(0.2 * 2**0.5) and other["deviation"]["clean"] is None
    assert (one["settings"], other["settings"]) == ({"train.lr": None}, {"train.lr": 0.1})
    assert main([*folders, "--csv"]) == 0
    first, second = csv.DictReader(capsys.readouterr().out.splitlines())
    assert (first["runs"], first["seeds"], float(first["clean"])) == ("a", "0 1", one["mean"]["clean"])
    assert float(first["clean deviation"]) == one["deviation"]["clean"] and first["l2 1/2"] == ""
    assert (second["settings"], second["l2 1/2"], second["clean deviation"]) == ("train.lr=0.1", "0.125", "")


def test_the_newest_evaluation_of_a_checkpoint_counts(table, tmp_path):
    write(tmp_path, "a", 0, {"peer0": (0.1, 0.1)}, step=50)
    write(tmp_path, "a", 0, {"peer0": (0.2, 0.2)}, step=100)
    write(tmp_path, "a", 0, {"peer0": (0.3, 0.3)}, step=100, suffix="-10")
    folder = write(tmp_path, "a", 0, {"peer0": (0.4, 0.4)}, step=100, suffix="-2")
    assert table(folder)[0][2][5] == "30.00"
    write(tmp_path, "a", 0, {"peer0": (0.5, 0.5)}, step=60, time="2026-01-02T00:00:00+00:00")
    assert table(folder)[0][2][5] == "50.00"


def point(folder: str, best: int, last: int) -> None:
    """Let the run name its checkpoints."""
    (Path(folder) / "checkpoints").mkdir(exist_ok=True)
    for name, step in (("best", best), ("latest", last)):
        (Path(folder) / "checkpoints" / name).write_text(f"step_{step:08d}\n")


def test_a_result_counts_only_while_its_checkpoint_is_the_best_or_the_last(table, tmp_path):
    write(tmp_path, "a", 0, {"peer0": (0.1, 0.1)}, step=30, label="best")
    folder = write(tmp_path, "a", 0, {"peer0": (0.2, 0.2)}, step=40, label="last")
    for best, last, expected in ((30, 40, [("best", "10.00"), ("last", "20.00")]), (30, 60, [("best", "10.00")]),
                                 (40, 60, [("best", "20.00")])):
        point(folder, best, last)
        assert [(row[3], row[5]) for row in table(folder)[0][2:]] == expected
    point(folder, 50, 60)
    rows, code, err = table(folder)
    assert (rows, code) == ([], 16) and "has no test results of its best or last checkpoint yet" in err
    write(tmp_path, "a", 0, {"peer0": (0.3, 0.3)}, step=50, label="best", time="2025-01-01T00:00:00+00:00")
    assert [(row[3], row[5]) for row in table(folder)[0][2:]] == [("best", "30.00")]


def test_an_unfinished_run_is_left_out_and_named(table, tmp_path):
    folders = [write(tmp_path, "a-seed0", 0, {"peer0": (0.5, 0.2)}), str(tmp_path / "a-seed1")]
    (tmp_path / "a-seed1").mkdir()
    (tmp_path / "a-seed1" / "config.yaml").touch()
    rows, code, err = table(*folders)
    assert (code, rows[2][-1]) == (0, "1: 0")
    assert err == (f"mat_dist: warning: {folders[1]} has no test results of its best or last checkpoint yet and is "
                   "left out\n")
    _, code, err = table(folders[1])
    assert code == 16 and "none of the runs has test results" in err


@pytest.mark.parametrize(("text", "problem"), [
    ("[]", "not a result file"), ("{", "not a result file"), ('{"time": "x"}', "not a result file: step: ")])
def test_a_damaged_result_file_is_one_line(table, tmp_path, text, problem):
    folder = write(tmp_path, "a", 0, {"peer0": (0.5, 0.2)})
    file = next(Path(folder, "eval").iterdir())
    file.write_text(text)
    rows, found, err = table(folder)
    assert (found, rows) == (16, []) and err.count("\n") == 1
    assert problem in err and str(file) in err


def test_one_seed_given_twice_is_refused(table, tmp_path):
    folders = [write(tmp_path, name, 3, {"peer0": (0.5, 0.2)}) for name in ("a", "b")]
    _, code, err = table(*folders)
    assert code == 2 and "a and b have the same settings and seed 3" in err


def test_a_folder_that_is_no_run_is_refused(table, tmp_path):
    _, code, err = table(str(tmp_path))
    assert code == 2 and "is not the folder of a run" in err
    assert main(["--csv"]) == 2  # none is given


def test_without_folders_the_command_says_what_it_takes(capsys):
    assert main([]) == 2
    assert re.search(r"nothing is given.*write python -m mat_dist\.table RUN", capsys.readouterr().err)
