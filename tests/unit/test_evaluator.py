"""The evaluator against a plain attack of one image at a time, its statistics, and its result files."""

from __future__ import annotations

import csv
import json
import logging
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mat_dist import checkpoints, rng
from mat_dist.attacks.norms import Threat, eps_text
from mat_dist.checkpoints.load import EMA, ENSEMBLE, RAW
from mat_dist.config.schema import Config, DataConfig, LossConfig, PeerConfig
from mat_dist.core.cohort import Cohort
from mat_dist.core.step import Batch, train_step
from mat_dist.data import DataSets, channel_stats, load_data
from mat_dist.distributed.groups import Mesh
from mat_dist.distributed.placement import Placement
from mat_dist.distributed.stopping import StopFlag
from mat_dist.evaluation import attacks, chunks
from mat_dist.evaluation.attacks import AttackPlan, Target, attack_one, correct
from mat_dist.evaluation.chunks import Progress, Work, attack_chunk, chosen_images
from mat_dist.evaluation.during_training import (
    Evaluations,
    collapsed,
    final_table,
    selection_score,
    validation_record,
)
from mat_dist.evaluation.results import TargetResult, read_result, wilson_interval
from mat_dist.evaluation.survivors import document_of, image_rows, target_rows, write_result
from mat_dist.evaluation.targets import make_targets
from mat_dist.models import Ensemble, build_model
from mat_dist.models.registry import Images
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.metrics import Reporter
from mat_dist.runs.session import Run
from tests.cohorts import complete
from tests.small_runs import robust_of, run_small

COUNT, CHUNK, SEED = 16, 6, 3
THREATS = [("linf", 0.15), ("l2", 0.6)]
LABELS = ("linf 3/20", "l2 3/5")
MESH = Mesh(Placement.place(2, 1, 0), torch.device("cpu"))


def make_config(rule: str = "prob", precision: str = "fp64") -> Config:
    entries = [{"threat": {"norm": norm, "eps": eps}, "attack": {"steps": 1}, "loss": {"preset": "at"},
                "model": {"width": 0.25}, "optim": {"lr": 0.1, "schedule": "constant", **ema}}
               for (norm, eps), ema in zip(THREATS, ({"ema_decay": 0.8}, {}), strict=True)]
    return complete({"run": {"seed": SEED}, "peers": entries, "step": {"precision": precision},
                     "train": {"batch_size": 64, "epochs": 100}, "eval": {"chunk": CHUNK, "ensemble": rule}})


class Trained:
    """Two peers with two threats, trained for a moment on digits, in a checkpoint; peer 0 keeps averaged weights."""

    def __init__(self, root: Path) -> None:
        self.config = make_config()
        self.data: DataSets = load_data(DataConfig(val_size=COUNT), seed=0, batch_size=64)
        mean, std = channel_stats(self.data.train)
        self.images = Images(self.data.train.shape, 10, mean, std)
        cohort = Cohort.build(self.config, MESH, self.images, steps_per_epoch=22)
        for step in range(25):
            images, y = self.data.train.batch(torch.arange(64 * step % 1300, 64 * step % 1300 + 64))
            train_step(cohort, Batch(images.double() / 255, y, step))
        self.states = [peer.state() for peer in cohort.peers]
        self.folder = folder = RunFolder(root)
        directory = checkpoints.begin(folder, 25, 1)
        entries = [checkpoints.save_peer(directory, i, state) for i, state in enumerate(self.states)]
        self.manifest = checkpoints.commit(folder, 25, 1, entries, checkpoints.Meta(
            1, ("peer0", "peer1"), "", "", {"images": asdict(self.images)}))

    def evaluations(self, config: Config | None = None, data: DataSets | None = None) -> Evaluations:
        run = Run(self.folder, 1, logging.getLogger("nowhere"), [], MESH)
        return Evaluations(config or self.config, MESH, run, data or self.data, StopFlag(), Reporter())

    def evaluate(self, attack: AttackPlan, size: int | None = None, config: Config | None = None,
                 data: DataSets | None = None) -> dict[tuple[str, str], dict[str, Tensor]]:
        one = self.evaluations(config, data)
        found = self.chunks = one.attack(self.manifest, replace(one.job(1), plans={"pgd": attack}), "val", size)
        return {(target, weights): answers(found[weights], target) for weights in found
                for target in found[weights][0]["predictions"]}

    def model(self, index: int, weights: str = RAW) -> nn.Module:
        """The peer's model, built here without the evaluator."""
        model = build_model(self.config.peers[index].model, shape=self.images.shape, classes=10, mean=self.images.mean,
                            std=self.images.std).double()
        state = self.states[index]
        model.load_state_dict(state["ema"] if weights == EMA and state["ema"] is not None else state["model"])
        return model.eval().requires_grad_(False)

    def pixels(self) -> tuple[Tensor, Tensor]:
        images, y = self.data.val.batch(torch.arange(COUNT))
        return images.double() / 255, y


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


