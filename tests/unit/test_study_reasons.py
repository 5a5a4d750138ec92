"""What a study says about mutual training, sentences and reasons, against numbers by hand."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from benchmarks.command import Watch
from benchmarks.study import reasons
from benchmarks.study.__main__ import main
from benchmarks.study.cost import is_mutual
from benchmarks.study.pages import verdict_lines, why_lines
from benchmarks.study.reasons import MEASURES, measured, opinions
from benchmarks.study.runs import Runner
from benchmarks.study.tables import comparisons
from benchmarks.study.why import charts, curves, spread, told
from mat_dist import load
from mat_dist.config import load_config
from mat_dist.data import ImageSet, load_data
from mat_dist.evaluation.chunks import chosen_images
from mat_dist.runs.folder import RunFolder
from tests.small_runs import run_small

# ------------------------------------------------------------------------------------------------ sentences


def row(name: str, cost: float | None, mutual: bool = False) -> dict[str, Any]:
    return {"row": name, "cost": cost, "mutual": mutual, "tried": 9 if name == "at_x3" else 1}


def difference(name: str, control: str, mean: float, verdict: str, **more: Any) -> dict[str, Any]:
    return {"row": name, "control": control, "checkpoint": "last", "kind": "mean", "column": "pgd", "mean": mean,
            "low": mean - 0.01, "high": mean + 0.01, "by_seed": [mean, mean], "images": 100, "verdict": verdict, **more}


ROWS = [row("at", 10.0), row("at_x3", 30.0), row("costly", 60.0), row("mat", 40.0, True), row("unread", None)]
DIFFERENCES = [
    difference("mat", "at_x3", 0.012, "above"), difference("mat", "at", -0.02, "below (one seed)", by_seed=[-0.02]),
    difference("mat", "at_x3", 0.001, "noise", kind="ensemble"),
    difference("mat", "costly", 0.3, "above"), difference("mat", "unread", 0.3, "above"),  # more, and nobody knows what
    difference("at", "at_x3", -0.3, "below"),  # not mutual
    difference("mat", "at", 0.3, "above", checkpoint="best"), difference("mat", "at", 0.3, "above", column="clean"),
]


def test_mutual_rows_meet_every_control_of_equal_or_lower_cost() -> None:
    """Costs 40 against 30, 10, 60: the last one is left out, and so is the one whose cost nobody knows."""
    found = comparisons(ROWS, DIFFERENCES, "pgd")
    assert [(one["control"], one["kind"], one["verdict"]) for one in found["made"]] == [
        ("at", "mean", "loses"), ("at_x3", "mean", "beats"), ("at_x3", "ensemble", "noise")]
    assert [one["cost_ratio"] for one in found["made"]] == pytest.approx([4, 4 / 3, 4 / 3])
    assert found["left_out"] == [["mat", "costly"], ["mat", "unread"]]
    assert found["several"] == 2 and found["by_chance"] == pytest.approx(0.15)  # 5 % of 3


def test_a_control_that_costs_hardly_more_is_one_of_equal_cost() -> None:
    rows = [row("at", 104.0), row("mat", 100.0, True)]
    assert len(comparisons(rows, [difference("mat", "at", 0.1, "above")], "pgd")["made"]) == 1
    rows = [row("at", 106.0), row("mat", 100.0, True)]
    assert comparisons(rows, [difference("mat", "at", 0.1, "above")], "pgd")["made"] == []


def test_every_pair_has_one_sentence_with_points_interval_and_cost() -> None:
    lines = verdict_lines(comparisons(ROWS, DIFFERENCES, "pgd"))
    for part in ("3 comparisons were made", "2 of them over several seeds", "about 0.2 of all"):
        assert part in lines[0]
    assert ("  - against `at`, at 4.00 times its cost, one seed alone: mean peer **loses** -2.00 points "
            "(-3.00 to -1.00).") in lines
    assert ("  - against `at_x3`, at 1.33 times its cost, 2 seeds, chosen from 1 settings where the control is from 9: "
            "mean peer **beats** +1.20 points (+0.20 to +2.20); ensemble noise +0.10 points (-0.90 to +1.10).") in lines
    assert ("- **`mat`**: the mean peer beats 1 of 2 controls, loses to 1, noise 0; the ensemble beats 0 of 1 "
            "controls, loses to 0, noise 1.") in lines
    assert "`mat` against `costly`, `mat` against `unread`" in "\n".join(lines)
    assert "yet" in verdict_lines(comparisons(ROWS, [], "pgd"))[0]


@pytest.mark.parametrize(("settings", "mutual"), [
    (["peers=3", "loss=at"], False), (["peers=3", "loss=mat"], True), (["peers=2", "loss=mat_share"], True),
    (["peers=2", "loss=lbgat"], True), (["peers=1", "loss=trades"], False),
    (["peers=2", "loss=ard", "peers.1.frozen=true", "peers.1.init_from=RUN"], False),  # its teacher does not train
    (["peers=3", "peers.0.role=specialist", "peers.1.role=specialist", "peers.1.threat={norm: l2, eps: 0.5}",
      "peers.2.role=generalist"], True),
])
def test_peers_that_learn_from_each_other_make_a_row_mutual(settings: list[str], mutual: bool, tmp_path: Path) -> None:
    assert is_mutual(load_config("digits", [word.replace("RUN", str(tmp_path)) for word in settings])) is mutual


# ------------------------------------------------------------------------------------------------ peers


def by_hand(logits: list[list[list[float]]], labels: list[int]) -> dict[str, list[float]]:
    """The measures for each student, image by image and teacher by teacher: means over the images."""
    peers, images = len(logits), len(labels)
    found: dict[str, list[float]] = {name: [0.0] * peers for name in MEASURES}
    for b, y in enumerate(labels):
        p = [[math.exp(z) / sum(map(math.exp, one[b])) for z in one[b]] for one in logits]
        said = [max(range(len(q)), key=q.__getitem__) for q in p]
        for s in range(peers):
            teachers = [t for t in range(peers) if t != s]
            found["right"][s] += said[s] == y
            found["confidence"][s] += p[s][y]
            found["some_teacher_right"][s] += said[s] != y and any(said[t] == y for t in teachers)
            for t in teachers:
                found["teacher_confidence"][s] += p[t][y] / len(teachers)
                found["agreement"][s] += (said[t] == said[s]) / len(teachers)
                found["teacher_right"][s] += (said[t] == y != said[s]) / len(teachers)
                found["kl"][s] += sum(a * math.log(a / c) for a, c in zip(p[t], p[s], strict=True)) / len(teachers)
    return {name: [value / images for value in values] for name, values in found.items()}


def test_what_teachers_know_by_hand() -> None:
    """Three peers, three images: all right; a student alone wrong; a student alone right."""
    logits = [[[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]], [[1.0, 0.0], [1.0, 0.0], [2.0, 1.0]],
              [[3.0, 1.0], [2.0, 0.0], [1.0, 0.0]]]
    labels = torch.tensor([0, 0, 1])
    found = {name: (value / 3).tolist() for name, value in opinions(torch.tensor(logits), labels).items()}
    assert found["right"] == pytest.approx([2 / 3, 2 / 3, 2 / 3])
    assert found["some_teacher_right"] == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert found["teacher_right"] == pytest.approx([1 / 3, 1 / 6, 1 / 6])
    assert found["agreement"] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    for name, values in by_hand(logits, labels.tolist()).items():
        assert found[name] == pytest.approx(values, abs=1e-6), name


class Straight(nn.Module):
    """Logits c_k (a x) with c = 1 for even and -1 for odd classes: all AEs of PGD lie on the corner that is known."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(64, generator=draw), requires_grad=False)
        self.c = nn.Parameter(torch.tensor([1.0, -1.0] * 5), requires_grad=False)
        self.b = nn.Parameter(0.5 * torch.randn(10, generator=draw), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.a)[:, None] * self.c + self.b


