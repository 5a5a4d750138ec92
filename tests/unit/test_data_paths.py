"""Where a run finds its images again: from another folder, and after they have moved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mat_dist import train
from mat_dist.config import binding, load_config, resume_conflicts, with_absolute_paths
from mat_dist.evaluation.__main__ import main as evaluate
from tests.unit.data_files import write_folder

WORDS = ("peers=1", "loss=at", "model=tiny_cnn", "model.width=0.25", "attack.eps=8/255", "attack.steps=1",
         "train.max_steps=1", "train.batch_size=8", "eval.every=0", "eval.test_steps=0", "data.name=folder",
         "run.device=cpu", "log.console=off")


def test_a_run_with_a_relative_root_is_evaluated_and_continued_from_another_folder_and_after_a_move(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "here/set", train=20)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert train.main([*WORDS, "data.root=set", "run.root=../runs", "run.name=a"]) == 0
    assert load_config("../runs/a/config.yaml").data.root == str(tmp_path / "here/set")
    monkeypatch.chdir(tmp_path / "there")
    attack = ("../runs/a", "attacks=pgd", "steps=1", "images=4", "checks=0")
    assert evaluate([*attack]) == 0
    shutil.move(tmp_path / "here/set", "moved")
    capsys.readouterr()
    assert evaluate([*attack, "steps=2"]) == 3
    assert f"data.root={tmp_path / 'here/set'}" in capsys.readouterr().err
    assert evaluate([*attack, "steps=2", "data.root=moved"]) == 0
    assert train.main([*WORDS, "data.root=moved", "run.root=../runs", "run.name=a", "train.max_steps=2"]) == 0
    assert load_config("../runs/a/config.yaml").data.root == str(tmp_path / "there/moved")


def test_all_paths_of_a_configuration_are_recorded_from_the_root_and_may_be_written_in_either_way(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    words = ("peers=2", "data.cache=~/cache", "data.generated=gen.npz", "data.generated_share=0.5",
             "peers.0.init_from=runs/a:peer1")
    typed = load_config(None, words)
    recorded = with_absolute_paths(typed)
    assert (recorded.data.root, recorded.data.cache, recorded.data.generated) == (
        None, "/home/me/cache", str(tmp_path / "gen.npz"))
    assert [peer.init_from for peer in recorded.peers] == [str(tmp_path / "runs/a:peer1"), None]
    assert with_absolute_paths(recorded) == recorded
    assert resume_conflicts(recorded.model_dump(mode="json"), typed) == [] and binding(recorded) == binding(typed)
    other = load_config(None, [*words, "data.generated=other.npz"])
    assert resume_conflicts(recorded.model_dump(mode="json"), other) == [
        f"data.generated: {tmp_path / 'gen.npz'} -> {tmp_path / 'other.npz'}"]
    remote = load_config(None, ["data.root=store://bucket/set"])
    assert with_absolute_paths(remote).data.root == "store://bucket/set"