# ------------------------------------------------------------------------------------------------ an independent attack


def noise(norm: str, eps: float, shape: torch.Size, restart: int, chunk: int) -> Tensor:
    """The start noise of a chunk, from the published keys."""
    key = rng.key(SEED, f"eval-{norm}", restart, chunk)
    if norm == "linf":
        return eps * (2 * rng.uniform(key, shape, dtype=torch.float64) - 1)
    direction = rng.normal(key, shape, dtype=torch.float64)
    radius = eps * rng.uniform(rng.key(key, "radius"), (shape[0],), dtype=torch.float64) ** (1 / 64)
    return direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * radius.view(-1, 1, 1, 1)


def project(adv: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    d = adv - x
    d = d.clamp(-eps, eps) if norm == "linf" else d * min(1.0, eps / max(d.norm().item(), 1e-30))
    return (x + d).clamp(0, 1)


def survives(model: nn.Module, x: Tensor, y: Tensor, start: Tensor, norm: str, eps: float, plan: AttackPlan) -> bool:
    """PGD on one image (1, C, H, W): the prediction after the last step is still right."""
    size = 2.5 * eps / plan.steps if plan.step_size is None else plan.step_size
    adv = project(x + start, x, norm, eps)
    for _ in range(plan.steps):
        adv.requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(adv), y), adv)
        move = g.sign() if norm == "linf" else g / g.norm().clamp(min=1e-300)
        adv = project((adv + size * move).detach(), x, norm, eps)
    return bool(model(adv).argmax() == y)


def slow_table(model: nn.Module, x: Tensor, y: Tensor, plan: AttackPlan, restarts: list[int]) -> Tensor:
    """Robust correctness (threats, images), one image, threat and restart at a time."""
    table = torch.zeros(len(THREATS), len(x), dtype=torch.bool)
    for t, (norm, eps) in enumerate(THREATS):
        for i in range(len(x)):
            chunk, row = divmod(i, CHUNK)
            shape = torch.Size((min(CHUNK, len(x) - chunk * CHUNK), *x.shape[1:]))
            one = slice(i, i + 1)
            starts = [noise(norm, eps, shape, r, chunk)[row:row + 1] for r in restarts]
            table[t, i] = bool(model(x[one]).argmax() == y[i]) and all(
                survives(model, x[one], y[one], start, norm, eps, plan) for start in starts)
    return table


def answers(chunks: Any, target: str) -> dict[str, Tensor]:
    """Correct without an attack and under all attacks of each threat -> bool (images,)."""
    labels = torch.tensor([label for chunk in chunks for label in chunk["labels"]])
    told = [chunk["predictions"][target] for chunk in chunks]
    flags = {"clean": torch.tensor([guess for one in told for guess in one["clean"]]) == labels}
    for threat, names in told[0]["threats"].items():
        under = [torch.tensor([guess for one in told for guess in one["threats"][threat][name]]) == labels
                 for name in names]
        flags[threat] = torch.stack([flags["clean"], *under]).all(0)
    return flags


