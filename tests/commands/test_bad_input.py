"""What a user can get wrong: one line on the screen, the code of the documentation, and nothing lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mat_dist import train
from mat_dist.checkpoints import saver
from mat_dist.errors import OutputError
from mat_dist.runs.folder import RunFolder
from mat_dist.runs.lock import GUARD, RunLock
from mat_dist.training import trainer
from tests.small_runs import SMALL, Finished, interrupted, run_small, tree_hash

LINE = re.compile(r"mat_dist: error: [^\n]+ \([^\n]+\): [^\n]+\n")
TOLD = ("exit.json", GUARD)  # what a refused start writes
Fail = Callable[..., str]
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished run, which no failure may touch."""
    run = run_small(tmp_path_factory.mktemp("runs"), "earlier", "train.max_steps=2")
    assert run.code == 0
    return run


@pytest.fixture
def fails(earlier: Finished, capsys: Captured) -> Fail:
    """fails(code, *words) -> the one line on stderr of a train command that must end with `code`."""
    def run(code: int, *words: str) -> str:
        root, before = earlier.folder.path.parent, tree_hash(earlier.folder.path, *TOLD)
        capsys.readouterr()
        found = train.main([*SMALL, f"run.root={root}", "run.name=new", *words])
        out, err = capsys.readouterr()
        assert found == code, err
        assert LINE.fullmatch(err), err  # one line, and with it no traceback
        assert out == "" and tree_hash(earlier.folder.path, *TOLD) == before
        return err

    return run


def no_new_run(earlier: Finished) -> bool:
    return [p.name for p in earlier.folder.path.parent.iterdir()] == ["earlier"]


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("words,says", [
    (["attack.stpes=7"], "attack.steps"),
    (["threat.eps=8"], "8/255"),
    (["attack.eps=8"], "8/255"),
    (["train.epochs=0"], "train.epochs"),
    (["optim.lr=fast"], "optim.lr"),
    (["run.name=../x"], "run.name"),
    (["run.name=/tmp/x"], "run.name"),
    (["--epochs=3"], "train.epochs"),
    (["train.epochs"], "train.epochs=VALUE"),
    (["--config", "no_such_file"], "no_such_file"),
    (["loss.preset=mta"], "mat"),
    (["peers=1"], "at"),
    (["train.batch_size=20", "train.accumulate=3"], "divisor of 20"),
    (["comm.backend=nccl"], "gloo"),
    (["data.name=npz"], "data.root"),
])
def test_a_setting_that_cannot_be_used_ends_with_2_and_leaves_no_folder(words: list[str], says: str, fails: Fail,
                                                                      earlier: Finished) -> None:
    assert says in fails(2, *words)
    assert no_new_run(earlier)


@pytest.mark.parametrize("word,says", [("model.name=resnet81", "resnet18"), ("data.name=cifar01", "cifar10")])
def test_a_name_that_nobody_registered_ends_with_2_and_a_hint(word: str, says: str, fails: Fail,
                                                              tmp_path: Path) -> None:
    assert says in fails(2, word, f"run.root={tmp_path}")


def test_all_problems_are_reported_at_once(earlier: Finished, capsys: Captured) -> None:
    assert train.main([*SMALL, "threat.eps=8", "attack.stpes=3", "train.epochs=0"]) == 2
    err = capsys.readouterr().err
    assert len(LINE.findall(err)) == 3 == err.count("\n")


