"""Answers to typical mistakes are true, lead somewhere, and what they advise works."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import mat_dist
from mat_dist import train
from mat_dist.attacks import register_norm
from mat_dist.config import load_config, load_plugins
from mat_dist.config.methods import register_method
from mat_dist.data import register_dataset
from mat_dist.errors import CheckpointError, ConfigError
from mat_dist.evaluation.__main__ import main as evaluate
from mat_dist.evaluation.settings import FileOptions, Request, find_run, parse
from mat_dist.models import register_model, registry
from mat_dist.models.registry import find_builder
from tests.small_runs import run_small

PLUGIN = """
from torch import nn
from mat_dist.models import register_model

@register_model("mine_for_answers")
def mine(config, shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model is a plug-in's, and which this process does not know any more."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "mine.py").write_text(PLUGIN)
    done = run_small(folder, "run", "--plugin", str(folder / "mine.py"), "model={name: mine_for_answers, width: 1}",
                     "train.max_steps=1")
    assert done.code == 0
    return done.folder.path


def answer(call: object, *words: object) -> str:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        call(*words)  # type: ignore[operator]
    return str(caught.value)


@pytest.mark.parametrize("index", [4, 7, 255])
def test_the_number_of_peers_that_is_advised_has_the_peer(index: int) -> None:
    override = f"peers.{index}.optim.lr=0.5"
    advice = re.search(r"more peers: (peers=\d+)$", answer(load_config, "base", ["peers=4", override]))
    assert advice and load_config("base", [advice[1], override]).peers[index].optim.lr == 0.5
    for none in ("256", "x", "-1"):
        assert "more peers" not in answer(load_config, "base", ["peers=4", f"peers.{none}.optim.lr=0.5"])


@pytest.mark.parametrize(("word", "text"), [
    ("attacks=autoatack", "there is no attack 'autoatack' (command line, attacks): did you mean autoattack? uniform, "),
    ("checkpoint=newest", "there is no checkpoint 'newest' (command line, checkpoint): best, latest or step_N"),
    ("steps=0", "'0' cannot be used for steps (command line, steps): write a whole number, >= 1"),
    ("steps=many", "'many' cannot be used for steps (command line, steps): write a whole number, >= 1"),
    ("split=validation", "'validation' cannot be used for split (command line, split): choose one of test, val, train"),
    ("transfer=maybe", "'maybe' cannot be used for transfer (command line, transfer): write true or false"),
    ("model=resnet18", "model is for a file of weights (command line, model): leave it out: runs/x knows its own"),
    ("clean=0.9", "clean is for a file of weights"), ("entry=ema", "entry is for a file of weights"),
])
def test_a_mistake_in_an_evaluation_is_told_in_our_words(word: str, text: str) -> None:
    told = answer(parse, ["runs/x", word])
    assert text in told and "Input should" not in told and "pattern" not in told


def test_a_message_names_the_settings_that_a_file_of_weights_may_have() -> None:
    of_run, of_file = answer(parse, ["runs/x", "run.name=a"]), answer(parse, ["a.pt", "run.name=a"])
    assert "run that is there" in of_run and "step.precision" not in of_run
    assert "file of weights" in of_file
    for name in of_file.partition("what may be: ")[2].split(", "):
        word = f"{name}x=1" if name.endswith(".") else f"{name}=1"
        assert parse(["a.pt", word]).importing is not None, name


def test_null_is_taken_where_a_message_of_an_evaluation_advises_it() -> None:
    empty = [name for name, field in Request.model_fields.items() if field.default is None]
    assert {"images", "steps", "seed"} <= set(empty) and "or null" in answer(parse, ["runs/x", "steps=many"])
    assert parse(["runs/x", *(f"{name}=null" for name in empty)]).request == Request()
    files = parse(["a.pt", *(f"{name}=null" for name, field in FileOptions.model_fields.items()
                             if field.default is None)]).importing
    assert files is not None and files.options == FileOptions()
    assert "write a whole number, >= 1" in answer(parse, ["runs/x", "queries=null"])


@pytest.mark.parametrize("word", ["best", "latest", "step_1"])
def test_checkpoints_have_the_same_names_wherever_one_is_chosen(word: str, run: Path) -> None:
    assert parse(["runs/x", f"checkpoint={word}"]).request.checkpoint == word
    load_plugins([str(run.parent / "mine.py")])
    if word != "best":  # nothing was validated
        assert mat_dist.load(run, 0, which=word) is not None
    advised = answer(lambda: mat_dist.load(run, 0, which="newest"))
    assert "choose latest, best or one of these: step_00000001" in advised
    assert "best, latest or step_N" in str(Request.model_fields["checkpoint"].description)


def test_what_lies_in_a_run_leads_to_the_run(run: Path) -> None:
    for inside, choice in (("checkpoints/latest", " checkpoint=latest"), ("eval", ""), ("checkpoints", ""),
                           ("checkpoints/step_00000001", " checkpoint=step_00000001")):
        told = answer(find_run, str(run / inside))
        assert told.endswith(f"lies in the folder of a run (command line): write {run}{choice}")


def test_a_run_with_a_plug_in_says_how_it_is_loaded_in_python(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = str(run.parent / "mine.py")
    with monkeypatch.context() as patch:
        patch.delitem(registry._BUILDERS, "mine_for_answers")
        for name in [name for name in sys.modules if name.startswith("mat_dist_plugin_")]:
            patch.delitem(sys.modules, name)
        told = answer(mat_dist.load, run, 0)
        assert f"the run needs its plug-ins: {plugin}" in told and "mat_dist.config.load_plugins([FILE]) first" in told
    load_plugins([plugin])
    assert mat_dist.load(run, 0) is not None


def test_all_that_the_help_says_of_plug_ins_can_be_registered(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    shown = re.search(r"a file of yours that registers (.*?);", " ".join(capsys.readouterr().out.split()))
    assert shown and shown[1] == "models, norms, methods or data"
    assert all(map(callable, (register_model, register_norm, register_method, register_dataset)))


@pytest.mark.parametrize("text", ["train:\n\tepochs: 3\n", "train:\n  epochs: 3\n\tbatch_size: 4\n", "\ttrain: {}\n"])
def test_a_tab_is_called_a_tab(text: str, tmp_path: Path) -> None:
    (tmp_path / "tab.yaml").write_text(text)
    assert "a tab, which YAML does not take here" in answer(load_config, str(tmp_path / "tab.yaml"))


@pytest.mark.parametrize(("name", "advised"), [
    ("resnext50_32x4d", "torchvision/resnext50_32x4d"), ("vgg16", "torchvision/vgg16"), ("ResNet18", "resnet18"),
    ("resnet-18", "resnet18"), ("WRN_28_10", "wrn_28_10"), ("WRN_34_20", "wrn_34_20")])
def test_the_model_that_is_advised_exists(name: str, advised: str) -> None:
    told = answer(find_builder, name)
    assert f"did you mean {advised}" in told
    find_builder(advised)


@pytest.mark.parametrize("key", ["attack.eps", "threat.eps", "peers.1.attack.eps", "peers.all.threat.eps"])
def test_a_bad_radius_is_one_line(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("digits", [f"{key}=8/256x"])
    assert len(caught.value.problems) == 1


def test_a_run_that_cannot_be_written_says_what_an_evaluation_needs(tmp_path: Path,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    done = run_small(tmp_path, "a", "train.max_steps=1")
    (done.folder.path / "rank_0.log").unlink()
    (done.folder.path / "rank_0.log").mkdir()
    assert evaluate([str(done.folder.path), "attacks=pgd", "steps=1", "checks=0", "images=2", "run.device=cpu"]) == 5
    err = capsys.readouterr().err
    assert "make it writable, or evaluate a copy of it" in err and "run.root" not in err