def test_every_peer_meets_the_aes_of_every_peer_on_the_validation_split() -> None:
    """The corners are made here: x - eps sign(a) for even classes, x + eps sign(a) for odd ones, cut to [0, 1]."""
    config = load_config("digits", ["peers=2", "loss=mat", "peers.0.attack.eps=0.1", "peers.1.attack.eps=0.02",
                                    "attack.steps=3", "eval.chunk=7", "data.val_size=60"])
    data = load_data(config.data, seed=0, batch_size=64)
    models = [Straight(1), Straight(2)]
    found = measured(models, config, data.val, data.train, 20, torch.device("cpu"), Watch())

    def reference(split: ImageSet) -> tuple[list[list[list[list[float]]]], list[int]]:
        """Logits [source][model][image], clean images last, and labels."""
        rows = chosen_images(len(split), 20)
        pixels, y = split.batch(rows)
        x = pixels.float().div(255).flatten(1)
        side = torch.where(y % 2 == 0, -1.0, 1.0)[:, None]
        sources = [(x + eps * side * model.a.sign()).clamp(0, 1)
                   for model, eps in ((models[0], 0.1), (models[1], 0.02))]
        return [[model(one).tolist() for model in models] for one in (*sources, x)], y.tolist()

    logits, labels = reference(data.val)
    assert found["peers"] == ["peer0", "peer1"] and found["students"] == [0, 1]
    assert [one["threat"] for one in found["attack"]] == ["linf 1/10", "linf 1/50"]
    assert found["validation"]["images"] == found["training"]["images"] == 20
    for source in range(3):
        for name, values in by_hand(logits[source], labels).items():
            assert [row[source] for row in found["validation"][name]] == pytest.approx(values, abs=1e-4), (source, name)
    logits, labels = reference(data.train)
    for peer in range(2):
        for column, source in enumerate((peer, 2)):
            right = by_hand(logits[source], labels)["right"][peer]
            assert found["training"]["right"][peer][column] == pytest.approx(right)


