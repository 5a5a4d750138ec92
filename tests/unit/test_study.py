"""Studies of many runs: plans with all their errors, paired statistics by hand, resuming, budgets, tables."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import evidence, pages, runs, search
from benchmarks.study.__main__ import main, read_options
from benchmarks.study.plan import Evaluation, Family, Row, read_evidence, read_search
from benchmarks.study.runs import Enough, Job, Runner, training_seconds
from benchmarks.study.statistics import paired_difference, seed_interval
from benchmarks.study.tables import Entry, differences, summary
from benchmarks.study.tables import words as words_of
from mat_dist.config import load_config
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import ConfigError
from mat_dist.evaluation.compare import Paired
from mat_dist.runs.folder import RunFolder
from mat_dist.tools.dryrun import training_passes
from tests.study import run_here

ROOT = Path(__file__).parents[2]
SUITES = ("overfit", "union", "onestep", "cifar10", "gpu", "gpu_overfit", "gpu_union")
PLAN = """
suites:
  cpu:
    config: digits
    settings: [train.epochs=1, train.batch_size=64, data.train_size=128, model.width=0.25, attack.steps=1,
               eval.every=1, eval.size=20, eval.steps=1, optim.ema_decay=null, eval.test_steps=0]
    seeds: [0, 1]
    tables:
      main:
        title: Small
        primary: pgd2
        controls: [at]
        evaluations:
          pgd2:
            settings: [attacks=pgd, steps=2, images=30, checks=0, transfer=false, eval.chunk=30]
            checkpoints: [best, last]
        rows:
          at: {says: alone, settings: [loss=at, train.epochs=3, eval.every=3]}
          mat: {says: mutual, peers: 2, control: at, settings: [loss=mat]}