def robust(found: dict[str, Tensor]) -> Tensor:
    """Correct under each threat -> bool (threats, images)."""
    return torch.stack([found[label] for label in LABELS])


@pytest.mark.parametrize("target,weights", [("peer0", RAW), ("peer1", RAW), ("peer0", EMA), (ENSEMBLE, RAW)])
def test_robust_accuracy_is_that_of_a_plain_attack_per_image(target: str, weights: str, trained: Trained) -> None:
    x, y = trained.pixels()
    members = [trained.model(i, weights) for i in range(2)]
    model = Ensemble(members) if target == ENSEMBLE else members[int(target[-1])]
    plan = AttackPlan(steps=2, restarts=2)
    found = trained.evaluate(plan)[target, weights]
    assert torch.equal(found["clean"], model(x).argmax(1) == y)
    table = slow_table(model, x, y, plan, [0, 1])
    assert torch.equal(robust(found), table)
    assert 0 < table.sum() < 2 * found["clean"].sum()  # the attack succeeds on some and not on all
    (accuracy,) = [row["accuracy"] for row in target_rows(trained.chunks)
                   if (row["target"], row["weights"]) == (target, weights)]
    assert accuracy["union"] == (table[0] & table[1]).double().mean().item() < accuracy["clean"]
    assert [accuracy[label] for label in LABELS] == table.double().mean(1).tolist()


def test_the_worst_restart_counts(trained: Trained) -> None:
    x, y = trained.pixels()
    plan = AttackPlan(steps=1, restarts=3, step_size=0.03)
    tables = [slow_table(trained.model(0), x, y, plan, [r]) for r in range(3)]
    worst = torch.stack(tables).all(0)
    assert not torch.equal(worst, tables[0])  # later starts find more
    assert torch.equal(robust(trained.evaluate(plan)["peer0", RAW]), worst)


@pytest.mark.parametrize("rule", ["prob", "logit"])
def test_the_ensemble_follows_its_rule(rule: str, trained: Trained) -> None:
    x, _ = trained.pixels()
    logits = torch.stack([trained.model(i)(x) for i in range(2)])
    expected = logits.softmax(-1).mean(0) if rule == "prob" else logits.mean(0)
    model = Ensemble([trained.model(i) for i in range(2)], rule)
    assert torch.equal(model(x).argmax(1), expected.argmax(1))
    found = trained.evaluate(AttackPlan(1), config=make_config(rule))[ENSEMBLE, RAW]
    assert torch.equal(found["clean"], expected.argmax(1) == trained.pixels()[1])
    if rule == "prob":
        assert torch.allclose(model(x).exp(), expected)


def test_a_peer_without_averaged_weights_stands_in_with_its_raw_ones(trained: Trained) -> None:
    found = trained.evaluate(AttackPlan(2))
    assert torch.equal(robust(found["peer1", EMA]), robust(found["peer1", RAW]))
    assert [key for key in found] == [(t, w) for w in (RAW, EMA) for t in ("peer0", "peer1", ENSEMBLE)]


# ------------------------------------------------------------------------------------------------ images and chunks


def test_a_chunk_gives_the_same_alone_and_among_others(trained: Trained) -> None:
    """The first two chunks of 6 are the whole work of an evaluation of 12 images, and part of one of 16."""
    plan = AttackPlan(2)
    whole = trained.evaluate(plan)["peer0", RAW]
    data = replace(trained.data, val=trained.data.val.select(torch.arange(2 * CHUNK)))
    assert torch.equal(robust(trained.evaluate(plan, data=data)["peer0", RAW]), robust(whole)[:, :2 * CHUNK])


