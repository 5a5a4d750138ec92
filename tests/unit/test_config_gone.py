"""Settings that this version no longer has: at the command line, in files, in runs of the version before."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mat_dist.config import dump_config, load_config
from mat_dist.config import gone as gone_module
from mat_dist.config.gone import GONE, Gone, is_gone
from mat_dist.config.help import settings
from mat_dist.errors import CheckpointError, ConfigError

TABLE = (
    Gone("loss.rotate", "leave it out", ("all", None)),
    Gone("peers.N.birth", "use stream", (None,)),
    Gone("step.squeeze", "leave it out", (0,)),
    Gone("step.squeeze_every", "leave it out together with step.squeeze", None),
    Gone("optim.shake", neutral=(0,), moved="methods.shake.gamma"),
    Gone("optim.rate", neutral=(), moved="optim.lr"),
    Gone("step.wire", "use full", values=("int4",)),
)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gone_module, "GONE", TABLE)


def told(path: str, *words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, words)
    assert caught.value.code == 2
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("word,what,how", [
    ("loss.rotate=one", "loss.rotate went in version 0.2", "leave it out"),
    ("loss.rotate=all", "loss.rotate went in version 0.2", "leave it out"),
    ("loss={rotate: one}", "loss.rotate went in version 0.2", "leave it out"),
    ("peers.1.loss.rotate=one", "peers.1.loss.rotate went in version 0.2", "leave it out"),
    ("peers.all.loss.rotate=one", "peers.all.loss.rotate went in version 0.2", "leave it out"),
    ("peers.2.birth=3", "peers.2.birth went in version 0.2", "use stream"),
    ("step.wire=int4", "step.wire=int4 went in version 0.2", "use full"),
    ("optim.shake=0.1", "optim.shake has another name since version 0.2", "write methods.shake.gamma"),
    ("peers.0.optim.rate=0.1", "peers.0.optim.rate has another name since version 0.2", "write peers.0.optim.lr"),
])
def test_on_the_command_line_it_is_one_line_with_the_way_out(word: str, what: str, how: str) -> None:
    (line,) = told("digits", word)
    assert line.startswith(f"{what} (command line, ") and line.endswith(f": {how}")


@pytest.mark.usefixtures("table")
def test_in_a_file_it_is_told_with_its_line_beside_all_other_mistakes(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("step:\n  squeeze: 1\nloss: {rotate: all}\npeers:\n- {loss: {rotate: one}}\n- {birth: 2}\n"
                    "train: {epoch: 3}\n")
    lines = told(str(file))
    for number, key in ((2, "step.squeeze"), (3, "loss.rotate"), (5, "peers.0.loss.rotate"), (6, "peers.1.birth"),
                        (7, "train.epoch")):
        assert sum(f"{file}:{number}, {key}" in line for line in lines) == 1
    assert len(lines) == 5


def old_run(folder: Path, **changed: Any) -> str:
    """The `config.yaml` of a run whose version had the settings of TABLE."""
    text = dump_config(load_config("digits", ["peers=2"]))
    values = {"rotate": "all", "birth": "null", "squeeze": "0.0", "shake": "0.0", "rate": "0.3"} | changed
    text = text.replace("  loss:\n", f"  birth: {values['birth']}\n  loss:\n    rotate: {values['rotate']}\n")
    text = re.sub(" {4}lr: .*\n", f"    rate: {values['rate']}\n    shake: {values['shake']}\n", text)
    text = text.replace("step:\n", f"step:\n  squeeze: {values['squeeze']}\n  squeeze_every: 7\n")
    assert all(text.count(f" {name}: ") == 2 for name in ("rotate", "birth", "rate", "shake"))
    folder.mkdir()
    (folder / "config.yaml").write_text(text)
    (folder / "environment.json").write_text("{}")
    return str(folder / "config.yaml")


@pytest.mark.usefixtures("table")
def test_in_a_run_of_the_version_before_what_changed_nothing_is_dropped_and_what_moved_is_moved(tmp_path: Path) -> None:
    config = load_config(old_run(tmp_path / "run"))
    assert [peer.optim.lr for peer in config.peers] == [0.3, 0.3]
    assert config == load_config("digits", ["peers=2", "optim.lr=0.3"])


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("changed,names", [({"rotate": "one"}, "peers.0.loss.rotate=one, peers.1.loss.rotate=one"),
                                           ({"birth": 5}, "peers.0.birth=5, peers.1.birth=5"),
                                           ({"squeeze": 0.5}, "step.squeeze=0.5")])
def test_a_run_that_was_trained_with_it_ends_with_4_and_names_the_version(changed: dict[str, Any], names: str,
                                                                         tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_config(old_run(tmp_path / "run", **changed), ["run.device=cpu"])
    assert caught.value.code == 4 and f": {names} (" in str(caught.value) and "version 0.1" in caught.value.how
    assert caught.value.where == str(tmp_path / "run" / "config.yaml")


@pytest.mark.usefixtures("table")
def test_the_command_line_is_told_of_it_also_with_a_run(tmp_path: Path) -> None:
    (line,) = told(old_run(tmp_path / "run"), "step.squeeze=0")
    assert "step.squeeze went in version 0.2 (command line, step.squeeze)" in line


def test_what_the_schema_still_has_is_left_alone() -> None:
    for gone in GONE:
        known = settings().get(gone.key)
        assert known is None or not gone.tells(known.default)
        assert gone.moved or gone.how
    assert is_gone(("peers", 3, "loss", "attackers")) and is_gone(("step", "pull")) and not is_gone(("train", "epochs"))


@pytest.mark.parametrize("gone", [gone for gone in GONE if gone.key not in settings() and not gone.values], ids=str)
def test_each_setting_of_the_table_that_went_is_told(gone: Gone) -> None:
    (line,) = told("digits", f"{gone.key.replace('.N.', '.1.')}=3")
    assert "0.2" in line


@pytest.mark.parametrize("key,value", [(gone.key, value) for gone in GONE for value in gone.values])
def test_each_value_of_the_table_that_went_is_told(key: str, value: str) -> None:
    if value in settings()[key].choices:
        pytest.skip("the schema has it")
    (line,) = told("digits", f"{key}={value}")
    assert f"{key}={value} went in version 0.2" in line