"""


def plan_file(folder: Path, text: str = PLAN) -> Path:
    file = folder / "plan.yaml"
    file.write_text(text)
    return file


# ------------------------------------------------------------------------------------------------ statistics


def images(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def half_width(count: int, total: float, squares: float) -> float:
    """Of one seed, from the published formula of Agresti and Min: two images more, which add 1 to the squares."""
    return 1.959964 * math.sqrt(squares + 1 - total**2 / (count + 2)) / (count + 2)


def test_one_seed_counts_images_alone() -> None:
    """Three gained and one lost of ten; the interval of `evaluate --compare` is as wide."""
    found = paired_difference([images(1, 1, 1, -1, 0, 0, 0, 0, 0, 0)])
    half = half_width(10, 2, 4)
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert found.verdict == "noise" and found.images == 10
    low, high = Paired(10, 3, 1).interval
    assert high - low == pytest.approx(2 * half)


def test_the_wider_interval_of_images_and_seeds_counts() -> None:
    """Means .1 and .3: error .1, t = 12.706. Equal means: what is left are the images, here others for each seed."""
    apart = paired_difference([images(*[0.1] * 500), images(*[0.3] * 500)])
    assert (apart.mean, apart.high - apart.mean) == pytest.approx((0.2, 1.2706), rel=1e-4) and apart.verdict == "noise"
    same = paired_difference([images(1, 0, 0, 1), {10: 1, 11: 1, 12: 0, 13: 0}])
    seen = 2 - 2**2 / 6 - 2 * (1 / 3)**2  # squares about the mean of each seed's four images, without the two more
    more = 1 + 2 * (1 / 3)**2
    assert same.high - same.mean == pytest.approx(1.959964 * math.sqrt(2 * seen + 4 * more) / 12)
    assert same.by_seed == (0.5, 0.5)


def test_seeds_that_share_their_images_do_not_narrow_the_interval_over_images() -> None:
    """Many seeds with the same differences know as much of other images as one."""
    values = images(*[1.0] * 4, *[0.0] * 96)
    one, many = (paired_difference([values] * seeds) for seeds in (1, 50))
    assert many.high - many.low == pytest.approx(one.high - one.low)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("gained,verdict", [(4, "noise"), (7, "above")])
def test_four_images_of_a_hundred_are_no_gain_and_seven_are(gained: int, verdict: str, seeds: int) -> None:
    """Exact sign test: 4 against 0 has p = .125, 7 against 0 p = .016."""
    found = paired_difference([images(*[1.0] * gained, *[0.0] * (100 - gained))] * seeds)
    assert found.verdict.partition(" ")[0] == verdict


def test_an_interval_without_zero_is_called_by_its_side() -> None:
    assert paired_difference([images(*[1.0] * 9)]).verdict == "above (one seed)"
    assert paired_difference([images(*[-0.5] * 9)] * 3).verdict == "below"
    with pytest.raises(ValueError, match="a seed and an image"):
        paired_difference([{}])


def test_intervals_by_hand() -> None:
    assert seed_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / math.sqrt(3)), rel=1e-4)
    assert seed_interval([1.0])[1] == math.inf
    deviation = statistics.stdev(range(20)) / math.sqrt(20)
    assert seed_interval(list(range(20)))[1] == pytest.approx(2.093 * deviation, rel=1e-4)  # t of 19 degrees of freedom


def test_the_mean_over_seeds_is_of_means_over_images() -> None:
    found = summary({0: {1: 1.0, 2: 0.0}, 1: {1: 1.0, 2: 1.0}})
    assert found == {"mean": 0.75, "deviation": pytest.approx(0.5 / math.sqrt(2)), "by_seed": {"0": 0.5, "1": 1.0},
                     "images": 2}


def test_rows_are_paired_on_the_same_seeds_and_images() -> None:
    """Seed 2 is missing in the control, seed 3 has other images: neither counts, nor does image 9 of seed 0, which only
    the control has. One peer is its own ensemble."""
    row = Entry("mat", table="main", row=Row(says="x", peers=2))
    mine = {0: {5: 1.0, 6: 0.5}, 2: {5: 1.0, 6: 1.0}, 3: {5: 0.0}}
    theirs = {0: {5: 0.0, 6: 0.5, 9: 1.0}, 3: {7: 1.0}}
    cells: Any = {"mat": {("last", "mean", "pgd"): mine, ("last", "ensemble", "pgd"): mine},
                  "at": {("last", "mean", "pgd"): theirs}}
    found = differences(row, "at", cells)
    assert [(one["kind"], one["mean"], one["by_seed"]) for one in found] == [("mean", 0.5, [0.5]),
                                                                            ("ensemble", 0.5, [0.5])]
    cells["at"]["last", "best", "pgd"] = theirs  # now the control is a cohort, whose ensemble is not reported
    assert [one["kind"] for one in differences(row, "at", cells)] == ["mean"]


@pytest.mark.parametrize(("settings", "all_of", "peers", "first"), [
    (["peers=3"], "peer0,peer1,peer2,ensemble", "peer0,peer1,peer2", "peer0"),
    (["peers=3", "loss=at", "peers.0.loss=mat_kd", "peers.1.frozen=true", "peers.2.frozen=true",
      "peers.1.init_from=runs/a:peer1", "peers.2.init_from=runs/a:peer2"], "peer0", "peer0", "peer0"),
    (["peers=3", "peers.0.role=specialist", "peers.1.role=specialist", "peers.2.role=generalist"],
     "peer2", "peer2", "peer2")])
def test_whom_an_evaluation_attacks_of_a_cohort(settings: list[str], all_of: str, peers: str, first: str,
                                                tmp_path: Path) -> None:
    """Nobody who cannot be the best peer: no teacher that is finished, no specialist beside a generalist."""
    job = Job.make("row", 0, tmp_path, "digits", settings)
    for who, targets in (("all", all_of), ("peers", peers), ("first", first)):
        one = Evaluation.model_validate({"settings": ("attacks=pgd",), "who": who})
        assert words_of(job, one, "last") == ("attacks=pgd", "checkpoint=last", f"targets={targets}")


# ------------------------------------------------------------------------------------------------ the plan


def test_the_plans_of_the_project_can_be_read() -> None:
    study = read_evidence(str(ROOT / "benchmarks/evidence.yaml"))
    assert set(study.suites) == set(SUITES)
    space = read_search(str(ROOT / "benchmarks/search.yaml"))
    for suite in space.suites.values():
        points = [(title, point) for title, family in suite.families.items() for point in family.points()]
        assert len(points) == len(set(points))


@pytest.mark.parametrize("name", [*SUITES, "precision"])
def test_every_row_of_the_project_can_be_trained(name: str, tmp_path: Path) -> None:
    file = str(ROOT / f"benchmarks/{'evidence' if name in SUITES else name}.yaml")
    options = read_options(["evidence", "--suite", name, "--root", str(tmp_path), "--file", file])
    _, entries = evidence.planned(options)
    assert [(entry.name, entry.error) for entry in entries if entry.error] == []
    space = str(ROOT / "benchmarks/search.yaml")
    searched = read_search(space).suites
    found = search.settings_of(searched[name], options) if name in searched else []
    assert [(one.name, one.error) for one in found if one.error] == []
    assert len({one.name for one in found}) == len(found)


def test_all_mistakes_of_a_plan_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    text = PLAN.replace("primary: pgd2", "primary: pgd3").replace("[at]", "[att]").replace("steps=2", "stepz=2")
    text = text.replace("settings: [loss=mat]", "settings: [run.seed=1, loss]")
    with pytest.raises(ConfigError) as caught:
        read_evidence(str(plan_file(tmp_path, text)))
    told = "\n".join(map(str, caught.value.problems))
    for part in ("did you mean at?", "stepz", "run.seed is not free", "'loss' is not a setting", "plan.yaml:"):
        assert part in told
    with pytest.raises(ConfigError, match="pgd2"):
        read_evidence(str(plan_file(tmp_path, PLAN.replace("primary: pgd2", "primary: pgd3"))))


@pytest.mark.parametrize(("change", "message"), [
    (("says: alone", "say: alone"), "say"), (("seeds: [0, 1]", "seeds: []"), "seeds"),
    (("says: mutual,", "says: mutual, tried: 4,"), "search_budget is 1"),
    (("checkpoints: [best, last]", "seeds: [7]"), "not among those of the suite"),
    (("images=30,", "images=30, checkpoint=last,"), "is not free here"),
    (("rows:\n          at:", "rows:\n          A t:"), "A t"),
    (("control: at,", "control: att,"), "there is no 'att' in this table"),
    (("control: at,", "control: mat,"), "mat is its own control"),
])
def test_a_mistake_is_named(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    assert change[0] in PLAN
    with pytest.raises(ConfigError) as caught:
        read_evidence(str(plan_file(tmp_path, PLAN.replace(*change))))
    assert message in "\n".join(map(str, caught.value.problems))


def test_an_evaluation_of_several_threats_has_a_column_per_norm_and_their_union() -> None:
    one = Evaluation(settings=("attacks=autoattack", "threats=linf:8/255,l2:1/2,l1:12"))
    assert one.columns("apgd") == ("linf", "l2", "l1", "union")
    assert Evaluation(settings=("attacks=pgd",), rows=("a",), seeds=(1,)).columns("pgd") == ("pgd",)
    assert not Evaluation(settings=("attacks=pgd",), rows=("a",)).applies("b", 0)


def test_a_family_is_its_list_times_its_grid() -> None:
    family = Family(says="x", each=(("loss=mat",), ("loss=at",)), grid={"a": (0.5, 1), "b": (True, None)})
    assert len(list(family.points())) == 8
    assert next(iter(family.points())) == ("loss=mat", "a=0.5", "b=true")
    assert list(Family(says="x").points()) == [()]


def test_a_row_that_this_version_cannot_train_does_not_keep_the_others(tmp_path: Path, capsys: Any) -> None:
    text = PLAN.replace("settings: [loss=mat]", "settings: [loss=mat, loss.telepathy=1]")
    assert main(["evidence", "--file", str(plan_file(tmp_path, text)), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "row mat cannot be trained: there is no setting loss.telepathy" in shown and "refused" in shown


@pytest.mark.parametrize(("words", "message"), [
    (["evidence", "--suite", "tpu"], "there is no suite"),
    (["evidence", "--budget", "soon"], "a number of seconds such as 500"),
    (["evidence", "--only", "att"], "did you mean at?"), (["search", "--sede", "1"], "did you mean --seeds?"),
    (["search", "--seeds", "x"], "a list such as 0,1"), (["evidence", "--seeds", "5"], "there is no seed"),
    (["evidence", "--file", "absent.yaml"], "cannot read the file"),
])
def test_mistakes_on_the_command_line_end_in_code_2(words: list[str], message: str, capsys: Any,
                                                    tmp_path: Path) -> None:
    kind, *options = words  # the last --file counts
    assert main([kind, *(["--file", str(plan_file(tmp_path))] if kind == "evidence" else []), *options]) == 2
    assert message in capsys.readouterr().err


def test_passes_of_a_training_by_hand() -> None:
    """1437 images, 256 in a batch: 5 steps. A peer alone: 7 attack passes and 1 learning pass, each both ways."""
    settings = ["peers=1", "loss=at", "train.epochs=2", "train.batch_size=256", "data.val_size=100"]
    assert training_passes(load_config("digits", settings)) == (10, 80, 80)
    shared = load_config("digits", ["peers=2", "loss=mat_share", *settings[2:]])
    assert training_passes(shared) == (10, 10 * 2 * 9, 10 * 2 * 9)
    unread = load_config("digits", ["data.name=folder", "data.root=x", "data.image_size=8", *settings])
    assert training_passes(unread) is None and training_passes(unread, 10) == (10, 80, 80)


# ------------------------------------------------------------------------------------------------ runs


def job(tmp_path: Path, *settings: str) -> Job:
    return Job.make("at", 3, tmp_path, "digits", ("peers=1", "loss=at", *settings))


def test_a_run_is_named_after_its_row_and_seed_and_its_command_hides_this_machine(tmp_path: Path) -> None:
    made = job(tmp_path, f"data.cache={tmp_path}")
    assert made.folder.path == tmp_path / "at_3" and made.config.run.seed == 3
    assert str(tmp_path) not in made.command and "run.seed=3" in made.command
    assert made.digest == job(tmp_path / "other").digest != job(tmp_path, "attack.steps=3").digest


def runner(budget: float | None = None) -> Runner:
    return Runner(StopFlag(), budget, lambda text: None)


def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, body: str) -> Path:
    """A module `name` that a Runner can start."""
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "log"


def test_a_command_runs_on_one_thread_and_its_output_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = script(tmp_path, monkeypatch, "told", "import os, sys; print(os.environ['OMP_NUM_THREADS'], *sys.argv[1:])"
                                                "; sys.exit(5)")
    assert runner().run("told", ("a=1",), log) == 5
    assert log.read_text() == "1 a=1\n"


def test_a_command_is_asked_to_stop_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = ("import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *a: (print('saved'), sys.exit(75)))\n"
            "print('begun', flush=True)\ntime.sleep(60)")
    log = script(tmp_path, monkeypatch, "patient", body)
    one = runner(1.5)
    with pytest.raises(Enough):
        one.run("patient", (), log)
    with pytest.raises(Enough):  # and nothing more begins
        one.run("patient", (), log)
    assert log.read_text().count("begun") <= 1


def test_what_runs_when_the_study_fails_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = script(tmp_path, monkeypatch, "endless", "import time; time.sleep(60)")
    started: list[Any] = []
    popen = runs.subprocess.Popen
    monkeypatch.setattr(runs.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    one = runner()
    monkeypatch.setattr(Runner, "over", property(lambda self: 1 / 0 if started else False))
    with pytest.raises(ZeroDivisionError):
        one.run("endless", (), log)
    assert started[0].returncode == -9


def test_seconds_count_every_step_once(tmp_path: Path) -> None:
    """A resumed run repeats steps: the newest record of a step counts."""
    records = [{"kind": "step", "step": 10, "step_s": 1.0}, {"kind": "step", "step": 20, "step_s": 9.0}, {"epoch": 1},
               {"kind": "step", "step": 20, "step_s": 2.0, "attempt": 2}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"step": 3')
    assert training_seconds(RunFolder(tmp_path)) == 30.0
    assert training_seconds(RunFolder(tmp_path / "absent")) is None


# ------------------------------------------------------------------------------------------------ whole studies


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    return run_here(monkeypatch)


@pytest.mark.slow
def test_a_study_is_trained_attacked_and_written_once(tmp_path: Path, in_process: list[tuple[str, ...]],
                                                     capsys: Any) -> None:
    words = ["evidence", "--file", str(plan_file(tmp_path)), "--root", str(tmp_path / "runs"), "--out", str(tmp_path)]
    assert main([*words, "--only", "at", "--seeds", "0"]) == 0
    document = json.loads((tmp_path / "cpu.json").read_text())
    assert document["runs"] == {"done": 1, "all": 4} and "**Partial.**" in (tmp_path / "cpu.md").read_text()
    assert main(words) == 0
    trained = [one for one in in_process if one[0] == "mat_dist.train"]
    assert len(trained) == 4  # at with seed 0 once
    (file, *_) = (tmp_path / "runs/mat_1/eval").glob("evaluate_test_last_*.json")
    told = json.loads(file.read_text())  # checks=0
    assert not told["reportable"] and not told["targets"][0]["checks"] and not told["targets"][0]["reportable"]
    begun = len(in_process)
    assert main(words) == 0 and len(in_process) == begun
    document = json.loads((tmp_path / "cpu.json").read_text())
    table = document["tables"]["main"]
    at, mat = table["rows"]
    assert document["runs"]["done"] == 4 and at["kinds"] == ["mean"] and mat["cost"] == at["cost"] == 2 * 2 * 6 * 64
    assert mat["accuracy"]["last"]["ensemble"]["pgd2"]["images"] == 30
    assert set(mat["accuracy"]["best"]["best"]["clean"]["by_seed"]) == {"0", "1"}
    (one,) = [d for d in table["differences"] if (d["checkpoint"], d["kind"], d["column"]) == ("last", "mean", "pgd2")]
    assert one["mean"] == pytest.approx(mat["accuracy"]["last"]["mean"]["pgd2"]["mean"]
                                        - at["accuracy"]["last"]["mean"]["pgd2"]["mean"])
    page = (tmp_path / "cpu.md").read_text()
    assert "Complete." in page and str(tmp_path) not in page and str(tmp_path) not in json.dumps(document)
    low, high = mat["accuracy"]["last"]["mean"]["pgd2"]["interval"]
    assert low <= mat["accuracy"]["last"]["mean"]["pgd2"]["mean"] <= high
    assert '<img src="cpu_figures/main.svg"' in page
    assert "mat (mutual)" in (tmp_path / "cpu_figures/main.svg").read_text()


@pytest.mark.slow
def test_a_page_has_the_runs_that_another_command_of_the_suite_finished_meanwhile(
        tmp_path: Path, in_process: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["evidence", "--file", str(plan_file(tmp_path)), "--root", str(tmp_path / "runs"), "--out", str(tmp_path),
             "--seeds", "0"]
    finish = evidence.complete

    def while_another_one_runs(*given: Any) -> None:
        monkeypatch.setattr(evidence, "complete", finish)
        assert main([*words, "--only", "mat"]) == 0
        finish(*given)

    monkeypatch.setattr(evidence, "complete", while_another_one_runs)
    assert main([*words, "--only", "at"]) == 0
    document = json.loads((tmp_path / "cpu.json").read_text())
    assert document["runs"]["done"] == 2
    assert [row["seeds"]["0"]["status"] for row in document["tables"]["main"]["rows"]] == ["done", "done"]


@pytest.mark.slow
def test_a_changed_plan_does_not_take_results_of_the_old_one(tmp_path: Path, in_process: list[tuple[str, ...]],
                                                            capsys: Any) -> None:
    words = ["evidence", "--root", str(tmp_path / "runs"), "--out", str(tmp_path), "--only", "at", "--seeds", "0"]
    assert main([*words, "--file", str(plan_file(tmp_path))]) == 0
    assert main([*words, "--file", str(plan_file(tmp_path, PLAN.replace("steps=2, images", "steps=3, images")))]) == 0
    assert len([one for one in in_process if one[0] == "mat_dist.evaluate"]) == 2  # best is last: one each
    changed = plan_file(tmp_path, PLAN.replace("attack.steps=1", "attack.steps=2"))
    assert main([*words, "--file", str(changed)]) == 16
    assert "a run with other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_a_budget_leaves_a_partial_table_and_code_75(tmp_path: Path, in_process: list[tuple[str, ...]], capsys: Any,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "over", property(lambda self: len(in_process) >= 2))
    words = ["evidence", "--file", str(plan_file(tmp_path)), "--root", str(tmp_path / "runs"), "--out", str(tmp_path)]
    assert main(words) == 75
    assert "3 runs are left: mat_0, at_1, mat_1" in capsys.readouterr().err
    rows = json.loads((tmp_path / "cpu.json").read_text())["tables"]["main"]["rows"]
    assert [row["seeds"]["0"]["status"] for row in rows] == ["done", "missing: training"]


@pytest.mark.slow
def test_a_search_scores_the_validation_split_alone(tmp_path: Path, in_process: list[tuple[str, ...]],
                                                    capsys: Any) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("""