def test_two_evaluations_are_equal_and_the_seed_of_the_noise_counts(trained: Trained) -> None:
    one, two = trained.evaluate(AttackPlan(1)), trained.evaluate(AttackPlan(1))
    assert all(torch.equal(robust(one[key]), robust(two[key])) for key in one)
    run = trained.config.run.model_copy(update={"seed": SEED + 1})
    config = trained.config.model_copy(update={"run": run})
    chunks = [trained.evaluations(one).attack(trained.manifest, trained.evaluations().job(1), "val", 5)[RAW]
              for one in (trained.config, config)]
    assert len({str([chunk["samples"] for chunk in found]) for found in chunks}) == 1  # the images are the same
    other = trained.evaluate(AttackPlan(1), config=config)
    assert any(not torch.equal(robust(one[key]), robust(other[key])) for key in one)


def test_a_subset_is_part_of_every_larger_one_and_in_order() -> None:
    chosen = chosen_images(1000, 50)
    assert set(chosen.tolist()) < set(chosen_images(1000, 60).tolist())
    assert len(chosen.unique()) == 50 and torch.equal(chosen, chosen.sort().values) and chosen.max() < 1000
    assert 300 < chosen.double().mean() < 700  # spread over the split, not its beginning
    for size in (None, 7, 8):
        assert torch.equal(chosen_images(7, size), torch.arange(7))


def test_chunks_name_the_images_they_are_about(trained: Trained) -> None:
    one = trained.evaluations()
    chunks = one.attack(trained.manifest, one.job(1), "val", 9)[RAW]
    samples = [sample for chunk in chunks for sample in chunk["samples"]]
    assert samples == chosen_images(COUNT, 9).tolist()
    assert [label for chunk in chunks for label in chunk["labels"]] == trained.data.val.labels[samples].tolist()
    x, y = trained.pixels()
    assert torch.equal(answers(chunks, "peer0")["clean"], (trained.model(0)(x).argmax(1) == y)[samples])


def test_logits_that_are_not_finite_are_wrong_and_not_class_0() -> None:
    x, y = torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    logits = torch.tensor([[1.0, 0.0], [float("nan"), 0.0], [float("inf"), 0.0]])
    assert correct(lambda _: logits, x, y).tolist() == [True, False, False]  # type: ignore[arg-type]