def document(right: list[list[float]], students: list[int], **more: Any) -> dict[str, Any]:
    """A file of `bench reasons` whose measures are all `right`, but for those of `more`."""
    table = {name: more.get(name, right) for name in MEASURES}
    return {"peers": ["a", "b", "c"], "students": students, "asked": 10, "attack": [{"steps": 7}],
            "validation": {"images": 10, **table},
            "training": {"images": 10, "right": [[0.9, 1.0], [0.7, 1.0], [0.0, 1.0]]}}


RIGHT = [[0.5, 0.6, 0.8, 0.9], [0.7, 0.3, 0.5, 0.8], [0.1, 0.1, 0.1, 0.1]]


def test_a_run_is_told_by_the_means_over_its_students() -> None:
    """Peers 0 and 1; peer 2 only teaches. Own AEs .5 and .3; peers' AEs (.6 + .8) / 2 and (.7 + .5) / 2."""
    found = told(document(RIGHT, [0, 1]))
    assert found["own_aes"] == pytest.approx(0.4) and found["peers_aes"] == pytest.approx(0.65)
    assert found["clean"] == pytest.approx(0.85) and found["training_aes"] == pytest.approx(0.8)
    assert found["gap"] == pytest.approx(0.4)
    both = spread([{"gap": 0.1}, {"gap": 0.3}])
    assert both["gap"] == {"mean": pytest.approx(0.2), "deviation": pytest.approx(0.1 * math.sqrt(2))}
    assert spread([{"gap": 0.1}])["gap"]["deviation"] is None and spread([]) == {}