suites:
  cpu:
    config: digits
    settings: [train.epochs=1, train.batch_size=64, data.train_size=128, model.width=0.25, attack.steps=1, eval.size=20,
               eval.steps=1, optim.ema_decay=null]
    peers: 2
    seeds: [0]
    families:
      kd: {says: weight of distillation, settings: [loss=mat], grid: {loss.kd_weight: [0.3, 0.6]}}
      at: {says: control, settings: [loss=at]}
""")
    words = ["search", "--space", str(space), "--root", str(tmp_path / "runs"), "--out", str(tmp_path)]
    assert main([*words, "--only", "kd"]) == 0 and main(words) == 0 and len(in_process) == 3
    document = json.loads((tmp_path / "search_cpu.json").read_text())
    means = [one["scores"]["mean"]["mean"] for one in document["settings_tried"]]
    assert means == sorted(means, reverse=True) and document["families"]["kd"]["tried"] == 2
    assert not list((tmp_path / "runs").glob("*/eval/test_*")) and len(list((tmp_path / "runs").glob("*/eval/*"))) == 3


def test_the_folder_of_python_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that is started elsewhere still starts commands of this package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    body = "import mat_dist, sys; sys.exit(0 if 'mat_dist' in mat_dist.__file__ else 1)"
    (tmp_path / "asks.py").write_text(body)
    assert runner().run("asks", (), tmp_path / "log") == 0


def test_a_row_may_start_from_the_runs_of_another_row_with_the_same_seed(tmp_path: Path) -> None:
    words = ("peers=2", "loss=at", "peers.1.frozen=true", "peers.1.init_from=RUN(other):peer1")
    one, two = (Job.make("row", seed, tmp_path, "digits", words) for seed in (0, 5))
    assert two.config.peers[1].init_from == f"{tmp_path / 'other_5'}:peer1"
    assert "RUN(other):peer1" in two.command and str(tmp_path) not in two.command and one.digest == two.digest


def test_a_best_checkpoint_that_is_the_last_is_told_once() -> None:
    one = {"row": "mat", "control": "at", "checkpoint": "last", "kind": "mean", "column": "clean", "mean": 0.1,
           "low": 0.0, "high": 0.2, "by_seed": [0.1], "verdict": "above"}
    table = {"primary": "pgd", "differences": [one, {**one, "checkpoint": "best"},
                                               {**one, "kind": "best", "checkpoint": "best", "mean": 0.3}]}
    lines = [line for line in pages._differences(table) if line.startswith("| `mat`")]
    assert [line.split(" | ")[1:3] for line in lines] == [["mean peer", "last"], ["best peer", "best"]]


@pytest.mark.parametrize("name", ["cpu", "cpu_cifar10", "gpu", "search_cpu"])
def test_the_pages_of_the_project_are_made_from_their_numbers(name: str) -> None:
    """Byte for byte."""
    document = json.loads((ROOT / f"benchmarks/results/first/{name}.json").read_text())
    page = pages.search_page(document) if name.startswith("search") else pages.evidence_page(document)
    first = ROOT / "benchmarks/results/first"
    assert (first / f"{name}.md").read_text() == page
    assert all((first / image).is_file() for image in re.findall('<img src="([^"]+)"', page))