def test_the_command_answers_a_misspelt_setting_without_loading_torch() -> None:
    program = "\n".join(("import sys", "from mat_dist.train import main", "code = main(['attack.stpes=3'])",
                         "sys.exit(code + 100 * ('torch' in sys.modules))"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and LINE.fullmatch(done.stderr) and done.stdout == ""


# ------------------------------------------------------------------------------------------------ ranks


NETWORKS = """import sys
from torch import nn
from mat_dist.models import register_model

class Leaves(nn.Linear):
    def forward(self, x_BD):
        return sys.exit(0) if self.training else super().forward(x_BD)

register_model("leaves")(lambda config, shape, classes: nn.Sequential(nn.Flatten(), Leaves(64, classes)))
register_model("still")(lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False))
"""


@pytest.mark.parametrize(("name", "code", "says"), [
    ("still", 2, "no parameter that takes a gradient (peers.0.model)"), ("leaves", 14, "left: SystemExit: 0")])
def test_a_network_that_cannot_learn_or_leaves_in_a_step_is_one_line(name: str, code: int, says: str, tmp_path: Path,
                                                                     capsys: Captured) -> None:
    (tmp_path / "networks.py").write_text(NETWORKS)
    found = train.main([*SMALL, f"run.root={tmp_path}", "run.name=one", "--plugin", str(tmp_path / "networks.py"),
                        f"model.name={name}"])
    err = capsys.readouterr().err
    assert found == code == json.loads((tmp_path / "one/exit.json").read_text())["code"]
    assert LINE.fullmatch(err) and says in err


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_count_that_does_not_fit_ends_with_6_before_the_ranks_meet(
        rank: int, earlier: Finished, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """MASTER_ADDR is no address: a rank that tried to meet the others would say so."""
    for key, value in {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": rank, "MASTER_ADDR": "no.such.host.invalid",
                       "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(key, str(value))
    assert train.main([*SMALL, "peers=4", f"run.root={earlier.folder.path.parent}"]) == 6
    err = capsys.readouterr().err
    if rank == 0:
        assert LINE.fullmatch(err) and "3 ranks do not fit 4 peers" in err and "use 1, 2, 4, 8, 12, ... ranks" in err
    else:
        assert err == ""  # one rank speaks
    assert no_new_run(earlier)


def test_a_broken_launcher_variable_ends_with_6(fails: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    assert "first" in fails(6)


# ------------------------------------------------------------------------------------------------ data


def write_npz(path: Path, **changes: np.ndarray) -> str:
    """200 training and 40 test images of 8 x 8 in four classes."""
    noise = np.random.default_rng(0)
    arrays = {"x_train": noise.random((200, 8, 8)), "y_train": np.arange(200) % 4, "x_test": noise.random((40, 8, 8)),
              "y_test": np.arange(40) % 4, **changes}
    np.savez(path, **arrays)
    return f"data.root={path}"


def test_a_sound_npz_is_accepted(tmp_path: Path) -> None:
    assert run_small(tmp_path, "run", "data.name=npz", write_npz(tmp_path / "a.npz"), "train.max_steps=1").code == 0


@pytest.mark.parametrize("changes,says", [
    ({"x_train": np.random.default_rng(0).random((200, 8, 8)) * 255}, r"outside \[0, 1\].*x|outside \[0, 1\].*train"),
    ({"x_test": np.random.default_rng(0).normal(size=(40, 8, 8))}, r"outside \[0, 1\].*test"),
    ({"x_train": np.full((200, 8, 8), np.nan)}, "NaN"),
    ({"y_test": np.arange(40)}, "label 4 .*out of range"),
    ({"y_train": np.arange(200) % 4 - 1}, "label -1 .*out of range"),
    ({"classes": np.array(["a", "b", "c"])}, "label 3 .*out of range"),
    ({"classes": np.array(["a", "b", "c", "d", "e"])}, "no training image.*'e'"),
    ({"y_train": np.arange(199) % 4}, "200 images but 199 labels"),
    ({"y_train": np.arange(200) % 4 * 0.5}, "label 0.5 of image 1 is no whole number"),
    ({"x_test": np.zeros((40, 9, 9))}, r"\(1, 9, 9\)"),
])
def test_arrays_that_cannot_be_used_end_with_3(changes: dict[str, np.ndarray], says: str, fails: Fail,
                                               tmp_path: Path) -> None:
    err = fails(3, "data.name=npz", write_npz(tmp_path / "a.npz", **changes), f"run.root={tmp_path / 'runs'}")
    assert re.search(says, err), err


def write_images(root: Path) -> str:
    noise = np.random.default_rng(0)
    for number in range(240):
        path = root / ("train" if number % 6 else "test") / f"class{number % 2}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return f"data.root={root}"


@pytest.mark.parametrize("case", ["missing", "empty", "a file", "no classes"])
def test_a_folder_without_images_ends_with_3_and_names_itself(case: str, fails: Fail, tmp_path: Path) -> None:
    root = tmp_path / "images"
    if case == "a file":
        root.write_text("not a folder")
    elif case != "missing":
        root.mkdir()
    if case == "no classes":
        (root / "train").mkdir()
        (root / "test").mkdir()
    err = fails(3, "data.name=folder", f"data.root={root}", "data.image_size=8", f"run.root={tmp_path / 'runs'}")
    assert str(root) in err


@pytest.mark.parametrize("content", [b"", b"not an image", "half"])
def test_one_broken_image_among_many_ends_with_3_and_its_name(content: bytes | str, fails: Fail,
                                                              tmp_path: Path) -> None:
    root = write_images(tmp_path / "images")
    bad = tmp_path / "images" / "train" / "class1" / "101.png"
    bad.write_bytes(content if isinstance(content, bytes) else bad.read_bytes()[:len(bad.read_bytes()) // 2])
    err = fails(3, "data.name=folder", root, "data.image_size=8", f"run.root={tmp_path / 'runs'}")
    assert "class1/101.png" in err


def test_a_data_set_that_is_not_there_ends_with_3_and_says_how_to_get_it(fails: Fail, tmp_path: Path) -> None:
    err = fails(3, "data.name=cifar10", f"data.root={tmp_path}", f"run.root={tmp_path / 'runs'}")
    assert "data.download=true" in err


def test_too_few_images_for_a_batch_end_with_3(fails: Fail, tmp_path: Path) -> None:
    settings = ("data.train_size=null", "train.batch_size=512", f"run.root={tmp_path / 'runs'}")
    assert "batch" in fails(3, "data.name=npz", write_npz(tmp_path / "a.npz"), *settings)


# ------------------------------------------------------------------------------------------------ the run folder


def test_a_root_that_is_a_file_ends_with_5(fails: Fail, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert str(file) in fails(5, f"run.root={file}") and file.read_text() == "mine"


def test_a_root_that_cannot_be_written_ends_with_5(fails: Fail, tmp_path: Path) -> None:
    root = tmp_path / "locked"
    root.mkdir(mode=0o555)
    if os.access(root, os.W_OK):  # root may write everywhere but here
        root = Path("/proc/mat_dist_runs")
    assert str(root) in fails(5, f"run.root={root}")


def test_somebody_elses_folder_ends_with_5_and_stays_as_it_is(fails: Fail, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("...")
    before = tree_hash(tmp_path)
    assert "not a run folder" in fails(5, f"run.root={tmp_path}", "run.name=thesis")
    assert tree_hash(tmp_path) == before


def test_a_finished_run_ends_with_5_and_stays_as_it_is(fails: Fail) -> None:
    assert "finished" in fails(5, "run.name=earlier", "train.max_steps=2")


def test_never_resuming_an_existing_run_ends_with_5(fails: Fail) -> None:
    assert "run.resume=auto" in fails(5, "run.name=earlier", "train.max_steps=2", "run.resume=never")


def test_a_run_that_is_in_use_ends_with_5_and_names_the_process(fails: Fail, tmp_path: Path) -> None:
    assert run_small(tmp_path, "busy", "train.max_steps=1").code == 0
    with RunLock(RunFolder(tmp_path / "busy"), None):
        before = tree_hash(tmp_path)
        err = fails(5, f"run.root={tmp_path}", "run.name=busy", "train.epochs=2")
        assert "in use" in err and str(os.getpid()) in err
        assert tree_hash(tmp_path) == before


# ------------------------------------------------------------------------------------------------ resuming


def test_resuming_with_other_settings_ends_with_4_and_names_them(fails: Fail) -> None:
    err = fails(4, "run.name=earlier", "train.max_steps=2", "train.epochs=2", "optim.lr=0.05", "run.seed=3")
    assert "optim.lr: 0.2 -> 0.05" in err and "run.seed: 0 -> 3" in err


def test_having_to_resume_what_does_not_exist_ends_with_4(fails: Fail, earlier: Finished) -> None:
    assert "no run to continue" in fails(4, "run.resume=must")
    assert no_new_run(earlier)


def test_having_to_resume_a_run_without_name_ends_with_2(fails: Fail, earlier: Finished) -> None:
    assert "run.name" in fails(2, "run.resume=must", "run.name=null")
    assert no_new_run(earlier)


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finished:
    """A run of two epochs on arrays that ended in the second one, after its checkpoint of step 4."""
    def at_once(write: Callable[[], Any], name: str) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(write())
        return done

    with monkeypatch.context() as patch:
        patch.setattr(saver, "begun", at_once)
        interrupted(patch, (trainer, "train_step"), 6, lambda: OutputError("the disk is on fire", "disk", "put it out"))
        run = run_small(tmp_path, "stopped", *two_epochs(tmp_path), write_npz(tmp_path / "a.npz"))
    assert run.code == 5 and run.steps() == [4]
    return run


def two_epochs(root: Path) -> tuple[str, ...]:
    return "data.name=npz", "train.epochs=2", f"run.root={root}", "run.name=stopped"


def test_a_stopped_run_is_refused_with_other_settings_and_goes_on_with_its_own(stopped: Finished, fails: Fail,
                                                                             tmp_path: Path) -> None:
    own = (*two_epochs(tmp_path), f"data.root={tmp_path / 'a.npz'}")
    before = tree_hash(tmp_path, *TOLD)
    for other in ("peers=3", "threat.eps=0.2", "train.epochs=1", "model.norm=group", "step.precision=fp64"):
        assert other.split("=")[0].split(".")[-1] in fails(4, *own, other)
    assert tree_hash(tmp_path, *TOLD) == before
    assert run_small(tmp_path, "stopped", *own).code == 0


def test_other_images_on_resume_end_with_4_and_the_run_can_still_go_on(stopped: Finished, fails: Fail,
                                                                       tmp_path: Path) -> None:
    """The refused attempt is on record; checkpoints and metrics are untouched."""
    before = {name: tree_hash(tmp_path / "stopped" / name) for name in ("checkpoints", "metrics.jsonl")}
    other = write_npz(tmp_path / "b.npz", y_test=(np.arange(40) + 1) % 4)
    assert "not those that the run was trained on" in fails(4, *two_epochs(tmp_path), other)
    assert before == {name: tree_hash(tmp_path / "stopped" / name) for name in before}
    again = run_small(tmp_path, "stopped", *two_epochs(tmp_path), f"data.root={tmp_path / 'a.npz'}")
    assert again.code == 0 and again.codes() == [5, 4, 0]


def test_a_run_whose_checkpoints_are_all_damaged_ends_with_4_and_keeps_them(stopped: Finished, fails: Fail,
                                                                          tmp_path: Path) -> None:
    file = stopped.folder.checkpoints / "step_00000004" / "peer_0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    before = tree_hash(stopped.folder.checkpoints)
    err = fails(4, *two_epochs(tmp_path), f"data.root={tmp_path / 'a.npz'}")
    assert "step_00000004" in err and "peer_0.safetensors" in err
    assert tree_hash(stopped.folder.checkpoints) == before


def test_a_damaged_config_of_a_run_ends_with_2_and_names_it(stopped: Finished, fails: Fail, tmp_path: Path) -> None:
    stopped.folder.config.write_text("run: {seed: [}")
    before = tree_hash(tmp_path, *TOLD)
    assert "config.yaml" in fails(2, *two_epochs(tmp_path), f"data.root={tmp_path / 'a.npz'}")
    assert tree_hash(tmp_path, *TOLD) == before
