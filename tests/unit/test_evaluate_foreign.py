"""`python -m mat_dist.evaluate FILE.pt` and `sources=`: state dicts of others, and transfer from other checkpoints."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mat_dist
from mat_dist import checkpoints, train
from mat_dist.attacks.norms import Threat
from mat_dist.config import load_config
from mat_dist.data import as_float, load_data
from mat_dist.errors import CheckpointError, ConfigError, OutputError
from mat_dist.evaluation import foreign, soundness
from mat_dist.evaluation.__main__ import main
from mat_dist.evaluation.attacks import FROM, AttackPlan, craft
from mat_dist.evaluation.settings import FileOptions, Request, parse
from mat_dist.models import registry
from mat_dist.models.registry import Images
from mat_dist.report.__main__ import main as report
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.lock import RunLock
from tests.small_runs import run_small, tree_hash
from tests.unit.test_published import loaded

pytestmark = pytest.mark.slow  # small trainings and attacks

FAST = ("attacks=pgd", "checks=0", "steps=2", "eval.chunk=20", "run.device=cpu")
DATA = ("data.name=digits", "data.train_size=300", "data.val_size=40", "data.test_size=40")
MODEL = ("model=tiny_cnn", "model.width=0.25")
KNOWN = (*FAST, *DATA, *MODEL, "threats=linf:0.1", "normalise=data")
Command = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two peers that are better than chance."""
    done = run_small(tmp_path_factory.mktemp("runs"), "small", "data.train_size=300", "train.epochs=3",
                     "optim.lr=0.05")
    assert done.code == 0
    return done.folder.path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run with another seed, norm and averaged weights."""
    done = run_small(tmp_path_factory.mktemp("runs"), "other", "data.train_size=300", "train.epochs=3", "run.seed=5",
                     "optim.lr=0.05", "model.norm=group", "optim.ema_decay=0.5")
    assert done.code == 0
    return done.folder.path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to write into."""
    return Path(shutil.copytree(trained, tmp_path / "small"))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(soundness, "SEARCH_QUERIES", 10)
    monkeypatch.setattr(soundness, "OWN_STEPS", 4)
    monkeypatch.chdir(tmp_path)  # where `runs/` is made


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """The command in this process -> the newest result with its rows and what was printed; asserts the exit code."""
    def command(*words: Any, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        ended = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert ended == code, err + out
        assert err.count("\n") == (0 if code == 0 else 1), err
        if code:
            return {"err": err, "out": out}
        file = Path(out.strip().splitlines()[-1].removeprefix("mat_dist: "))
        with file.with_suffix(".csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        folder = file.resolve().parents[1].relative_to(tmp_path.resolve())
        return json.loads(file.read_text()) | {"rows": rows, "out": out, "file": file, "folder": folder}
    return command


def weights(run: Path, peer: int = 0) -> dict[str, torch.Tensor]:
    """A peer's network as somebody else would save it: without our normalisation."""
    state = checkpoints.load_peer(checkpoints.load_manifest(RunFolder(run), "latest"), peer)["model"]
    return {key.removeprefix("net."): value for key, value in state.items() if key.startswith("net.")}


def saved(content: Any, name: str = "theirs.pt") -> Path:
    torch.save(content, name)
    return Path(name)


def columns(found: dict[str, Any], target: str, attack: str = "pgd") -> list[tuple[str, ...]]:
    return [(r["sample"], r["label"], r["clean_prediction"], r["prediction"], r["robust"]) for r in found["rows"]
            if r["target"] == target and r["attack"] == attack]


# ------------------------------------------------------------------------------------------------ state dicts


@pytest.mark.parametrize("form", ["plain", "wrapped", "old names", "whole model", "peer file"])
def test_the_weights_of_a_run_give_the_same_results_as_the_run(form: str, run: Path, evaluate: Command) -> None:
    ours = evaluate(run, *FAST, "targets=peer0", "threats=linf:0.1")
    told = ("normalise=data",)
    plain = weights(run)
    content: Any = {"plain": plain, "wrapped": {"epoch": 9, "state_dict": {f"module.{k}": v for k, v in plain.items()}},
                    "old names": {f"layer{i}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(plain.items())},
                    }.get(form)
    if form in ("whole model", "peer file"):
        peer = checkpoints.load_peer(checkpoints.load_manifest(RunFolder(run), "latest"), 0)
        content, told = (peer["model"] if form == "whole model" else peer), ()
    file = saved(content)
    found = evaluate(file, *FAST, *DATA, *MODEL, *told, "threats=linf:0.1")
    assert columns(found, "theirs") == columns(ours, "peer0") and len(columns(ours, "peer0")) == 40
    assert found["folder"].parent == Path("runs") and found["folder"].name.startswith("theirs-")
    assert "clean accuracy on the first 40 images" in found["out"] and "hint" not in found["out"]
    assert ("by order" in found["out"]) == (form == "old names") and (".module'" in found["out"]) == (form == "wrapped")
    assert [one["target"] for one in found["targets"]] == ["theirs"]


def test_a_file_becomes_a_run_that_every_command_takes(run: Path, evaluate: Command,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(weights(run))
    found = evaluate(file, *KNOWN, "out=results/resnet")
    folder = Path("results/resnet")
    assert found["folder"] == folder and found["config"]["peers"][0]["threat"] == {"norm": "linf", "eps": 0.1}
    model, x = mat_dist.load(folder, "theirs"), torch.rand(3, 1, 8, 8)
    assert torch.equal(model(x), mat_dist.load(run, "peer0")(x))
    before = tree_hash(folder / "checkpoints")
    again = evaluate(folder, *FAST)
    assert columns(again, "theirs") == columns(found, "theirs")
    assert report([str(folder), "--images", "8"]) == 0 and (folder / "report" / "index.html").exists()
    exits = json.loads((folder / "exit.json").read_text())
    assert exits["state"] == "done" and tree_hash(folder / "checkpoints") == before
    config = str(shutil.copy(folder / "config.yaml", "again.yaml"))
    assert train.main(["--config", config, "run.root=results", "run.name=resnet"]) == 5
    assert "the run is finished" in capsys.readouterr().err


def test_the_same_command_again_uses_the_folder_and_the_chunks_that_are_there(run: Path, evaluate: Command) -> None:
    file = saved(weights(run))
    first = evaluate(file, *KNOWN)
    before = {p: p.stat().st_mtime_ns for p in first["folder"].rglob("chunk_*")}
    again = evaluate(file, *KNOWN)
    assert again["file"] == first["file"] and "2 of 2 chunks are there" in again["out"]
    assert before == {p: p.stat().st_mtime_ns for p in first["folder"].rglob("chunk_*")}
    more = evaluate(file, *KNOWN[:-2], "threats=l2:0.5", "normalise=data")  # another threat, the same model
    assert more["folder"] == first["folder"] and more["file"] != first["file"]
    other = evaluate(file, *KNOWN[:-1], "mean=0.5", "std=0.5")
    assert other["folder"] != first["folder"]
    images = checkpoints.load_manifest(RunFolder(other["folder"]), "latest").meta.extra["images"]
    assert (images["mean"], images["std"]) == ([0.5], [0.5])


def test_a_folder_that_holds_something_else_is_left_alone(run: Path, evaluate: Command) -> None:
    file, other = saved(weights(run)), saved(weights(run, 1), "other.pt")
    evaluate(file, *KNOWN, "out=mine")
    for folder, words in ((Path("mine"), (other, *KNOWN)), (run, (file, *KNOWN)),
                          (Path("mine"), (file, *KNOWN[:-1], "normalise=none"))):
        before = tree_hash(folder)
        assert "choose another out=FOLDER" in evaluate(*words, f"out={folder}", code=5)["err"]
        assert tree_hash(folder) == before
    Path("thesis").mkdir()
    Path("thesis/chapter.tex").write_text("...")
    assert "not a run folder" in evaluate(file, *KNOWN, "out=thesis", code=5)["err"]


def test_an_import_that_was_killed_is_completed(run: Path, evaluate: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(weights(run))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OutputError("no space", "here", "free some")

    for function in ("write_environment", "write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(foreign, function, full)
            assert main([str(file), *KNOWN, "out=mine"]) == 5
            assert not Path("mine/config.yaml").exists()
    assert evaluate(file, *KNOWN, "out=mine")["folder"] == Path("mine")


def test_wrong_weights_are_hinted_at(evaluate: Command, run: Path) -> None:
    state = weights(run)
    state["4.weight"] = -state["4.weight"]
    found = evaluate(saved(state), *KNOWN)
    assert "hint: that is no better than chance (10 %)" in found["out"]


def told(found: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the document, and whether the table, doubt that the network is the one that was trained."""
    doubts = {one["check"]: one["passed"] for one in found["targets"][0]["checks"]}
    assert found["reportable"] is found["targets"][0]["reportable"] is False  # checks=0
    return doubts.get("network not confirmed") is False, "NO: network not confirmed" in found["out"]


@pytest.mark.parametrize("change", ["activation", "eps"])
def test_weights_of_a_network_that_computes_something_else_are_not_reportable(change: str, run: Path,
                                                                              evaluate: Command) -> None:
    words = [word for word in KNOWN if not word.startswith("data.test_size")]  # all images: nothing is left to chance
    data = load_data(load_config("digits").data, seed=0, batch_size=16).test
    images, labels = data.batch(torch.arange(len(data)))
    theirs = mat_dist.load(run, "peer0", which="latest")
    for module in list(theirs.get_submodule("net").modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.ReLU) and change == "activation":
                setattr(module, name, torch.nn.SiLU())
            elif isinstance(child, torch.nn.BatchNorm2d) and change == "eps":
                child.eps = 1.0
    known = (theirs(as_float(images)).argmax(1) == labels).double().mean().item()
    file = saved({f"layer{i}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(weights(run).items())})
    found = evaluate(file, *words, "images=1")
    assert told(found) == (True, True)
    assert "assumed: ReLU, BatchNorm2d with eps 1e-05" in found["out"] and "clean=ACCURACY" in found["out"]
    err = evaluate(file, *words, "images=1", f"clean={known:.4f}", code=4)["err"]
    assert "computes something else than the one that was trained" in err and f"of the {len(data)} images" in err


def test_an_accuracy_that_is_known_or_the_user_confirms_a_file_for_good(run: Path, evaluate: Command) -> None:
    file = saved(weights(run))
    first = evaluate(file, *KNOWN)
    clean = first["targets"][0]["accuracy"]["clean"]
    assert told(first) == (True, True)
    assert "clean says 10" in evaluate(file, *KNOWN, "clean=0.1", code=4)["err"]
    assert told(evaluate(file, *KNOWN)) == (True, True)
    confirmed = evaluate(file, *KNOWN, f"clean={100 * clean:.1f}%")
    assert told(confirmed) == (False, False) and "2 of 2 chunks are there" in confirmed["out"]
    assert confirmed["folder"] == first["folder"] and confirmed["file"] != first["file"]
    assert told(evaluate(confirmed["folder"], *FAST, "steps=1")) == (False, False)
    assert told(evaluate(saved(weights(run, 1), "b.pt"), *KNOWN, "confirmed=true")) == (False, False)
    assert told(evaluate("b.pt", *KNOWN, "model.activation=silu")) == (True, True)  # another network than was confirmed


@pytest.mark.parametrize(("text", "share", "rounding"), [
    ("0.8492", 0.8492, 0.00005), ("84.92", 0.8492, 0.00005), ("84.9%", 0.849, 0.0005), ("1", 1.0, 0.5),
    ("0.5 %", 0.005, 0.0005)])
def test_a_known_accuracy_is_a_share_or_per_cent(text: str, share: float, rounding: float) -> None:
    known = FileOptions(clean=text).clean
    assert known is not None and (known.share, known.rounding) == pytest.approx((share, rounding))


@pytest.mark.parametrize("text", ["good", "0", "101", "-0.5", "nan", "1e-1"])
def test_what_is_no_accuracy_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be used for clean .*: write an accuracy such as 0\.8492"):
        parse(["a.pt", "model=x", f"clean={text}"])


def test_one_of_several_networks_is_chosen_by_its_entry(run: Path, evaluate: Command) -> None:
    bad = {key: -value for key, value in weights(run).items()}
    file = saved({"state_dict": bad, "state_dict_ema": weights(run), "args": Path("a")})
    err = evaluate(file, *KNOWN, code=2)["err"]
    assert "2 networks that fit: state_dict, state_dict_ema" in err and "entry=state_dict_ema" in err
    found = evaluate(file, *KNOWN, "entry=state_dict_ema")
    assert columns(found, "theirs") == columns(evaluate(saved(weights(run), "one.pt"), *KNOWN), "one")
    assert "left out: objects of pathlib.PosixPath" in found["out"]


def test_a_normalisation_in_the_file_is_used_and_can_be_overruled(run: Path, evaluate: Command) -> None:
    state, words = mat_dist.load(run, "peer0", which="latest").state_dict(), KNOWN[:-1]
    own = state["normalize.mean"].flatten(), state["normalize.std"].flatten()
    content = {"0.mean": own[0], "0.std": own[1], **{f"1.{key}": value for key, value in weights(run).items()}}
    found = evaluate(saved(content), *words)
    assert columns(found, "theirs") == columns(evaluate(run, *FAST, "targets=peer0", "threats=linf:0.1"), "peer0")
    assert "normalisation of its own, 0.mean" in evaluate("theirs.pt", *words, "normalise=data", code=2)["err"]
    other = evaluate("theirs.pt", *words, "mean=0.5", "std=0.5")
    assert "as given: mean 0.5, std 0.5; the file has 0.mean" in other["out"] and other["folder"] != found["folder"]
    several = content | {"2.mean": own[0] / 2, "2.std": own[1]}
    assert "give mean=... and std=..." in evaluate(saved(several, "several.pt"), *words, code=2)["err"]
    assert "; the file has 2.mean" in evaluate("several.pt", *words, "mean=0.5", "std=0.5")["out"]
    in_bytes = evaluate(saved(content | {"0.mean": own[0] * 255, "0.std": own[1] * 255}, "b.pt"), *words, code=2)["err"]
    assert "not for pixels in [0, 1]" in in_bytes and "divide those for bytes by 255" in in_bytes


@pytest.mark.parametrize(("form", "loss"), [(".pt", "ard"), (".safetensors", "rslad"), (":ema", "lbgat")])
def test_a_peer_starts_from_a_file_of_weights(form: str, loss: str, run: Path, tmp_path: Path) -> None:
    own = {"0.mean": torch.tensor([0.25]), "0.std": torch.tensor([0.5])}
    plain = {f"1.{key}": value.contiguous() for key, value in weights(run).items()}
    if form == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file({**own, **plain}, "start.safetensors")
        start = "start.safetensors"
    elif form == ".pt":
        start = str(saved({"state_dict": {f"layer{i}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(
            weights(run).items())}}))
    else:
        bad = {key: -value for key, value in plain.items()}
        start = f"{saved({'net': bad, 'ema': {**own, **plain}, 'args': Path('a')})}:ema"
    done = run_small(tmp_path / "started", "a", f"loss={loss}", "train.max_steps=1", "peers.1.frozen=true",
                     f"peers.1.init_from={start}")
    model = done.peers()[1]["model"]
    assert all(torch.equal(model[f"net.{key}"], value) for key, value in weights(run).items() if value.ndim)
    log = (done.folder.path / "rank_0.log").read_text()
    assert f"peer1: starts from {start.removesuffix(':ema')}: weights" in log
    if form == ".pt":
        assert "normalisation of these data, since the file has none" in log
    else:
        assert (model["normalize.mean"].item(), model["normalize.std"].item()) == (0.25, 0.5)


def test_a_peer_starts_from_all_that_a_run_has_and_says_so(run: Path) -> None:
    """Weights, counters and the normalisation, which is not that of these data."""
    other = Images((1, 8, 8), 10, (0.3,), (0.2,))
    peer = loaded(f"{run}:peer0", "tiny_cnn", other, width=0.25)
    theirs = checkpoints.load_peer(checkpoints.load_manifest(RunFolder(run)), 0)["model"]
    state = peer.model.state_dict()
    assert state.keys() == theirs.keys() and all(torch.equal(state[key], value) for key, value in theirs.items())
    assert f"peer0: starts from {run}:peer0: weights of 'net' matched by name" in peer.notes
    with pytest.raises(CheckpointError, match="the weights do not fit the network"):
        loaded(f"{run}:peer0", "resnet18", other, width=0.25)


def test_a_peer_starts_from_all_but_the_last_layer_of_a_run(run: Path) -> None:
    seven = Images((1, 8, 8), 7, (0.3,), (0.2,))
    with pytest.raises(CheckpointError, match=r"init_from=pretrained:\S+ for all but the last layer"):
        loaded(f"{run}:peer0", "tiny_cnn", seven, frozen=False, width=0.25)
    peer, theirs = loaded(f"pretrained:{run}:peer0", "tiny_cnn", seven, frozen=False, width=0.25), weights(run)
    state = peer.model.get_submodule("net").state_dict()
    assert {key for key, value in theirs.items() if value.shape != state[key].shape} == {"4.weight", "4.bias"}
    assert all(torch.equal(value, state[key]) for key, value in theirs.items() if not key.startswith("4."))
    assert any("a new last layer" in note for note in peer.notes)


@pytest.mark.parametrize(("start", "text"), [
    ("two.pt", "write init_from=two.pt:net or init_from=two.pt:ema"), ("two.pt:emma", "there is no entry 'emma'"),
    ("none.pt", "there is no such file or folder of a run (none.pt)"),
    ("wide.pt", "the weights do not fit the network"),
    ("text.pt", "not a file of tensors")])
def test_a_file_that_a_peer_cannot_start_from_is_one_line(start: str, text: str, run: Path, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    saved({"net": {key: -value for key, value in weights(run).items()}, "ema": weights(run)}, "two.pt")
    saved({"a.weight": torch.zeros(2)}, "wide.pt")
    Path("text.pt").write_text("hello")
    assert run_small(tmp_path / "started", "a", f"peers.1.init_from={start}").code in (2, 4)
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1


def test_safetensors_are_evaluated_too(run: Path, evaluate: Command) -> None:
    library = pytest.importorskip("safetensors.torch")
    library.save_file({k: v.contiguous() for k, v in weights(run).items()}, "theirs.safetensors")
    found = evaluate("theirs.safetensors", *KNOWN)
    assert columns(found, "theirs") == columns(evaluate(saved(weights(run)), *KNOWN), "theirs")


PLUGIN = '''
from torch import nn
from mat_dist.models import register_model

@register_model("own_cnn")
def own_cnn(config, shape, classes):
    net = nn.Module()
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
'''


def test_a_model_of_a_plug_in_is_evaluated(evaluate: Command) -> None:
    Path("own.py").write_text(PLUGIN)
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 10)
    found = evaluate("--plugin", "own.py", saved({"fc.weight": linear.weight, "fc.bias": linear.bias}), *FAST, *DATA,
                     "model=own_cnn", "normalise=none", "threats=linf:0.01")
    data = load_data(load_config(str(found["folder"] / "config.yaml")).data, seed=0, batch_size=2).test
    images, _ = data.batch(torch.arange(40))
    predicted = linear(as_float(images).flatten(1)).argmax(1)
    assert [int(r["clean_prediction"]) for r in found["rows"]] == predicted.tolist()


@pytest.mark.parametrize("theirs", [False, True])
def test_a_changed_plug_in_gives_results_of_its_own_that_are_not_confirmed(
        theirs: bool, evaluate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = Path("own.py")
    plugin.write_text(PLUGIN)
    words: tuple[Any, ...] = ("--plugin", plugin, *FAST, "threats=linf:0.01")
    if theirs:
        linear = torch.nn.Linear(64, 10)
        words += (saved({"fc.weight": linear.weight, "fc.bias": linear.bias}), *DATA, "model=own_cnn", "normalise=none",
                  "confirmed=true")
    else:
        done = run_small(tmp_path, "run", "--plugin", str(plugin), "model={name: own_cnn, width: 1}")
        words += (done.folder.path,)
    before = evaluate(*words)
    assert evaluate(*words)["file"] == before["file"]
    monkeypatch.delitem(registry._BUILDERS, "own_cnn")
    plugin.write_text(PLUGIN.replace("nn.Flatten()", "Square()") + f"""
# {theirs}: a process imports the same content once
class Square(nn.Flatten):
    def forward(self, x):
        return super().forward(x).square()
""")
    after = evaluate(*[word for word in words if word != "confirmed=true"])
    assert after["file"] != before["file"] and after["rows"] != before["rows"]
    assert ("network not confirmed" in after["out"], "network not confirmed" in before["out"]) == (True, False)
    if not theirs:
        assert report([str(words[-1]), "--images", "8", "--device", "cpu"]) == 0
        assert "the plug-in of the network has changed" in (words[-1] / "report" / "index.html").read_text()


@pytest.mark.parametrize(("words", "code", "text"), [
    ((*FAST, *DATA, "threats=linf:0.1", "normalise=data"), 2, "a state dict does not tell it (command line, model)|"
                                                              "does not tell it (model)"),
    ((*FAST, *MODEL, "threats=linf:0.1", "normalise=data"), 2, "data.name=cifar10"),
    ((*FAST, *DATA, *MODEL, "normalise=data"), 2, "threats=linf:8/255"),
    (KNOWN[:-1], 2, "how images were normalised"),
    ((*KNOWN, "mean=0.5", "std=0.5"), 2, "not both"),
    ((*KNOWN[:-1], "mean=0.5"), 2, "belong together"),
    ((*KNOWN[:-1], "mean=125", "std=60"), 2, "divide those for bytes by 255"),
    ((*KNOWN[:-1], "mean=0.5,0.5,0.5", "std=0.5,0.5,0.5"), 2, "mean has 3 and std 3 values, the images 1 channels"),
    ((*KNOWN, "model.wdth=2"), 2, "model.width"),
    ((*KNOWN, "model.name=resnet81"), 2, "did you mean resnet18"),
    ((*KNOWN, "model.width=0.5"), 4, "weights have another shape"),
    ((*KNOWN, "model=small_cnn"), 4, "missing"),
    ((*KNOWN, "images=41"), 3, "41 images are asked for, the test split has 40"),
    ((*KNOWN, "weights=ema"), 2, "the run keeps no averaged weights"),
    ((*KNOWN, "targets=peer7"), 2, "there is no target 'peer7'"),
    ((*KNOWN, "train.epochs=3"), 2, "train.epochs cannot be set for a file"),
])
def test_a_mistake_is_one_line_with_its_code(words: tuple[str, ...], code: int, text: str, run: Path,
                                             evaluate: Command) -> None:
    err = evaluate(saved(weights(run)), *words, code=code)["err"]
    assert any(part in err for part in text.split("|")), err
    assert not list(Path("runs").glob("*/config.yaml")) or code in (2, 3)


def test_all_that_a_file_does_not_tell_is_asked_for_at_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(saved(weights(run)))]) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in ("write model=", "write data.name=", "write threats=", " mean=")), err


def test_weights_for_other_classes_or_channels_are_refused(run: Path, evaluate: Command) -> None:
    state = weights(run)
    fewer = {**state, "4.weight": state["4.weight"][:7], "4.bias": state["4.bias"][:7]}
    assert "the weights are for 7 classes, the data have 10" in evaluate(saved(fewer), *KNOWN, code=4)["err"]
    colour = {**state, "0.0.weight": state["0.0.weight"].repeat(1, 3, 1, 1)}
    assert "take images of 3 channels, the data have 1" in evaluate(saved(colour), *KNOWN, code=4)["err"]
    assert not Path("runs").exists()


def test_a_file_that_is_missing_or_hostile_is_refused_and_not_run(evaluate: Command, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    assert "there is no file 'none.pt'" in evaluate("none.pt", *KNOWN, code=2)["err"]
    err = evaluate(saved({"state_dict": Payload()}), *KNOWN, code=4)["err"]
    assert "nothing in it was executed" in err and not (tmp_path / "executed").exists()
    assert not Path("runs").exists()


def test_a_file_of_a_run_leads_to_the_run(run: Path, evaluate: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(next(run.glob("checkpoints/step_*/peer_0.safetensors"))), *FAST, "threats=linf:0.1"]) == 2
    assert capsys.readouterr().err.count(f"or evaluate its run: {run}") == 2  # model and data.name are asked for
    for name in ("config.yaml", "checkpoints"):
        assert f"lies in the folder of a run (command line): write {run}" in evaluate(run / name, *FAST, code=2)["err"]


@pytest.mark.parametrize(("damage", "code", "text"), [
    (lambda run: (run / "config.yaml").write_text("run: {seed: [}"), 2, "config.yaml"),
    (lambda run: (run / "config.yaml").write_text("attack: {stpes: 3}"), 2, "attack.steps"),
    (lambda run: next(run.glob("checkpoints/*/manifest.json")).write_text("{"), 4, "manifest"),
    (lambda run: next(run.glob("checkpoints/*/peer_1.safetensors")).unlink(), 4, "peer_1.safetensors"),
    (lambda run: (run / "checkpoints" / "latest").write_text("step_00000099"), 4, "there is no checkpoint 'latest'"),
    (lambda run: [one.unlink() for one in run.glob("checkpoints/*/manifest.json")], 4, "manifest.json is missing"),
], ids=["yaml", "setting", "manifest", "peer", "pointer", "unfinished"])
def test_a_damaged_run_is_one_line_as_a_subject_and_as_a_source(damage: Callable[[Path], Any], code: int, text: str,
                                                                run: Path, trained: Path, evaluate: Command) -> None:
    damage(run)
    assert text in evaluate(run, *FAST, code=code)["err"]
    sound = Path(shutil.copytree(trained, "sound"))
    assert text in evaluate(sound, *FAST, f"sources={run}", code=code)["err"]


def test_words_about_a_file_are_told_from_all_others() -> None:
    words = ["a.pt", "model=x", "model.width=2", "mean=0.5", "std=1", "out=b", "data.name=digits", "data.root=/d",
             "attacks=pgd", "--plugin", "p.py", "threats=linf:1/8"]
    found = parse(words)
    importing = found.importing
    assert importing is not None and importing.subject == Path("a.pt") and importing.options.mean == (0.5,)
    assert importing.settings == ("model=x", "model.width=2", "data.name=digits") and importing.options.out == "b"
    assert (found.runs, found.settings, found.plugins) == (("a.pt",), ("data.root=/d",), ("p.py",))
    assert found.request == Request(attacks=("pgd",), threats=("linf:1/8",), targets=("peers",))
    assert parse(["runs/x", "--plugin", "a.pt"]).importing is None
    with pytest.raises(ConfigError, match="model is for a file of weights"):
        parse(["runs/x", "model=y"])
    assert parse(["--compare", "a.pt", "b.pt"]).importing is None


# ------------------------------------------------------------------------------------------------ sources


def test_aes_of_another_run_join_the_candidates_of_every_target(run: Path, other: Path, evaluate: Command) -> None:
    alone = evaluate(run, *FAST, "threats=linf:0.2")
    found = evaluate(run, *FAST, "threats=linf:0.2", f"sources={other}:peer1")
    assert [(one["run"], one["peers"], one["weights"]) for one in found["sources"]] == [("other", ["peer1"], "ema")]
    label, name = "linf 1/5", "other/peer1"
    config = load_config(str(run / "config.yaml"))
    data = load_data(config.data, seed=config.run.seed, batch_size=16).test
    source = mat_dist.load(other, "peer1", which="latest", weights="ema")
    told: dict[str, list[int]] = {"peer0": [], "peer1": []}
    for chunk in range(2):
        images, y = data.batch(torch.arange(20 * chunk, 20 * chunk + 20))
        adv = craft(source, as_float(images), y, Threat("linf", 0.2), AttackPlan(2), seed=config.run.seed, chunk=chunk)
        for peer in told:
            model = mat_dist.load(run, peer, which="latest")
            clean, under = model(as_float(images)).argmax(1), model(adv).argmax(1)
            told[peer] += torch.where(clean == y, under, clean).tolist()
    for peer, predictions in told.items():
        rows = columns(found, peer, f"{FROM}{name}")
        assert [int(row[3]) for row in rows] == predictions
        one = next(t for t in found["targets"] if t["target"] == peer)
        before = next(t for t in alone["targets"] if t["target"] == peer)
        share = sum(row[4] == "1" for row in rows) / 40
        assert found["transfer_accuracy"][label][name][peer] == pytest.approx(
            sum(int(row[3]) == int(row[1]) for row in rows) / 40)
        assert one["attacks"][label][f"{FROM}{name}"] == pytest.approx(share)
        assert one["accuracy"][label] <= min(share, before["accuracy"][label])
        assert one["attacks"][label]["transfer"] <= min(share, before["attacks"][label]["transfer"])
        assert columns(found, peer) == columns(alone, peer)  # the attacks themselves are as before
    assert "Accuracy on AEs of other checkpoints" in found["out"] and name in found["out"]


def test_sources_count_without_transfer_between_targets_and_a_run_gives_all_its_peers(run: Path, other: Path,
                                                                                    evaluate: Command) -> None:
    found = evaluate(run, *FAST, "targets=peer0", "transfer=false", f"sources={other}")
    assert {r["attack"] for r in found["rows"]} == {"pgd", "transfer", f"{FROM}other/peer0", f"{FROM}other/peer1"}
    rows = [columns(found, "peer0", a) for a in (f"{FROM}other/peer0", f"{FROM}other/peer1", "transfer")]
    assert [r[4] for r in rows[2]] == [str(min(int(a[4]), int(b[4]))) for a, b in zip(*rows[:2], strict=True)]


def test_a_file_is_a_source_too(run: Path, other: Path, evaluate: Command) -> None:
    file = saved(weights(other, 0))
    found = evaluate(run, *FAST, "targets=peer0", f"sources={file}", *MODEL, "model.norm=group", "normalise=data")
    (made,) = run.parent.glob("theirs-*")  # beside the run that is evaluated
    name = f"{FROM}{made.name}/theirs"
    same = evaluate(run, *FAST, "targets=peer0", f"sources={made}")
    assert columns(found, "peer0", name) == columns(same, "peer0", name) != []
    saved(weights(run, 0), "c.pt")
    both = evaluate(saved(weights(run, 1), "b.pt"), *KNOWN, "sources=c.pt")
    assert any(r["attack"].startswith(f"{FROM}c-") for r in both["rows"])


@pytest.mark.parametrize(("word", "code", "text"), [
    ("none", 2, "there is no run folder 'none' (sources)"),
    ("{other}:peer9", 2, "there is no peer 'peer9'"),
    ("{other},{other}", 2, "names something twice"),
    ("none.pt", 2, "there is no file 'none.pt'"),
])
def test_a_source_that_is_none_is_one_line(word: str, code: int, text: str, run: Path, other: Path,
                                           evaluate: Command) -> None:
    assert text in evaluate(run, *FAST, f"sources={word.format(other=other)}", code=code)["err"]


def test_a_source_for_other_images_or_without_checkpoint_is_refused(run: Path, other: Path, evaluate: Command,
                                                                    tmp_path: Path) -> None:
    copy = Path(shutil.copytree(other, tmp_path / "copy"))
    with RunLock(RunFolder(copy), None):
        assert "still being written" in evaluate(run, *FAST, f"sources={copy}", code=5)["err"]
    shutil.rmtree(copy / "checkpoints")
    assert "there is no checkpoint" in evaluate(run, *FAST, f"sources={copy}", code=4)["err"]
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 4)
    Path("own.py").write_text(PLUGIN)
    noise = np.random.default_rng(0)
    np.savez("four.npz", x_train=noise.random((60, 8, 8)), y_train=np.arange(60) % 4, x_test=noise.random((20, 8, 8)),
             y_test=np.arange(20) % 4)
    four = evaluate("--plugin", "own.py", saved({"weight": linear.weight, "bias": linear.bias}), *FAST, "model=own_cnn",
                    "data.name=npz", "data.root=four.npz", "normalise=none", "threats=linf:0.1", "out=four")
    err = evaluate(run, "--plugin", "own.py", *FAST, f"sources={four['folder']}", code=2)["err"]
    assert "of 4 classes, the targets take (1, 8, 8) of 10" in err


def test_runs_that_met_other_sources_are_not_compared(run: Path, other: Path, evaluate: Command,
                                                      tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    evaluate(run, *FAST, "checks=1", f"sources={other}")
    evaluate(copy, *FAST, "checks=1")
    assert "evaluated differently: sources" in evaluate("--compare", run, copy, code=2)["err"]
