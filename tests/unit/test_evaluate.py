"""`python -m mat_dist.evaluate` on a small run: against the trainer's own evaluation, chunks, files, bad input."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mat_dist
from mat_dist import rng
from mat_dist.attacks.norms import Threat
from mat_dist.config import load_config
from mat_dist.data import as_float, load_data
from mat_dist.errors import StopRequested
from mat_dist.evaluation import chunks, command, soundness, survivors
from mat_dist.evaluation.__main__ import main
from mat_dist.evaluation.attacks import AttackPlan, crafted
from mat_dist.evaluation.autoattack import chunk_seed
from mat_dist.evaluation.chunks import Progress
from mat_dist.evaluation.results import Verdict, wilson_interval
from mat_dist.evaluation.settings import MENU
from mat_dist.runs.console import Screen
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.lock import RunLock
from tests.small_runs import as_format_1, interrupted, run_small, tree_hash
from tests.unit.test_evaluator import SEED, noise

pytestmark = pytest.mark.slow  # half a minute of attacks

FAST = ("attacks=pgd", "checks=0", "steps=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two peers with two threats, attacked by the trainer at the end; the second keeps averaged weights."""
    root = tmp_path_factory.mktemp("runs")
    done = run_small(root, "small", "data.train_size=300", "train.epochs=3", "optim.lr=0.05", "eval.every=1",
                     "eval.test_steps=2", "peers.0.threat=linf", "peers.0.threat.eps=0.1",
                     "peers.1.threat=l2", "peers.1.threat.eps=1/2", "peers.1.optim.ema_decay=0.5")
    assert done.code == 0
    return done.folder.path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to write into."""
    return Path(shutil.copytree(trained, tmp_path / "small"))


@pytest.fixture(autouse=True)
def short_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/unit/test_soundness.py makes them at full length."""
    monkeypatch.setattr(soundness, "SEARCH_QUERIES", 10)
    monkeypatch.setattr(soundness, "OWN_STEPS", 4)


Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """The command in this process -> the JSON file and, below `rows`, the CSV file; asserts the exit code."""
    def command(folder: Path, *words: str, code: int = 0) -> dict[str, Any]:
        before = {p: p.stat().st_mtime_ns for p in (folder / "eval").glob("evaluate_*.json")}
        ended = main([str(folder), *words])
        out, err = capsys.readouterr()
        assert ended == code, err
        assert err.count("\n") == (0 if code == 0 else 1), err
        files = [p for p in (folder / "eval").glob("evaluate_*.json") if before.get(p) != p.stat().st_mtime_ns]
        if not files:
            return {"err": err}
        (file,) = files
        with file.with_suffix(".csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        return json.loads(file.read_text()) | {"rows": rows, "err": err, "out": out, "file": file}
    return command


def targets(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["target"]: one for one in found["targets"]}


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(("label", "weights"), [("best", "ema"), ("last", "raw")])
def test_pgd_gives_what_the_trainer_found_image_by_image(label: str, weights: str, trained: Path, run: Path,
                                                         evaluate: Evaluate) -> None:
    found = evaluate(run, "attacks=pgd", "checks=0", f"checkpoint={label}", f"weights={weights}", "transfer=false")
    (file,) = trained.glob(f"eval/test_{label}_*.csv")
    with file.open(newline="") as stream:
        told = [(r["target"], r["threat"], r["sample"], r["label"], r["robust"], r["attacked"])
                for r in csv.DictReader(stream) if r["weights"] == weights]
    ours = [(r["target"].removesuffix(":prob"), r["threat"], r["sample"], r["label"], r["robust"], r["attacked"])
            for r in found["rows"] if r["attack"] == "pgd"]
    assert sorted(ours) == sorted(told) and len(ours) == 3 * 2 * 40
    assert 0 < sum(row[4] == "1" for row in ours) < len(ours)
    others = {(r["target"], r["attack"]) for r in found["rows"] if r["attack"] != "pgd"}
    assert others == {("ensemble:prob", "transfer")}  # its members' AEs, asked for or not


def test_a_run_of_version_0_1_gives_the_same_images(run: Path, trained: Path, tmp_path: Path,
                                                   evaluate: Evaluate) -> None:
    """Its checkpoints are of format 1, its config.yaml has settings that went; of eval, test_steps alone counts."""
    old = Path(shutil.copytree(trained, tmp_path / "old"))
    for directory in old.glob("checkpoints/step_*"):
        as_format_1(directory)
    text = (old / "config.yaml").read_text()
    assert "eval:\n" in text
    (old / "config.yaml").write_text(text.replace("eval:\n", "eval:\n  test: false\n  step_size: null\n"))
    words = ("attacks=pgd,fgsm", "checks=0", "steps=2", "weights=ema")
    found, ours = evaluate(old, *words), evaluate(run, *words)
    assert found["rows"] == ours["rows"] and len(ours["rows"]) > 40
    assert evaluate(old, "attacks=pgd", "checks=0", "images=4")["plans"]["pgd"]["steps"] == 2


def test_the_table_tells_the_steps_of_each_attack(run: Path, evaluate: Evaluate) -> None:
    found = evaluate(run, "attacks=pgd,cw", "checks=0", "steps=3", "images=4", "targets=peer0", "transfer=false",
                     "queries=9")
    assert "under pgd-3, cw-3" in " ".join(found["out"].split())
    assert "note: no attack of pgd, cw reads queries" in found["out"]


def test_a_union_is_the_and_of_clean_and_all_threats_image_by_image(run: Path, evaluate: Evaluate) -> None:
    found = evaluate(run, "attacks=pgd,fgsm", "checks=0", "threats=linf:0.15,l2:0.7")
    assert found["threats"][0] == {"norm": "linf", "eps": "3/20", "eps_float": 0.15}
    for name, one in targets(found).items():
        rows = [r for r in found["rows"] if r["target"] == name]
        samples = {r["sample"] for r in rows}
        held = {s: all(r["robust"] == "1" for r in rows if r["sample"] == s) for s in samples}
        assert one["n"] == len(samples) == 40
        assert one["accuracy"]["union"] == pytest.approx(sum(held.values()) / 40)
        assert one["accuracy"]["union"] <= min(one["accuracy"]["linf 3/20"], one["accuracy"]["l2 7/10"])
        assert one["interval_95"]["union"] == pytest.approx(wilson_interval(sum(held.values()) / 40, 40))
        clean = {r["sample"]: r["clean_prediction"] == r["label"] for r in rows}
        assert one["accuracy"]["clean"] == pytest.approx(sum(clean.values()) / 40)
        assert {r["attack"] for r in rows} == {"pgd", "fgsm", "transfer"}
        for threat, sources in found["transfer_accuracy"].items():
            assert name not in sources[name] and len(sources) == 3
            least = min(shares[name] for source, shares in sources.items() if source != name)
            assert one["attacks"][threat]["transfer"] <= least <= one["accuracy"]["clean"]


def test_autoattack_in_the_command_is_a_direct_call_chunk_by_chunk(run: Path, evaluate: Evaluate) -> None:
    pyautoattack = pytest.importorskip("pyautoattack", exc_type=ImportError)
    found = evaluate(run, "attacks=autoattack", "version=custom", "custom=apgd-ce", "targets=peer0", "weights=raw",
                     "checks=0", "eps=0.1", "threats=linf:0.1", "checkpoint=latest", "seed=5")
    assert found["autoattack"] == {"version": "custom", "custom": ["apgd-ce"]} and "pyautoattack" in found["versions"]
    config = load_config(str(run / "config.yaml"))
    data = load_data(config.data, seed=config.run.seed, batch_size=config.train.batch_size).test
    model = mat_dist.load(run, "peer0", which="latest", weights="raw")
    told: list[int] = []
    for chunk in range(2):
        images, y = data.batch(torch.arange(20 * chunk, 20 * chunk + 20))
        attack = pyautoattack.AutoAttack(model, norm="Linf", eps=0.1, version="custom", attacks=["apgd-ce"],
                                         seed=chunk_seed(5, "linf", chunk))
        attack.logger.propagate = False
        told += attack.run_standard_evaluation(as_float(images), y, batch_size=20)[1].tolist()
    assert [int(r["prediction"]) for r in found["rows"]] == told


@pytest.mark.thorough
def test_pgd_20_is_that_of_another_implementation_on_1000_images(tmp_path: Path, evaluate: Evaluate) -> None:
    """fp64, so that rounding decides no image; the noise comes from the published keys."""
    done = run_small(tmp_path, "large", "data.train_size=1000", "train.epochs=3", "optim.lr=0.05", f"run.seed={SEED}",
                     "step.precision=fp64")
    threats = {"linf 1/10": ("linf", 0.1), "l2 3/5": ("l2", 0.6)}
    found = evaluate(done.folder.path, "attacks=pgd", "steps=20", "checks=0", "split=train", "targets=peer0",
                     "threats=linf:0.1,l2:0.6", "eval.chunk=250")
    config = load_config(str(done.folder.config))
    data = load_data(config.data, seed=SEED, batch_size=16).train
    model = mat_dist.load(done.folder.path, "peer0", which="latest")
    for label, (norm, eps) in threats.items():
        held: list[int] = []
        for chunk in range(4):
            images, y = data.batch(torch.arange(250 * chunk, 250 * chunk + 250))
            x = images.double() / 255
            adv = project_all(x + noise(norm, eps, x.shape, 0, chunk), x, norm, eps)
            for _ in range(20):
                adv.requires_grad_()
                (g,) = torch.autograd.grad(F.cross_entropy(model(adv), y, reduction="sum"), adv)
                move = g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                adv = project_all((adv + 2.5 * eps / 20 * move).detach(), x, norm, eps)
            held += ((model(adv).argmax(1) == y) & (model(x).argmax(1) == y)).int().tolist()
        rows = [int(r["robust"]) for r in found["rows"] if r["threat"] == label]
        assert rows == held and len(held) == 1000 and 100 < sum(held) < 950


def project_all(adv: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    d = adv - x
    factor = (d.flatten(1).norm(dim=1) / eps).clamp(min=1).view(-1, 1, 1, 1)
    return (x + (d.clamp(-eps, eps) if norm == "linf" else d / factor)).clamp(0, 1)


def test_a_vote_is_attacked_through_surrogates_and_judged_as_deployed(run: Path, evaluate: Evaluate) -> None:
    found = evaluate(run, *FAST, "targets=ensemble:vote,ensemble:logit,ensemble", "threats=linf:0.15", "transfer=false",
                     "queries=20")
    shares = {name: one["accuracy"] for name, one in targets(found).items()}
    assert list(shares) == ["ensemble:vote", "ensemble:logit", "ensemble:prob"]
    assert shares["ensemble:vote"]["linf 3/20"] < shares["ensemble:vote"]["clean"]


def test_attacks_are_columns_in_the_order_asked_for(run: Path, evaluate: Evaluate) -> None:
    """A vote gets a search as well, and its members' AEs though they are no targets."""
    names = ["targeted", "uniform", "mifgsm", "gaussian", "fgsm"]
    found = evaluate(run, f"attacks={','.join(names)}", "checks=0", "steps=3", "targets=peer0,ensemble:vote",
                     "threats=linf:0.15", "transfer=false", "queries=20", "targets_per_image=2")
    per_target = {"peer0": names, "ensemble:vote": [*names, "search", "transfer"]}
    for target, columns in per_target.items():
        rows = [r for r in found["rows"] if r["target"] == target]
        assert list(dict.fromkeys(r["attack"] for r in rows)) == columns and len(rows) == 40 * len(columns)
        shares = targets(found)[target]["attacks"]["linf 3/20"]
        assert list(shares) == columns and shares["uniform"] > shares["targeted"]
    head = next(line for line in found["out"].splitlines() if "targeted" in line and "threat" in line)
    assert [word for word in head.split() if word in per_target["ensemble:vote"]] == per_target["ensemble:vote"]
    assert found["attacks"] == names and found["plans"].keys() == {"targeted", "mifgsm", "fgsm"}
    assert found["plans"]["targeted"]["targets"] == 2 and found["queries"] == 20


def test_parts_of_autoattack_are_columns_of_their_own(run: Path, evaluate: Evaluate) -> None:
    pytest.importorskip("pyautoattack", exc_type=ImportError)
    found = evaluate(run, "attacks=apgd-ce,apgd-dlr,pgd", "steps=5", "targets=peer0", "weights=raw", "checks=0",
                     "threats=linf:0.1,l2:0.4", "checkpoint=latest", "eval.chunk=40", "images=8")
    shares = targets(found)["peer0"]["attacks"]
    assert [list(one) for one in shares.values()] == [["apgd-ce", "apgd-dlr", "pgd"]] * 2
    assert all(one["apgd-ce"] <= one["pgd"] for one in shares.values()) and "pyautoattack" in found["versions"]
    assert found["autoattack"] is None


def test_equal_images_have_one_digest_and_others_another(run: Path, evaluate: Evaluate) -> None:
    words = ("attacks=fgsm", "checks=0", "targets=peer0", "threats=linf:0.1")
    one, again, fewer, other = (evaluate(run, *words, *more)["images_digest"] for more in (
        ("seed=1",), ("seed=2",), ("images=39",), ("split=val",)))
    assert one == again and len({one, fewer, other}) == 3


def test_files_say_what_was_done(run: Path, evaluate: Evaluate) -> None:
    found = evaluate(run, *FAST, "checks=1", "images=15", "targets=peers", "eps=8/255", "threats=linf:0.1", "seed=9")
    assert found["threats"] == [{"norm": "linf", "eps": "8/255", "eps_float": 8 / 255}]
    assert (found["n"], found["seed"], found["split"], found["checkpoint"]) == (15, 9, "test", "best")
    assert found["plans"]["pgd"]["step_size"] == {"linf 8/255": 2.5 * 8 / 255 / 2}
    assert found["config"]["peers"][0]["threat"]["eps"] == 0.1
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert found["chosen_on_validation"] in ("peer0", "peer1")
    assert found["reportable"] is False and [v["check"] for v in targets(found)["peer0"]["checks"] if not v["passed"]
                                             ] == ["too few images", "undertrained"]
    for reason in ("too few images: 15 images of at least 300", "undertrained: 3 of 3 epochs, at least 5 are needed"):
        assert f"not reportable, {reason}\n" in found["out"]
    assert "peer to deploy, chosen on the validation split: peer" in found["out"]
    assert len(found["rows"]) == 15 * 2 * 2 and found["rows"][0].keys() >= {"sample", "label", "prediction", "robust"}


def test_saved_aes_are_what_fooled_the_target(run: Path, evaluate: Evaluate) -> None:
    found = evaluate(run, "attacks=fgsm,pgd", "steps=2", "checks=0", "targets=peer0", "threats=linf:64/255",
                     "save=true", "weights=raw", "checkpoint=latest")
    model = mat_dist.load(run, "peer0", which="latest", weights="raw")
    data = load_data(load_config(str(run / "config.yaml")).data, seed=0, batch_size=16).test
    robust, whole = 0, 0
    for file in sorted(found["file"].with_suffix(".chunks").glob("*.pt")):
        saved = torch.load(file, weights_only=True)
        images, y = data.batch(saved["samples"])
        aes = saved["aes"]["peer0"]["linf 64/255"]
        assert aes["float32"].dtype == torch.float32 and aes["uint8"].dtype == torch.uint8
        assert (aes["float32"] - as_float(images)).abs().max() <= 64 / 255 * (1 + 1e-6)
        robust += int((model(aes["float32"]).argmax(1) == y).sum())
        whole += int((model(aes["uint8"].float() / 255).argmax(1) == y).sum())
    one = targets(found)["peer0"]
    assert 0 < robust < 40 and one["accuracy"]["linf 64/255"] == robust / 40
    assert one["accuracy_uint8"] == {"linf 64/255": whole / 40}


def test_evaluations_of_the_same_images_are_paired_and_others_refused(run: Path, evaluate: Evaluate, tmp_path: Path,
                                                                      capsys: pytest.CaptureFixture[str]) -> None:
    """A subset of the test set is the same for a run of another seed."""
    done = run_small(tmp_path / "seeds", "other", "data.train_size=300", "train.max_steps=1", "run.seed=1")
    others = {"equal": run, "eps": run, "norm": run, "fewer": run, "split": run, "subset": done.folder.path}
    words = ("attacks=fgsm", "targets=peer0", "weights=raw", "checks=1")
    asked = {"equal": ("threats=linf:0.1", "images=20", "seed=7"), "eps": ("threats=linf:0.2", "images=20"),
             "norm": ("threats=l2:0.1", "images=20"), "fewer": ("threats=linf:0.1", "images=19"),
             "split": ("threats=linf:0.1", "images=20", "split=val"), "subset": ("threats=linf:0.1", "images=20")}
    first = Path(shutil.copytree(run, tmp_path / "first"))
    evaluate(first, *words, "threats=linf:0.1", "images=20")
    told = {}
    for name, folder in others.items():
        copy = Path(shutil.copytree(folder, tmp_path / name))
        evaluate(copy, *words, *asked[name])
        code = main(["--compare", str(first), str(copy)])
        told[name] = (code, capsys.readouterr().err)
    texts = {"eps": "threats linf 1/10 and linf 1/5", "norm": "threats linf 1/10 and l2 1/10", "fewer": "n 20 and 19",
             "split": "split test and val"}
    assert told["equal"] == told["subset"] == (0, "") and all(told[name][0] == 2 for name in texts)
    assert {name: text in told[name][1] for name, text in texts.items()} == dict.fromkeys(texts, True)


def test_the_console_of_a_run_has_a_line_for_each_epoch_each_row_once_and_the_next_commands(
        tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = tmp_path / "my plug-in.py"
    plugin.write_text("")
    done = run_small(tmp_path, "small", "train.epochs=3", "eval.every=3", "eval.test_steps=1", "log.every=1000",
                     "log.console=plain", "--plugin", str(plugin))
    lines = capsys.readouterr().out.splitlines()
    assert [record["epoch"] for record in done.records("step")] == [1.0, 2.0, 3.0]
    assert [line.split("  ")[:2] for line in lines if line.startswith("step ")] == [
        [f"step {4 * epoch}/12", f"epoch {epoch}.0"] for epoch in (1, 2, 3)]
    assert done.records("epoch")[0]["best"]["step"] == 12
    assert sum("best so far: step 12, mean" in line for line in lines) == 1
    rows = [line.split("│")[1].strip() for line in lines if "│" in line]
    assert rows == ["peer0", "peer1", "ensemble"] and sum("best, last" in line for line in lines) == 3
    assert all((done.folder.eval / f"test_{label}_step_00000012.json").exists() for label in ("best", "last"))
    assert lines[-2:] == [f"{word} python -m mat_dist.{command} {done.folder.path} --plugin '{plugin}'"
                          for word, command in (("next:", "evaluate"), ("     ", "report"))]
    for line in lines[-2:]:
        words = shlex.split(line.partition("mat_dist.")[2])
        assert Path(words[1]) == done.folder.path and words[3] == str(plugin)


# ------------------------------------------------------------------------------------------------ chunks


def test_finished_chunks_are_not_attacked_again_after_a_stop(run: Path, trained: Path, tmp_path: Path,
                                                             evaluate: Evaluate,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("attacks=pgd", "checks=1", "steps=2", "eval.chunk=8")
    whole = evaluate(Path(shutil.copytree(trained, tmp_path / "whole" / "small")), *words)

    def stopped() -> BaseException:
        return StopRequested("stopped", "here", "again")

    with monkeypatch.context() as patch:
        interrupted(patch, (chunks, "attack_chunk"), 4, stopped)
        evaluate(run, *words, code=75)
    (folder,) = run.glob("eval/*.chunks")
    assert len(list(folder.iterdir())) == 3
    (folder / "chunk_00001.json").write_text("{")  # damaged: attacked again
    attacked: list[int] = []
    original = chunks.attack_chunk
    monkeypatch.setattr(chunks, "attack_chunk", lambda work, chunk, *more: (
        attacked.append(chunk), original(work, chunk, *more))[1])
    found = evaluate(run, *words)
    assert attacked == [1, 3, 4]
    assert (found["targets"], found["rows"]) == (whole["targets"], whole["rows"])
    again = evaluate(run, *words)
    assert attacked == [1, 3, 4] and again["targets"] == whole["targets"] and again["file"] == found["file"]


def test_ctrl_c_is_obeyed_at_the_next_pass_inside_a_chunk_and_the_result_is_the_same(
        run: Path, trained: Path, tmp_path: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("attacks=pgd,search", "queries=5", "checks=8", "steps=1", "eval.chunk=8", "images=8", "targets=ensemble")
    whole = evaluate(Path(shutil.copytree(trained, tmp_path / "whole" / "small")), *words)
    passed, at, original = [0], 40, Progress._passed

    def counted(self: Progress, *given: Any) -> None:
        passed[0] += 1
        if passed[0] == at:
            signal.raise_signal(signal.SIGINT)
        original(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "_passed", counted)
        assert "start the same command again" in evaluate(run, *words, code=75)["err"]
    assert passed[0] == at
    found = evaluate(run, *words)
    assert (found["targets"], found["rows"]) == (whole["targets"], whole["rows"])


def test_an_evaluation_tells_target_threat_attack_survivors_and_the_time_left(
        run: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, float, float | None, Any]] = []

    class Recorder(Screen):
        def status(self, text: str, elapsed_s: float = 0.0, eta_s: float | None = None, tally: Any = None) -> None:
            told.append((text, elapsed_s, eta_s, {key: dict(row) for key, row in (tally or {}).items()}))

    monkeypatch.setattr(command, "choose_screen", lambda mode: Recorder())
    monkeypatch.setattr(chunks, "REFRESH_S", 0.0)
    found = evaluate(run, "attacks=pgd,search", "queries=5", "checks=8", "steps=1", "eval.chunk=8", "images=16")
    texts = [text for text, *_ in told]
    for target in ("peer0", "peer1", "ensemble:prob"):
        for threat in ("linf 1/10", "l2 1/2"):
            for name in ("pgd", "search", "soundness checks"):
                assert any(f": {target}, {threat}, {name}: " in text for text in texts), (target, threat, name)
    assert texts[0].startswith("loading") and "chunk 2 of 2" in texts[-2] and texts[-1] == ""
    shares = [elapsed / (elapsed + eta) for _, elapsed, eta, _ in told[1:-1] if eta is not None]
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(shares)) and 0.8 < shares[-1] <= 1
    rows = [row for row in found["rows"] if row["target"] == "peer0" and row["threat"] == "linf 1/10"]
    right = {row["sample"] for row in rows if row["clean_prediction"] == row["label"]}
    for name in ("pgd", "search"):
        right -= {row["sample"] for row in rows if row["attack"] == name and row["prediction"] != row["label"]}
    assert told[-2][3]["peer0", "linf 1/10"]["search"] == (len(right), 16)


def test_another_request_is_another_evaluation(run: Path, evaluate: Evaluate) -> None:
    one = evaluate(run, *FAST, "targets=peer0", "images=5")
    other = evaluate(run, *FAST, "targets=peer0", "images=5", "seed=1")
    assert one["file"] != other["file"] and one["digest"] != other["digest"]


def test_nothing_but_eval_and_the_rank_log_is_written(run: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate(run, *FAST, "targets=peer0", "images=5")
    shutil.copytree(run, tmp_path / "after", ignore=shutil.ignore_patterns("evaluate_*", "rank_0.log"))
    shutil.copytree(run, tmp_path / "before", ignore=shutil.ignore_patterns("evaluate_*", "rank_0.log"))
    assert tree_hash(tmp_path / "after") == tree_hash(tmp_path / "before")
    assert not list(run.rglob("*.tmp")) and not (run / "lock").exists()


class Hungry(nn.Module):
    """Has memory for gradients of so many images at most."""

    def __init__(self, model: nn.Module, most: int) -> None:
        super().__init__()
        self.model, self.most = model, most

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.requires_grad and len(x_BCHW) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.model(x_BCHW)


@pytest.mark.parametrize("threat", [Threat("linf", 0.1), Threat("l2", 0.5), Threat("l1", 1.0)], ids=lambda t: t.norm)
def test_attacks_in_parts_find_the_same_when_memory_runs_out(threat: Threat) -> None:
    with rng.keyed_rng(1):
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).double()
    x = rng.uniform(2, (11, 1, 4, 4), dtype=torch.float64)
    y = model(x).argmax(1)
    plan = AttackPlan(3, restarts=2)
    whole, parts = (list(crafted(Hungry(model, most), x, y, threat, plan, seed=4, chunk=1)) for most in (11, 3))
    assert len(parts) == 2 and not torch.equal(parts[0], parts[1])
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    with pytest.raises(torch.OutOfMemoryError):
        list(crafted(Hungry(model, 0), x, y, threat, plan, seed=4, chunk=1))


def test_too_little_memory_for_autoattack_is_one_line(run: Path, evaluate: Evaluate,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("12 GiB asked for")

    monkeypatch.setattr(chunks, "attack_chunk", full)
    assert "use a smaller eval.chunk" in evaluate(run, *FAST, code=6)["err"]


# ------------------------------------------------------------------------------------------------ soundness


def test_a_failed_check_marks_the_numbers_and_ends_with_16(run: Path, evaluate: Evaluate,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    def judged(sums: Any) -> list[Verdict]:
        return [Verdict("noise", "linf 1/10", False, "9 of 40 images more")]

    monkeypatch.setattr(survivors, "judge", judged)
    found = evaluate(run, *FAST, "checks=1", "targets=peer0", code=16)
    assert "failed checks: peer0: noise (linf 1/10), 9 of 40 images more" in found["err"]
    assert found["reportable"] is False and targets(found)["peer0"]["reportable"] is False
    assert "NO: noise" in found["out"]


@pytest.mark.parametrize(("attacks", "alone"), [("cr", True), ("cr,uniform", True), ("cr,fgsm", False)])
def test_no_number_is_reportable_that_rests_on_constraint_relaxation_alone(attacks: str, alone: bool, run: Path,
                                                                          evaluate: Evaluate) -> None:
    found = evaluate(run, f"attacks={attacks}", "checks=1", "threats=linf:0.1", "images=8", "targets=peer0")
    verdicts = {check["check"]: check["passed"] for check in targets(found)["peer0"]["checks"]}
    assert verdicts["a look alone"] is not alone
    assert found["reportable"] is False and targets(found)["peer0"]["reportable"] is False  # 8 images are too few too
    assert ("a look alone" in found["out"]) is alone


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(("words", "code", "text"), [
    (["images=41"], 3, "41 images are asked for, the test split has 40"),
    (["targets=peer7"], 2, "there is no target 'peer7'"),
    (["targets=peers,ensemble:weights"], 2, "went after version 0.1"),
    (["atacks=pgd"], 2, "unknown setting atacks"),
    (["attacks=pgd,mifgms"], 2, "there is no attack 'mifgms' (command line, attacks): did you mean mifgsm?"),
    (["attacks=autoattack", "version=custom", "custom=apgd-ce,autoattack"], 2, "there is no attack 'autoattack'"),
    (["attacks="], 2, "there is no attack ''"),
    (["attacks=pgd,cr"], 2, "cr knows linf alone, not l2"),
    (["threats=standard"], 2, "no standard radius in linf for digits"),
    (["threats=union:all"], 2, "choose from eat, msd, mng"),
    (["attack.eps=0.1"], 2, "attack.eps cannot be changed for a run that is there"),
    (["eps=8", "threats=linf:0.1"], 2, "write 8/255"),
    (["eps=0.1"], 2, "one eps for the norms linf, l2"),
    (["threats=linf:0"], 2, "'linf:0' is not a threat"),
    (["version=custom"], 2, "belong together"),
    (["checkpoint=step_7"], 4, "there is no checkpoint 'step_7'"),
    (["--now"], 2, "unknown option --now"),
    (["run.device=cuda"], 6, "no GPU is visible"),
    (["data.root=/nowhere", "run.device=cpu", "comm.timeout=x"], 2, "comm.timeout"),
])
def test_a_mistake_is_one_line_with_its_code(words: list[str], code: int, text: str, trained: Path,
                                             evaluate: Evaluate) -> None:
    if code == 6 and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert text in evaluate(trained, "attacks=pgd", *[w for w in words], code=code)["err"]


def test_a_folder_that_is_missing_or_no_run_is_refused(tmp_path: Path, evaluate: Evaluate) -> None:
    assert "there is no run folder" in evaluate(tmp_path / "none", code=2)["err"]
    assert "it has no config.yaml" in evaluate(tmp_path, code=2)["err"]


def test_a_run_without_a_checkpoint_is_refused(run: Path, evaluate: Evaluate) -> None:
    shutil.rmtree(run / "checkpoints")
    assert "there is no checkpoint" in evaluate(run, *FAST, code=4)["err"]


def test_a_run_that_is_being_written_is_refused(run: Path, evaluate: Evaluate) -> None:
    with RunLock(RunFolder(run), None):
        assert "the run is still being written by pid" in evaluate(run, *FAST, code=5)["err"]


def test_a_missing_extra_is_one_line_with_code_6(run: Path, evaluate: Evaluate,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    assert "pip install 'mat_dist[eval]'" in evaluate(run, "attacks=autoattack", code=6)["err"]


def test_a_foreign_pickle_is_refused_and_not_run(run: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    for file in run.glob("checkpoints/step_*/peer_0.safetensors"):
        torch.save({"model": Payload()}, file)
    evaluate(run, *FAST, code=4)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("change", "text"), [
    ({"digest": "0"}, "not those that the run was trained with"),
    ({"classes": ("a", "b")}, "images (1, 8, 8) of 2 classes, the models take (1, 8, 8) of 10")])
def test_other_images_or_classes_are_refused(change: dict[str, Any], text: str, run: Path, evaluate: Evaluate,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load_data", lambda *a, **k: dataclasses.replace(load_data(*a, **k), **change))
    assert text in evaluate(run, *FAST, code=3)["err"]


def test_pyautoattack_is_refused_for_a_run_in_fp64(tmp_path: Path, evaluate: Evaluate) -> None:
    pytest.importorskip("pyautoattack", exc_type=ImportError)
    done = run_small(tmp_path, "double", "train.max_steps=1", "step.precision=fp64")
    assert "computes in fp32, the models in fp64" in evaluate(done.folder.path, "attacks=pgd,apgd-ce", code=2)["err"]


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(f"{key}=" in out for key in ("targets", "weights", "attacks", "eps", "version", "checks", "queries"))
    assert all(f"\n  {name} " in out for name in MENU)