@pytest.mark.parametrize("checked", [0, 1])
def test_an_ensemble_of_one_is_attacked_once_and_answers_as_its_member(checked: int, trained: Trained,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen peer is no member. The ensemble's module, attacked by itself, finds the same."""
    attacked: list[str] = []

    def counting(target: Target, *rest: Any) -> Any:
        attacked.append(target.name)
        return attack_one(target, *rest)

    models = [trained.model(0), trained.model(1)]
    job = replace(trained.evaluations().job(2), keep=True)
    names = ["peer0", "peer1", "ensemble:prob", "ensemble:vote"]
    targets = make_targets(names, ["peer0", "peer1"], models, frozen=["peer1"])
    work = Work(trained.config, job, targets, trained.data.val, torch.arange(CHUNK), checked=checked)
    monkeypatch.setattr(attacks, "attack_one", counting)
    found = attack_chunk(work, 0, torch.device("cpu"))
    assert attacked == ["peer0", "peer1"] * len(LABELS)
    assert list(found["predictions"]) == names and list(found["checks"]) == names * checked
    assert found["predictions"]["ensemble:prob"] == found["predictions"]["peer0"] != found["predictions"]["peer1"]

    ensemble = Ensemble(models[:1], "prob").eval()
    alone = Work(trained.config, job, [Target("e", ensemble, (ensemble,))], trained.data.val, torch.arange(CHUNK))
    assert attack_chunk(alone, 0, torch.device("cpu"))["predictions"]["e"] == found["predictions"]["ensemble:prob"]


def test_a_training_of_one_peer_attacks_it_once(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    attacked: list[str] = []
    monkeypatch.setattr(attacks, "attack_one", lambda target, *rest: attacked.append(target.name) or attack_one(
        target, *rest))
    first, second = trained.config.peers
    config = trained.config.model_copy(update={"peers": (first, second.model_copy(update={"frozen": True}))})
    found = trained.evaluate(AttackPlan(2), size=CHUNK, config=config)
    assert attacked == ["peer0", "peer1"] * len(LABELS) * 2  # raw and averaged weights
    assert all(torch.equal(found[ENSEMBLE, EMA][name], flags) for name, flags in found["peer0", EMA].items())


@pytest.mark.parametrize(("attacks", "passed", "notes"), [
    # 24 passes each of pgd and cw, 4,000 of autoattack: 40.48 of 4,048 are 1 % of all, in 10 s.
    (("pgd", "cw", "autoattack"), 40.48, ["about 0:16:30 more; without autoattack about 0:00:12: attacks=pgd,cw, or "
                                          "images=N for a part"]),
    (("pgd", "cw", "autoattack"), 2024, []), (("pgd", "cw"), 0.48, [])])
def test_an_evaluation_that_autoattack_makes_long_says_so_early_and_once(
        attacks: tuple[str, ...], passed: float, notes: list[str], trained: Trained,
        monkeypatch: pytest.MonkeyPatch) -> None:
    class Display:
        told: ClassVar[list[str]] = []

        def status(self, *_: Any) -> None: ...

        def note(self, text: str) -> None:
            self.told.append(text)

    Display.told.clear()
    seconds = iter([0.0, 1.0, 10.0, 10.0, 20.0])
    monkeypatch.setattr(chunks, "monotonic", lambda: next(seconds))
    model, plans = trained.model(0), dict.fromkeys(("pgd", "cw"), AttackPlan(24))
    job = replace(trained.evaluations().job(2), threats=(Threat("linf", 0.1),), attacks=attacks, plans=plans)
    work = Work(trained.config, job, [Target("peer0", model, (model,))], trained.data.val, torch.arange(CHUNK))
    one = Progress(work, [0], StopFlag(), Display())
    one.chunk()
    one.attack("peer0", "linf 1/10", "autoattack" if "autoattack" in attacks else "pgd", 3, CHUNK)
    one._within = passed * CHUNK
    one._tell()
    one._tell()
    assert Display.told == notes


def test_a_network_that_says_one_class_to_all_images_is_named_with_a_way_out(tmp_path: Path) -> None:
    """A rate of 10 with much weight decay ends the units of a network; one of 0.01 does not."""
    found = run_small(tmp_path, "lost", "model=tiny_cnn", "loss=at", "optim.schedule=constant", "optim.lr=0.01",
                      "peers.1.optim.lr=10", "optim.weight_decay=0.005", "train.epochs=2", "eval.every=1")
    lines = [line for line in (found.folder.path / "rank_0.log").read_text().splitlines() if "the same class" in line]
    assert lines and all("warning: peer1 gave all validation images the same class after step" in one and
                         "optim.clip_norm" in one for one in lines)


def test_nobody_is_called_collapsed_where_all_images_have_one_class(trained: Trained) -> None:
    chunks = [{"labels": [1, 2], "predictions": {"peer0": {"clean": [3, 3]}, "peer1": {"clean": [3, 1]}}}]
    assert collapsed(chunks, trained.config.peers) == ["peer0"]
    assert collapsed([{**chunks[0], "labels": [1, 1]}], trained.config.peers) == []


# ------------------------------------------------------------------------------------------------ numbers


def chunk_of(target: str, rows: list[list[int]]) -> dict[str, Any]:
    """Four images of class 1, the last one wrong without an attack where a row says no more; 1: it withstands."""
    threats = {label: {"pgd": [*row, 0][:4]} for label, row in zip(LABELS, rows, strict=False)}
    return {"samples": [3, 5, 8, 9], "labels": [1] * 4, "images": "digest", "transfer": {}, "rounded": {},
            "checks": {}, "warnings": [],
            "predictions": {target: {"clean": [1, 1, 1, int(len(rows[0]) > 3)], "threats": threats}}}


def result(target: str, weights: str, rows: list[list[int]]) -> TargetResult:
    (row,) = target_rows({weights: [chunk_of(target, rows)]})
    return TargetResult(row["target"], row["weights"], row["n"], row["accuracy"], row["attacks"])


def test_robust_accuracy_over_two_threats_counts_images_that_withstand_both() -> None:
    shares = result("peer0", RAW, [[1, 1, 0, 0], [1, 0, 1, 0]]).accuracy
    assert shares == {"clean": 1.0, "linf 3/20": 0.5, "l2 3/5": 0.5, "union": 0.25}


def test_a_record_and_a_row_of_the_table_have_each_threat_by_itself_beside_the_union() -> None:
    found = [result("peer0", RAW, [[1, 1, 0, 0], [1, 0, 1, 0]]), result("peer1", RAW, [[1, 1, 1, 0], [1, 1, 1, 1]]),
             result(ENSEMBLE, RAW, [[1, 1, 1, 1], [1, 0, 0, 0]])]
    record = validation_record(found)
    assert record["threat_acc"] == {"linf 3/20": [0.5, 0.75], "l2 3/5": [0.5, 1.0]}
    assert record["robust_acc"] == [0.25, 0.75] and record["ema_threat_acc"] is None
    assert record["ensemble"] == {"clean_acc": 1.0, "robust_acc": 0.25,
                                  "threat_acc": {"linf 3/20": 1.0, "l2 3/5": 0.25}}
    table = final_table("PGD-20", {"last": found})
    assert table.title == "Accuracy on the test set, under PGD-20"
    assert [column.header for column in table.columns[3:]] == ["clean %", "linf 3/20 %", "l2 3/5 %", "union %", "n"]
    assert [next(iter(column.cells)) for column in table.columns] == [
        "peer0", "raw", "last", "100.00", "50.00", "50.00", "25.00", "4"]


def test_the_selection_score_is_the_mean_of_the_peers_averaged_weights_first() -> None:
    def table(weights: str, *rows: list[int]) -> list[TargetResult]:
        return [result(name, weights, [row]) for name, row in zip(("peer0", "peer1", ENSEMBLE), rows, strict=True)]

    raw = table(RAW, [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0])
    ema = table(EMA, [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0])
    peers = [PeerConfig(name="peer0"), PeerConfig(name="peer1")]
    assert selection_score(raw, peers) == pytest.approx(0.625)
    assert selection_score([*raw, *ema], peers) == pytest.approx(0.75)
    generalist = [PeerConfig(name="peer0", role="specialist"), PeerConfig(name="peer1", role="generalist")]
    assert selection_score(raw, generalist) == pytest.approx(0.25)
    assert selection_score(raw, [peers[0], PeerConfig(name="peer1", frozen=True)]) == pytest.approx(1.0)
    of_clean_images = LossConfig(hard_weight=0, kd_weight=0, clean_weight=1)
    lbgat = [PeerConfig(name="peer0", loss=of_clean_images), PeerConfig(name="peer1", loss=LossConfig(kd_weight=1))]
    assert selection_score(raw, lbgat) == pytest.approx(0.25)


@pytest.mark.parametrize("hits,count,low,high", [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                                 (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_the_wilson_interval_has_the_published_values(hits: int, count: int, low: float, high: float) -> None:
    """Newcombe, "Two-sided confidence intervals for the single proportion", Stat. Med. 17 (1998), table I, method 3."""
    assert wilson_interval(hits / count, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(1 - hits / count, count) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize("eps,text", [(8 / 255, "8/255"), (12 / 255, "12/255"), (2000 / 255, "2000/255"),
                                      (0.5 / 255, "1/510"), (0.1, "1/10"), (0.2, "1/5"), (0.3, "3/10"), (0.5, "1/2"),
                                      (1.0, "1"), (12.0, "12"), (0.03137, "0.03137"), (1e-6, "1e-06")])
def test_a_radius_is_written_as_a_fraction_that_reads_back(eps: float, text: str) -> None:
    assert eps_text(eps) == text
    assert float(Fraction(text)) == pytest.approx(eps, rel=1e-12)


# ------------------------------------------------------------------------------------------------ files


def write(trained: Trained, folder: Path, rows: list[list[int]]) -> Path:
    one, found = trained.evaluations(), {RAW: [chunk_of("peer0", rows)]}
    about = one.about(trained.manifest, one.job(5), "best", "test")
    return write_result(folder, "test_best", document_of(about, found, checked=False), image_rows(found))


def test_a_result_file_is_never_overwritten_by_another_result(trained: Trained, tmp_path: Path) -> None:
    tables = [[[1, 1, 0]] * 2, [[1, 0, 0]] * 2, [[0, 0, 0]] * 2, [[1, 0, 0]] * 2]
    paths = [write(trained, tmp_path / "eval", rows) for rows in tables]
    assert [p.name for p in paths] == ["test_best.json", "test_best-2.json", "test_best-3.json", "test_best-2.json"]
    assert [robust_of(json.loads(p.read_text()))["peer0", RAW] for p in paths[:3]] == [0.5, 0.25, 0.0]


def test_a_result_file_says_what_was_done_to_whom(trained: Trained, tmp_path: Path) -> None:
    path = write(trained, tmp_path / "eval", [[1, 1, 0], [1, 0, 0]])
    told = json.loads(path.read_text())
    assert (told["format"], told["step"], told["split"], told["seed"], told["chunk"]) == (2, 25, "test", SEED, CHUNK)
    assert told["plans"]["pgd"]["steps"] == 5 and told["plans"]["pgd"]["restarts"] == 1
    assert told["plans"]["pgd"]["step_size"] == {"linf 3/20": 0.075, "l2 3/5": 0.3}
    assert [(one["norm"], one["eps"]) for one in told["threats"]] == [("linf", "3/20"), ("l2", "3/5")]
    (row,) = told["targets"]
    assert row["n"] == 4 and row["accuracy"] == {"clean": 0.75, "linf 3/20": 0.5, "l2 3/5": 0.25, "union": 0.25}
    assert row["interval_95"]["union"] == pytest.approx(wilson_interval(0.25, 4))
    read = read_result(path)
    assert read.targets[0].accuracy == row["accuracy"] and list(read.named_attacks()) == ["PGD-5"]
    assert (read.checkpoint, read.reportable, read.targets[0].checks) == ("best", None, None)


def test_the_table_has_a_row_per_sample_attack_and_target(trained: Trained, tmp_path: Path) -> None:
    path = write(trained, tmp_path / "eval", [[1, 1, 0], [1, 0, 0]])
    with path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    told = [(r["sample"], r["threat"], r["clean_prediction"], r["prediction"], r["robust"], r["attacked"])
            for r in rows]
    assert told == [
        ("3", "linf 3/20", "1", "1", "1", "1"), ("5", "linf 3/20", "1", "1", "1", "1"),
        ("8", "linf 3/20", "1", "0", "0", "1"), ("9", "linf 3/20", "0", "0", "0", "0"),
        ("3", "l2 3/5", "1", "1", "1", "1"), ("5", "l2 3/5", "1", "0", "0", "1"),
        ("8", "l2 3/5", "1", "0", "0", "1"), ("9", "l2 3/5", "0", "0", "0", "0")]
    assert {(r["target"], r["weights"], r["attack"]) for r in rows} == {("peer0", "raw", "pgd")}
    images = read_result(path).images["peer0", "raw"]
    assert images.labels == dict.fromkeys((3, 5, 8, 9), 1)
    assert images.correct["union"] == {3: True, 5: False, 8: False, 9: False} and images.correct["clean"][8]
