"""Who writes into a run's folder, and from what: lost locks, foreign checkpoints, odd folders, exit.json of each."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mat_dist
from mat_dist import train
from mat_dist.checkpoints import load_manifest
from mat_dist.checkpoints.load import FinishedRun, check_resumed
from mat_dist.config import load_config
from mat_dist.errors import CheckpointError, OutputError
from mat_dist.evaluation import during_training
from mat_dist.runs import files
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.lock import RunLock
from mat_dist.runs.record import finished
from mat_dist.runs.session import Run
from mat_dist.training import trainer
from tests.small_runs import SMALL, Finished, interrupted, run_small, tree_hash, vouch

LINE = re.compile(r"mat_dist: error: [^\n]+ \([^\n]+\): [^\n]+\n")
FOUR = ("train.max_steps=4", "checkpoint.every_steps=2", "log.every=1")
Captured = pytest.CaptureFixture[str]
Line = Callable[[], str]


@pytest.fixture
def line(capsys: Captured) -> Line:
    """line() -> what the last command said, which was one line."""
    capsys.readouterr()

    def said() -> str:
        err = capsys.readouterr().err
        assert LINE.fullmatch(err), err
        return err

    return said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs that have done 4 of 8 steps, to be copied: `own` and some that differ from it."""
    root = tmp_path_factory.mktemp("made")
    for name, words in {"own": (), "seed": ("run.seed=1",), "net": ("model.norm=group",), "loss": ("loss=at",),
                        "split": ("data.val_size=30",), "three": ("peers=3",)}.items():
        assert run_small(root, name, *FOUR, *words).code == 0
    return root


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Finished:
    """A copy of `own` that may be changed."""
    shutil.copytree(made / "own", tmp_path / "run")
    return Finished(0, RunFolder(tmp_path / "run"))


def go_on(run: Finished, *words: str) -> int:
    """Continue to 8 steps."""
    return run_small(run.folder.path.parent, "run", *FOUR, "train.max_steps=8", "train.epochs=2", *words).code


def told(run: Finished) -> dict[str, Any]:
    """The newest record of exit.json, which is what its head says too."""
    document = json.loads(run.folder.exit.read_text())
    newest: dict[str, Any] = document["attempts"][-1]
    assert (document["code"], document["state"]) == (newest["code"], newest["state"])
    return newest


# ------------------------------------------------------------------------------------------------ who writes


def taken(folder: RunFolder) -> str:
    other = replace(RunLock(folder, None).holder, host="node7", pid=4711)
    folder.lock.write_text(json.dumps(asdict(other)))
    return "pid 4711 on node7 since .* has taken the lock over"


def removed(folder: RunFolder) -> str:
    shutil.rmtree(folder.path)
    return "the lock file has been removed"


def started_anew(folder: RunFolder) -> str:
    removed(folder)
    folder.path.mkdir()
    return taken(folder)


def content(folder: RunFolder) -> dict[str, bytes]:
    """Whatever lies there, but for logs of ranks and a file of a peer that is being written as the lock is lost."""
    found = {str(path.relative_to(folder.path)): path for path in folder.path.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not re.search(r"\.partial|\.log$", name)}


@pytest.mark.parametrize("due,lose", [("log.every=1", taken), ("checkpoint.every_steps=1", started_anew), (
    "train.max_steps=2", removed), ("train.max_steps=2", taken), ("eval.every=1", started_anew)])
