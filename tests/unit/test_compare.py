"""`--compare`: paired differences against numbers worked out by hand, and what cannot be paired."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mat_dist.evaluation.__main__ import main
from mat_dist.evaluation.compare import Paired


def write(root: Path, run: str, robust: str, *, clean: str = "1" * 10, reportable: bool = True, time: str = "1",
          target: str = "peer0", **about: Any) -> str:
    """A result with two attacks: the first breaks nothing, the second what `robust` says, an image a digit."""
    folder = root / run
    (folder / "eval").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").touch()
    shares = {"clean": 1.0, "linf 8/255": robust.count("1") / len(robust), "union": 0.5}
    targets = [{"target": target, "weights": "raw", "n": len(robust), "accuracy": shares, "checks": []}]
    document = {"format": 2, "step": 4, "seed": 0, "targets": targets, "time": time,
                "reportable": reportable, "threats": [{"norm": "linf", "eps": "8/255"}], "split": "test",
                "n": len(robust), "attacks": ["pgd"], "data_digest": "d", "images_digest": "i", "chunk": 8,
                "subset_seed": 0, "config": {"data": {"test_size": None}}, **about}
    for one in document["threats"]:
        shares[f"{one['norm']} {one['eps']}"] = 0.5
    file = folder / "eval" / f"evaluate_test_{time}.json"
    file.write_text(json.dumps(document))
    rows = ["sample,label,threat,attack,target,weights,clean_prediction,prediction,robust,attacked"]
    for sample, (c, r) in enumerate(zip(clean, robust, strict=True)):
        rows += [f"{sample},1,linf 8/255,{attack},{target},raw,{c},{c},{ok},{c}" for attack, ok in (("a", c), ("b", r))]
    file.with_suffix(".csv").write_text("\n".join(rows) + "\n")
    return str(folder)


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str]):
    """The rows of the printed table, the exit code and stderr."""
    def run(*words: str) -> tuple[dict[str, list[str]], int, str]:
        code = main(["--compare", *words])
        out, err = capsys.readouterr()
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
        return {row[1]: row for row in rows}, code, err
    return run


def test_the_difference_is_paired_image_by_image(compare, tmp_path: Path) -> None:
    rows, code, err = compare(write(tmp_path, "a", "1111100000"), write(tmp_path, "b", "1101111100"))
    assert (code, err) == (0, "")
    # 5 and 7 of 10; 3 gained, 1 lost. With half a pair more each: (3.5 - 1.5) / 12 = 16.67 points.
    # half = 1.96 sqrt(5 - 4 / 12) / 12 = 35.28 points. McNemar: 2 (C(4,0) + C(4,1)) / 16 = 0.625.
    assert rows["linf 8/255"] == ["peer0", "linf 8/255", "50.00", "70.00", "+20.00", "-18.62 to +51.95", "3", "1",
                                  "0.625"]
    assert rows["clean"][2:5] == ["100.00", "100.00", "+0.00"] and "union" not in rows


def test_the_interval_and_the_test_are_those_worked_out_by_hand() -> None:
    found = Paired(1000, 30, 10)
    assert found.difference == pytest.approx(0.02)
    assert found.interval == pytest.approx((20 / 1002 - 0.012464, 20 / 1002 + 0.012464), abs=1e-5)
    assert Paired(10, 0, 0).p == 1 and Paired(50, 10, 0).p == pytest.approx(2 / 1024)


def test_the_newest_evaluation_counts(compare, tmp_path: Path) -> None:
    write(tmp_path, "a", "1" * 10, time="1")
    first = write(tmp_path, "a", "0" * 10, time="2")
    rows, _, _ = compare(first, write(tmp_path, "b", "1" * 10))
    assert rows["linf 8/255"][4] == "+100.00"


def test_an_evaluation_counts_for_the_checkpoint_that_it_was_made_of(compare, tmp_path: Path) -> None:
    b = write(tmp_path, "b", "1" * 10)
    write(tmp_path, "a", "1" * 10, checkpoint="best", time="1", files={"peer_0": "x"})
    a = write(tmp_path, "a", "0" * 10, checkpoint="best", time="2", step=2)
    (tmp_path / "a" / "checkpoints" / "step_00000004").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "best").write_text("step_00000004\n")
    assert compare(a, b)[0]["linf 8/255"][2] == "100.00"  # not the newer one, of another step
    manifest = tmp_path / "a" / "checkpoints" / "step_00000004" / "manifest.json"
    manifest.write_text('{"files": [{"name": "peer_0", "sha256": "x"}]}')
    assert compare(a, b)[0]["linf 8/255"][2] == "100.00"
    manifest.write_text('{"files": [{"name": "peer_0", "sha256": "y"}]}')  # trained again to the same step
    _, code, err = compare(a, b)
    assert code == 16 and "a was not evaluated since step 2" in err and err.count("\n") == 1
    write(tmp_path, "a", "0" * 10, checkpoint="step_2", time="3", step=2)  # asked for by its step: never stale
    assert compare(a, b)[0]["linf 8/255"][2] == "0.00"


@pytest.mark.parametrize(("change", "text"), [
    ({"threats": [{"norm": "linf", "eps": "4/255"}]}, "threats linf 8/255 and linf 4/255"),
    ({"threats": [{"norm": "l2", "eps": "8/255"}]}, "threats linf 8/255 and l2 8/255"),
    ({"threats": [{"norm": "linf", "eps": "8/255"}, {"norm": "l2", "eps": "1/2"}]},
     "threats linf 8/255 and linf 8/255, l2 1/2"),
    ({"data_digest": "e"}, "data_digest d and e"), ({"split": "val"}, "split test and val"),
    ({"images_digest": "j"}, "images_digest i and j"), ({"chunk": 4}, "chunk 8 and 4"),
    ({"attacks": ["pgd", "cw"]}, "attacks ['pgd'] and ['pgd', 'cw']"),
    ({"plans": {"pgd": {"steps": 5, "restarts": 1}}}, "plans None and {'pgd': {'steps': 5, "),
    ({"autoattack": {"version": "rand"}}, "autoattack None and {'version': 'rand'}"),
    ({"transfer": True}, "transfer None and True"),
    ({"config": {"data": {"test_size": 10}}}, "data.test_size None and 10"),
    ({"target": "peer1"}, "share no target")])
def test_runs_that_were_evaluated_differently_are_refused(compare, tmp_path: Path, change: dict[str, Any],
                                                          text: str) -> None:
    _, code, err = compare(write(tmp_path, "a", "1" * 10), write(tmp_path, "b", "1" * 10, **change))
    assert code == 2 and text in err and err.count("\n") == 1


def test_other_samples_of_one_data_set_are_refused(compare, tmp_path: Path) -> None:
    fewer = write(tmp_path, "b", "1" * 9, clean="1" * 9)
    a = write(tmp_path, "a", "1" * 10)
    _, code, err = compare(a, fewer)
    assert code == 2 and "n 10 and 9" in err
    other = write(tmp_path, "c", "1" * 10)
    file = next(Path(other, "eval").glob("*.csv"))
    file.write_text(file.read_text().replace("\n9,", "\n17,"))
    _, code, err = compare(a, other)
    assert code == 2 and "different images" in err


def test_what_makes_a_comparison_unequal_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write(tmp_path, "a", "1" * 10, transfer=True)
    b = write(tmp_path, "b", "1" * 10, transfer=True)
    assert main(["--compare", a, b]) == 0 and "transfer=false" not in capsys.readouterr().out
    file = next(Path(b, "eval").glob("*.csv"))
    file.write_text(file.read_text() + file.read_text().partition("\n")[2].replace("peer0", "peer1"))
    assert main(["--compare", a, b]) == 0 and "transfer=false gives both the same attacks" in capsys.readouterr().out
    other = write(tmp_path, "c", "1" * 10, transfer=True, subset_seed=1, images_digest="j")
    assert main(["--compare", a, other]) == 2 and "of other seeds on the test set" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["val", "train"])
def test_splits_that_the_seed_draws_are_refused_under_other_seeds(split: str, compare, tmp_path: Path) -> None:
    _, code, err = compare(write(tmp_path, "a", "1" * 10, split=split),
                           write(tmp_path, "b", "1" * 10, split=split, subset_seed=1))
    assert code == 2 and "run.seed 0 and 1" in err
    assert compare(write(tmp_path, "c", "1" * 10), write(tmp_path, "d", "1" * 10, subset_seed=1))[1] == 0


def test_what_is_missing_damaged_or_not_reportable_is_refused(compare, tmp_path: Path) -> None:
    a, b = (write(tmp_path, run, "1" * 10, reportable=run != "b") for run in "ab")
    assert "failed its checks" in compare(a, b)[2] and compare(a, b)[1] == 16
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.yaml").touch()
    assert "c was not evaluated" in compare(a, str(tmp_path / "c"))[2]
    next(Path(a, "eval").glob("*.json")).write_text("{")
    assert "not a result file" in compare(a, b)[2]
    assert compare(a)[1] == 2 and compare(a, b, "eps=0.1")[1] == 2