def test_curves_are_means_over_peers_and_runs(tmp_path: Path) -> None:
    """Epoch 2 is missing in the second run; the first was resumed, and its newer record of epoch 1 counts."""
    config = load_config("digits", ["peers=2", "loss=mat", "optim.ema_decay=null"])
    first = [
        {"kind": "epoch", "step": 5, "epoch": 1, "clean_acc": [0.0, 0.0], "robust_acc": [0.0, 0.0],
         "ensemble": {"clean_acc": 0.0, "robust_acc": 0.0}},
        {"kind": "step", "step": 5, "epoch": 1, "transfer": [[0.2, 0.6, 0.9], [0.8, 0.4, 0.9]]},
        {"kind": "epoch", "step": 5, "epoch": 1, "attempt": 2, "clean_acc": [0.8, 0.6], "robust_acc": [0.4, 0.2],
         "ensemble": {"clean_acc": 0.9, "robust_acc": 0.5}},
        {"kind": "epoch", "step": 9, "epoch": 2, "clean_acc": [1.0, 1.0], "robust_acc": [1.0, 1.0],
         "ensemble": {"clean_acc": 1.0, "robust_acc": 1.0}}]
    second = [{"kind": "epoch", "step": 5, "epoch": 1, "clean_acc": [0.5, 0.5], "robust_acc": [0.1, 0.1],
               "ensemble": {"clean_acc": 0.7, "robust_acc": 0.3}}]
    for name, records in (("one", first), ("two", second)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records))
    found = curves(config, [RunFolder(tmp_path / name) for name in ("one", "two")])
    assert found["robust"] == [(1.0, pytest.approx(0.2))] and found["clean"] == [(1.0, pytest.approx(0.6))]
    assert found["ensemble_robust"] == [(1.0, pytest.approx(0.4))]
    assert "own_aes" not in found  # the second run has none
    alone = curves(config, [RunFolder(tmp_path / "one")])
    assert alone["own_aes"] == [(1.0, pytest.approx(0.3))] and alone["peers_aes"] == [(1.0, pytest.approx(0.7))]
    assert [epoch for epoch, _ in alone["robust"]] == [1.0, 2.0]


def cohort_row(name: str, mutual: bool, right: list[list[float]]) -> dict[str, Any]:
    one = document(right, [0, 1, 2])
    why = {"curves": {"robust": [[1.0, 0.3], [2.0, 0.4]]}, "seeds": {"0": one}, "peers": spread([told(one)])}
    return {"row": name, "peers": 3, "cost": 1.0, "mutual": mutual, "tried": 1, "averages": False, "why": why}


def test_a_row_that_beats_nothing_is_explained_beside_independent_peers() -> None:
    """Own AEs (.5 + .3 + .1) / 3 = .3, peers' AEs (.7 + .6 + .1) / 3: 16.7 points weaker; the control's: 0."""
    level = [[0.2] * 4] * 3
    rows = [cohort_row("mat", True, RIGHT), cohort_row("at_x3", False, level)]
    found = [difference("mat", "at_x3", 0.0, "noise"), difference("mat", "at_x3", -0.1, "below", kind="ensemble")]
    table = {"rows": rows, "controls": ["at_x3"], "comparisons": comparisons(rows, found, "pgd")}
    text = "\n".join(why_lines(table, "cpu"))
    assert ("- `mat`: the mean peer does not beat `at_x3` (noise); the ensemble does not beat `at_x3` (loses). Right "
            "on peers' AEs against own AEs: +16.7 points (`at_x3`: +0.0).") in text
    assert '<img src="cpu_curves/mat.svg"' in text and "PGD-7" in text and "| `at_x3` | no |" in text
    table["comparisons"] = comparisons(rows, [difference("mat", "at_x3", 0.1, "above")], "pgd")
    assert "does not beat" not in "\n".join(why_lines(table, "cpu"))
    files = charts({"suite": "cpu", "tables": {"main": table}})
    assert set(files) == {"mat.svg", "at_x3.svg"} and b"robust, at_x3" in files["mat.svg"]
    assert ElementTree.fromstring(files["mat.svg"]).tag.endswith("svg")  # well-formed
    rows[0]["why"] = rows[1]["why"] = {"curves": {}, "seeds": {}, "peers": {}}
    assert why_lines(table, "cpu") == []


# ------------------------------------------------------------------------------------------------ commands