def test_a_run_that_lost_its_folder_says_who_has_it_and_writes_nothing_more(
        due: str, lose: Callable[[RunFolder], str], tmp_path: Path, line: Line,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the next write is: a record, a checkpoint, the last one or, after the checkpoint, an evaluation."""
    folder, state = RunFolder(tmp_path / "run"), {"calls": 0}
    step, attack = trainer.train_step, during_training.run_chunks

    def lost() -> None:
        state["says"], state["before"] = lose(folder), content(folder)

    def second(*args: Any, **kwargs: Any) -> Any:
        state["calls"] += 1
        if state["calls"] == 2 and due != "eval.every=1":
            lost()
        return step(*args, **kwargs)

    def attacked(*args: Any, **kwargs: Any) -> Any:
        lost()
        return attack(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", second)
    monkeypatch.setattr(during_training, "run_chunks", attacked)
    assert run_small(tmp_path, "run", "log.every=4", due).code == 5
    assert re.search(state["says"], line())
    assert content(folder) == state["before"]


def test_runs_with_other_settings_in_one_job_have_folders_of_their_own(
        tmp_path: Path, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4243")
    words = [*SMALL, "train.max_steps=1", f"run.root={tmp_path}"]
    assert [train.main([*words, f"run.seed={seed}"]) for seed in (1, 2)] == [0, 0]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and all(re.fullmatch(r"digits-job4243-[0-9a-f]{8}", name) for name in names)
    assert train.main([*words, "run.seed=1", "log.every=7"]) == 5 and "the run is finished" in line()
    assert train.main([*words, "run.seed=1", "train.max_steps=2"]) == 0  # the same run, for longer
    assert sorted(path.name for path in tmp_path.iterdir()) == names


# ------------------------------------------------------------------------------------------------ from what


@pytest.mark.parametrize("other,says", [
    ("seed", "run.seed: 1 -> 0"), ("net", "peers.0.model.norm: group -> null"), ("loss", "peers.0.loss.preset: at"),
    ("split", "data.val_size: 30 -> 40"), ("three", "peers: 3 -> 2")])
def test_checkpoints_of_a_run_with_other_settings_are_refused(other: str, says: str, own: Finished, made: Path,
                                                              line: Line) -> None:
    shutil.rmtree(own.folder.checkpoints)
    shutil.copytree(made / other / "checkpoints", own.folder.checkpoints)
    before = tree_hash(own.folder.checkpoints)
    assert go_on(own) == 4
    assert says in line() and told(own)["code"] == 4
    assert tree_hash(own.folder.checkpoints) == before
    if not says.startswith("data."):  # whoever evaluates compares the images themselves
        with pytest.raises(CheckpointError, match=re.escape(says)):
            mat_dist.load(own.folder.path, 0)


def test_a_run_without_its_config_goes_on_with_its_own_settings_alone(own: Finished, line: Line, made: Path) -> None:
    own.folder.config.unlink()
    assert go_on(own, "optim.lr=0.05") == 4 and "peers.0.optim.lr: 0.2 -> 0.05" in line()
    own.folder.config.unlink()
    assert go_on(own) == 0 and own.steps()[-1] == 8


def as_before(run: Finished) -> None:
    """Checkpoints as version 0.1 and early 0.2 wrote them: without settings and plug-ins."""
    for directory in run.folder.checkpoints.glob("step_*"):
        extra = dict(load_manifest(run.folder, directory.name).meta.extra)
        vouch(directory, extra={key: extra[key] for key in ("classes", "images")}, config_digest="0" * 64)


def test_a_run_of_an_earlier_version_goes_on_unless_nothing_tells_its_settings(own: Finished, line: Line) -> None:
    as_before(own)
    for file in own.folder.checkpoints.glob("step_*/peer_*"):
        file.write_bytes(file.read_bytes().replace(b'\\"config_digest\\"', b'\\"config_digesT\\"'))
    for directory in own.folder.checkpoints.glob("step_*"):
        vouch(directory)
    kept = own.folder.config.read_bytes()
    own.folder.config.unlink()
    assert go_on(own) == 4 and "config.yaml is gone" in line()
    own.folder.config.write_bytes(kept)
    assert go_on(own) == 0


@pytest.mark.parametrize("source,says", [
    ("step_00000004/peer_1.safetensors", "of peer peer1, the manifest is of peer peer0"),
    ("step_00000002/peer_0.safetensors", "of step 2, the manifest is of step 4"),
    ("../../seed/checkpoints/step_00000004/peer_0.safetensors", "of config_digest")])
def test_a_file_of_another_peer_step_or_run_is_refused_under_a_new_digest(source: str, says: str, own: Finished,
                                                                          made: Path, line: Line) -> None:
    directory = own.folder.checkpoints / "step_00000004"
    shutil.copyfile(made / "own" / "checkpoints" / source, directory / "peer_0.safetensors")
    vouch(directory)
    assert go_on(own) == 4
    assert says in line() and told(own)["code"] == 4


def test_a_state_that_does_not_fit_ends_with_4_and_is_not_tried_again(own: Finished, made: Path, line: Line) -> None:
    directory = own.folder.checkpoints / "step_00000004"
    shutil.copytree(made / "net" / "checkpoints" / "step_00000004", directory, dirs_exist_ok=True)
    extra = dict(load_manifest(RunFolder(made / "own"), 4).meta.extra)
    vouch(directory, extra=extra)
    assert go_on(own) == 4
    assert "the state does not fit peer0" in line()


NET = """
from torch import nn
from mat_dist.models import register_model

@register_model("mine")
def build(config, shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.{}(), nn.Linear(16, classes))
"""


def test_a_plug_in_that_was_edited_between_two_attempts_is_refused(tmp_path: Path, line: Line,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    from mat_dist.models import registry

    net, moved = tmp_path / "net.py", tmp_path / "moved.py"
    net.write_text(NET.format("ReLU"))
    words = ("--plugin", str(net), "model.name=mine", *FOUR)
    run = run_small(tmp_path, "run", *words)
    assert run.code == 0
    first = registry._BUILDERS["mine"]
    net.rename(moved)
    net.write_text(NET.format("SiLU"))
    monkeypatch.delitem(registry._BUILDERS, "mine")
    assert run_small(tmp_path, "run", *words, "train.max_steps=6", "train.epochs=2").code == 4
    assert re.search(r"plug-ins are not those of the checkpoint: \S*net.py \(\w{12}\) -> \S*net.py \(\w{12}\)", line())
    monkeypatch.setitem(registry._BUILDERS, "mine", first)
    words = ("--plugin", str(moved), *words[2:], "train.max_steps=6", "train.epochs=2")
    assert run_small(tmp_path, "run", *words).code == 0  # it may lie elsewhere


# ------------------------------------------------------------------------------------------------ exit.json


REFUSED = [
    (["optim.lr=0.05"], 4), (["optim.lr=fast"], 2), (["--config", "missing"], 2), (["run.resume=never"], 5),
    (["peers=3"], 4), (["train.max_steps=4", "train.epochs=1"], 5), (["run.device=cuda"], 6)]


def test_a_start_that_is_refused_writes_its_own_end_and_leaves_the_run_as_it_was(own: Finished, line: Line) -> None:
    before, codes = tree_hash(own.folder.path, "exit.json", ".lock.guard"), [0]
    for words, code in REFUSED:
        if words == ["run.device=cuda"] and torch.cuda.is_available():
            continue
        codes.append(code)
        assert go_on(own, *words) == code, words
        assert (told(own)["state"], own.codes()) == ("refused", codes)
        assert told(own)["what"] in line() and tree_hash(own.folder.path, "exit.json", ".lock.guard") == before
        assert finished(own.folder)
    assert go_on(own) == 0 and own.codes() == [*codes, 0]


def test_a_mistake_in_the_settings_is_one_attempt_however_many_ranks_find_it(own: Finished,
                                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert go_on(own, "optim.lr=fast") == 2
    assert own.codes() == [0, 2]


def test_a_dry_run_and_a_start_beside_a_living_one_leave_exit_json_alone(own: Finished) -> None:
    before = own.folder.exit.read_bytes()
    assert go_on(own, "--dry-run", "run.device=cuda") == 6
    with RunLock(own.folder, None):
        assert go_on(own) == 5 and go_on(own, "optim.lr=fast") == 2
    assert own.folder.exit.read_bytes() == before


def test_a_disk_that_is_full_at_the_start_is_told_by_exit_json(own: Finished, line: Line,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first, second, ... file on: lock, environment, settings, the checkpoint's pointer."""
    real = files.write_all
    for writes in range(4):
        left = iter(range(writes))

        def full(*args: Any, left: Any = left) -> None:
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            real(*args)

        monkeypatch.setattr(files, "write_all", full)
        assert go_on(own) == 5
        assert "No space left" in line() and told(own)["code"] == 5 and own.codes() == [0, *[5] * (writes + 1)]
    monkeypatch.undo()
    assert go_on(own) == 0


def test_an_attempt_that_was_killed_after_a_finished_one_is_not_finished(own: Finished) -> None:
    exit_json = own.folder.exit.read_bytes()
    assert go_on(own) == 0
    own.folder.exit.write_bytes(exit_json)  # as after kill -9 of the second attempt
    shutil.rmtree(own.folder.checkpoints / "step_00000008")
    assert not finished(own.folder) and go_on(own) == 0 and own.steps()[-1] == 8


# ------------------------------------------------------------------------------------------------ odd folders


@pytest.mark.parametrize("name", ["checkpoints", "environment.json"])
def test_an_odd_folder_is_one_line_and_its_exit_json_says_so(name: str, own: Finished, line: Line) -> None:
    path = own.folder.path / name
    path.rename(path.with_name("elsewhere"))
    os.mkfifo(path)
    assert go_on(own) == 5
    assert f"something else stands there ({path})" in line() and told(own)["code"] == 5


def test_other_damage_of_a_run_folder_is_one_line_or_none(own: Finished) -> None:
    own.folder.summary.write_bytes(b"\xff\xfe\n")
    assert go_on(own) == 5
    own.folder.summary.unlink()
    own.folder.metrics.write_bytes(b"\xff" * 100)
    own.folder.environment.write_bytes(b"\x00")
    own.folder.exit.write_bytes(b'{"code": 0, "state": "done", "attempts": [{"attempt": 1e9}]}')
    (own.folder.checkpoints / "latest").unlink()
    assert go_on(own) == 0


@pytest.mark.parametrize("step", [9, 10**17])
def test_a_checkpoint_beyond_the_end_of_the_run_is_not_taken_for_a_finished_one(step: int, own: Finished,
                                                                                line: Line) -> None:
    directory = own.folder.checkpoints / f"step_{step:08d}"
    shutil.copytree(own.folder.checkpoints / "step_00000004", directory)
    vouch(directory, step=step)
    assert go_on(own) == 4
    assert f"the checkpoint is of step {step}, the whole run has 8" in line() and told(own)["code"] == 4


HOSTILE = (None, True, -1, 10**30, 1.5, "", "x" * 300, [], [[]], {}, {"a": 1}, [None], ["a", "b"], [1, 8])


@pytest.mark.parametrize("key", ["step", "epoch", "attempt", "saved", "versions", "config_digest", "data_digest",
                                 "peers", "extra", "extra.classes", "extra.images", "extra.images.shape",
                                 "extra.images.classes", "extra.images.mean", "extra.settings", "extra.plugins",
                                 "extra.settings.peers", "extra.settings.train"])
def test_a_malformed_field_of_a_manifest_is_one_line_and_never_a_bug(key: str, own: Finished) -> None:
    """Whether the run is continued, or a model is loaded."""
    directory, config = own.folder.checkpoints / "step_00000004", load_config(str(own.folder.config))
    sound = json.loads((directory / "manifest.json").read_text())
    opened = Run(own.folder, 2, logging.getLogger(), [], None, {}, None, True)  # type: ignore[arg-type]
    refused = 0
    for value in HOSTILE:
        document = json.loads(json.dumps(sound))
        *way, last = key.split(".")
        functools.reduce(dict.__getitem__, way, document)[last] = value
        vouch(directory, **document)
        try:
            manifest = load_manifest(own.folder, 4)
            check_resumed(manifest, opened, config, sound["data_digest"], 8)
            FinishedRun(own.folder, config, manifest, "raw").peer(0)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 8 or key in ("epoch", "attempt", "saved", "versions", "extra.classes", "extra.plugins",
                                  "extra.settings")


def test_a_full_disk_in_an_evaluation_is_survived_as_in_a_save(tmp_path: Path, line: Line,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("eval.every=1", "train.epochs=2", "eval.size=20", "log.console=plain")
    with monkeypatch.context() as patch:
        interrupted(patch, (during_training, "write_result"), 1, lambda: OutputError("full", "disk", "free space"))
        run = run_small(tmp_path, "run", *words)
    assert run.code == 0 and run.codes() == [0] and [r["step"] for r in run.records("epoch")] == [4, 8]
    assert sorted(file.stem for file in run.folder.eval.glob("*.json")) == ["validation_step_00000008"]


def test_an_evaluation_that_is_the_last_is_not_given_up(tmp_path: Path, line: Line,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("eval.every=1", "eval.size=20")
    with monkeypatch.context() as patch:
        interrupted(patch, (during_training, "write_result"), 1, lambda: OutputError("full", "disk", "free space"))
        run = run_small(tmp_path, "run", *words)
    assert run.code == 5 and "the evaluation after step 4 could not be saved" in line()
    assert run_small(tmp_path, "run", *words).code == 0
    assert (run.folder.eval / "validation_step_00000004.json").exists()