def test_the_command_measures_the_last_checkpoint_of_a_run(tmp_path: Path, capsys: Any) -> None:
    """Accuracy without an attack against the loaded models on the same validation images."""
    run = run_small(tmp_path, "run", "loss=mat", "data.val_size=40")
    assert main(["reasons", str(run.folder.path), "images=30"]) == 0
    assert "validation images" in capsys.readouterr().out
    config = load_config(str(run.folder.config))
    found = reasons.find(run.folder, config, 30)
    assert found is not None and reasons.find(run.folder, config, 31) is None
    data = load_data(config.data, seed=0, batch_size=16)
    x, y = data.val.batch(chosen_images(len(data.val), 30))
    for peer in range(2):
        model = load(run.folder.path, peer, which="latest")
        with torch.no_grad():
            right = (model(x.float() / 255).argmax(-1) == y).double().mean().item()
        assert found["validation"]["right"][peer][2] == pytest.approx(right, abs=1e-6)
    assert main(["reasons", str(run.folder.path), "images=31", "--dry-run"]) == 0
    assert "31 validation and 31 training images" in (shown := capsys.readouterr().out) and "not measured yet" in shown
    assert reasons.find(run.folder, config, 31) is None
    for words, message in ((["split=test"], "split cannot be chosen"), (["imagez=3"], "did you mean images?")):
        assert main(["reasons", str(run.folder.path), *words]) == 2
        assert message in capsys.readouterr().err


def test_a_run_of_one_peer_has_no_teachers(tmp_path: Path, capsys: Any) -> None:
    run = run_small(tmp_path, "run", "peers=1", "loss=at", "train.max_steps=1")
    assert main(["reasons", str(run.folder.path)]) == 2
    assert "nobody to learn from" in capsys.readouterr().err


PLAN = """
suites:
  cpu:
    config: digits
    settings: [train.max_steps=4, train.batch_size=16, attack.steps=1, model.width=0.25, eval.every=1, eval.size=20,
               eval.steps=1, log.every=2, optim.ema_decay=null, eval.test_steps=0, data.train_size=64]
    seeds: [0]
    reasons: {images: 20}
    tables:
      main:
        title: Small
        primary: pgd2
        controls: [at, at_x2]
        evaluations:
          pgd2: {settings: [attacks=pgd, steps=2, images=30, checks=0, transfer=false, eval.chunk=30]}
        rows:
          at: {says: alone, settings: [loss=at]}
          at_x2: {says: two alone, peers: 2, settings: [loss=at, train.max_steps=6]}
          mat: {says: mutual, peers: 2, control: at_x2, settings: [loss=mat]}
"""


@pytest.mark.slow
def test_a_study_asks_every_cohort_once_for_its_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: Any) -> None:
    asked: list[str] = []

    def run(self: Runner, module: str, words: Sequence[str], log: Path) -> int:
        asked.extend(Path(words[1]).name for _ in [0] if module == "benchmarks.study")
        log.touch()
        name = f"{module}.__main__" if module == "benchmarks.study" else module
        return int(importlib.import_module(name).main(list(words)))

    monkeypatch.setattr(Runner, "run", run)
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "runs").mkdir()
    words = ["evidence", "--file", str(tmp_path / "plan.yaml"), "--root", str(tmp_path / "runs"),
             "--out", str(tmp_path)]
    assert main(words) == 0 and main(words) == 0
    assert asked == ["at_x2_0", "mat_0"]  # not of one peer, and not again
    page = (tmp_path / "cpu.md").read_text()
    assert "### Why" in page and "| `mat` | yes |" in page and "### Against the controls" in page
    assert {file.name for file in (tmp_path / "cpu_curves").iterdir()} == {"at_x2.svg", "mat.svg"}
    rows = json.loads((tmp_path / "cpu.json").read_text())["tables"]["main"]["rows"]
    assert [list(row["why"]["seeds"]) for row in rows] == [[], ["0"], ["0"]] and rows[0]["why"]["curves"]["robust"]
    (tmp_path / "plan.yaml").write_text(PLAN.replace("images: 20}", "images: 0}"))
    assert main(words) == 2 and "reasons.images" in capsys.readouterr().err
