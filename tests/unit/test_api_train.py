"""`mat_dist.train`, `mat_dist.Run` and the public names, against the commands."""

from __future__ import annotations

import inspect
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import mat_dist
from mat_dist.errors import CheckpointError, ConfigError, EnvironmentFault, OutputError, StopRequested
from tests.small_runs import SMALL, Finished, RunFolder, run_small

TINY = {**dict(word.split("=") for word in SMALL), "peers": 1, "loss": "at", "train.max_steps": 2, "log.every": 1}


def tiny(root: Path, name: str, **more: Any) -> mat_dist.Run:
    return mat_dist.train(**{**TINY, "run.root": root, "run.name": name, **more})


def process_state() -> list[Any]:
    """What of this process a library must leave alone."""
    backends = torch.backends
    return [[signal.getsignal(number) for number in sorted(signal.valid_signals())], torch.get_num_threads(),
            torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
            [switch.fp32_precision for switch in (backends, backends.cudnn, backends.mkldnn, backends.cuda.matmul)],
            backends.cudnn.benchmark, backends.cudnn.deterministic, torch.get_default_dtype(),
            torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), sys.stdin, sys.stdout,
            {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"}, torch.is_grad_enabled(),
            threading.active_count()]


def test_a_program_trains_what_the_command_trains_and_hears_of_it(tmp_path):
    other = run_small(tmp_path, "command", "eval.every=1", "eval.test_steps=1", "log.every=1")
    heard: list[Any] = []
    torch.set_num_threads(2)
    before = process_state()
    run = mat_dist.train(**{**TINY, "peers": 2, "loss": "mat", "train.max_steps": None, "run.root": tmp_path,
                            "run.name": "program", "step.precision": "ieee", "run.deterministic": True},
                         eval={"every": 1, "test_steps": 1},
                         on_step=lambda record: heard.append(record["step"]),
                         on_evaluation=lambda record: heard.append((record["split"], record["robust_acc"])),
                         on_checkpoint=lambda folder: heard.append((folder / "manifest.json").is_file()))
    assert process_state() == before
    torch.set_num_threads(1)
    found = Finished(0, RunFolder(run.path))
    assert found.hashes() == other.hashes() and found.codes() == [0]
    (epoch,) = found.records("epoch")
    test = [one["accuracy"]["union"] for one in found.result("test_best_step_00000004")["targets"]]
    assert heard == [1, 2, 3, 4, True, ("val", epoch["robust_acc"]), ("test", test[:2])]


def test_what_a_callback_raises_ends_the_run_and_reaches_the_program_as_it_is(tmp_path):
    def fail(record: dict[str, Any]) -> None:
        raise ZeroDivisionError("mine")

    before = process_state()
    with pytest.raises(ZeroDivisionError, match="mine"):
        tiny(tmp_path, "a", on_step=fail)
    assert process_state() == before
    assert Finished(70, RunFolder(tmp_path / "a")).codes() == [70]


def test_an_interrupt_is_saved_raised_and_leaves_every_handler(tmp_path):
    before = process_state()
    with pytest.raises(StopRequested, match="SIGTERM, saved after step 2"):
        tiny(tmp_path, "a", on_step=lambda record: record["step"] == 1 and os.kill(os.getpid(), signal.SIGTERM),
             train={"max_steps": 3})
    assert process_state() == before
    assert Finished(75, RunFolder(tmp_path / "a")).steps() == [2]
    run = tiny(tmp_path, "a", train={"max_steps": 3})  # the same call goes on
    assert Finished(0, RunFolder(run.path)).steps() == [2, 3]


def test_another_thread_than_the_main_one_may_train(tmp_path):
    found: list[mat_dist.Run] = []
    thread = threading.Thread(target=lambda: found.append(tiny(tmp_path, "a")))
    thread.start()
    thread.join()
    assert [run.path for run in found] == [tmp_path / "a"]


@pytest.mark.parametrize(("settings", "error", "text"), [
    ({"attack.esp": 1}, ConfigError, "attack.eps"),
    ({"attack": {"esp": 1}}, ConfigError, "attack.eps"),
    ({"config": "no_such"}, ConfigError, "there is no such configuration file"),
    ({"config": 3}, ConfigError, "there is no such configuration file"),
    ({"plugins": "none.py"}, ConfigError, "cannot read the plug-in"),
    ({"config": "--help"}, ConfigError, "there is no such configuration file"),
    ({"plugins": ["none.py"]}, ConfigError, "cannot read the plug-in"),
    ({"run.name": ""}, ConfigError, "run.name has no value"),
    ({"run.device": "cuda"}, EnvironmentFault, "no GPU is visible"),
])
def test_a_mistake_in_a_call_is_one_error_of_ours(settings, error, text, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    before = process_state()
    with pytest.raises(error, match=text) as refused:
        mat_dist.train(**{**TINY, "run.root": tmp_path, **settings})
    assert "command line" not in str(refused.value)
    assert process_state() == before and not list(tmp_path.iterdir())


def test_mistakes_in_the_settings_of_a_call_are_said_to_be_its_arguments(tmp_path):
    with pytest.raises(ConfigError) as refused:
        mat_dist.train(**{**TINY, "run.root": tmp_path, "attack.esp": 1, "optim.lr": -1})
    told = [str(refused.value), *map(str, refused.value.problems)]
    assert [text.count("(arguments, ") for text in told] == [2, 1, 1] and "command line" not in "".join(told)
    with pytest.raises(ConfigError, match=r"\(arguments, steps\)"):
        mat_dist.attack(torch.nn.Flatten(), torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64), steps=-1)


def test_settings_of_any_python_type_mean_what_they_mean_on_the_command_line(tmp_path):
    run = tiny(tmp_path, "007", attack={"eps": "8/255", "step_size": np.float32(0.5)}, **{
        "data.cache": tmp_path / "cache", "optim.args": {"nesterov": True}, "peers.0.name": "one"})
    config = run.config
    assert (run.path.name, config.peers[0].name) == ("007", "one")
    assert config.peers[0].threat.eps == 8 / 255 and config.peers[0].attack.step_size == 0.5
    assert config.data.cache == str(tmp_path / "cache") and config.peers[0].optim.args == {"nesterov": True}


@pytest.mark.parametrize("kind", ["finished", "foreign", "file"])
def test_a_folder_that_exists_is_never_written_over(kind, tmp_path):
    place = tmp_path / "a"
    if kind == "finished":
        tiny(tmp_path, "a")
    elif kind == "foreign":
        place.mkdir()
        (place / "mine.txt").write_text("mine")
    else:
        place.write_text("mine")
    files = [path for path in (place, *place.rglob("*")) if path.is_file() and path.name != "exit.json"]
    before = {path: path.read_bytes() for path in files}
    with pytest.raises(OutputError):
        tiny(tmp_path, "a")
    assert all(path.read_bytes() == content for path, content in before.items())


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> mat_dist.Run:
    return tiny(tmp_path_factory.mktemp("runs"), "a", eval={"every": 1, "test_steps": 1})


def test_a_run_is_taken_wherever_a_folder_is(run):
    images = torch.rand(3, 1, 8, 8)
    one, other = mat_dist.load(run, which="latest"), mat_dist.load(str(run.path), "peer0")
    assert torch.equal(one(images), other(images))
    parameters = inspect.signature(mat_dist.load).parameters
    assert list(parameters) == ["run", "peer", "which", "weights", "device"]
    assert mat_dist.Run(str(run.path)).path == run.path
    with pytest.raises(CheckpointError, match="there is no such"):
        mat_dist.load(5)
    with pytest.raises(ConfigError, match="there is no run folder"):
        mat_dist.Run(run.path.parent / "none")


@pytest.mark.parametrize("device", ["bogus", "cuda:77", 3.5])
def test_a_device_that_is_not_there_is_one_error(run, device):
    with pytest.raises(EnvironmentFault, match="there is no device"):
        mat_dist.load(run, device=device)


def test_metrics_and_results_are_tables_with_the_numbers_of_the_files(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    steps, epochs, results = run.metrics(), run.metrics("epoch"), run.results()
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [one["loss/peer0"] for one in steps] == [one["loss"][0] for one in lines if one["kind"] == "step"]
    assert [one["robust_acc/peer0"] for one in epochs] == [one["robust_acc"][0] for one in lines
                                                           if one["kind"] == "epoch"]
    document = json.loads((run.path / "eval" / "test_last_step_00000002.json").read_text())["targets"][0]
    (found,) = [one for one in results if (one["file"], one["target"], one["threat"]) == (
        "test_last_step_00000002.json", "peer0", "union")]
    assert found["accuracy"] == document["accuracy"]["union"] and found["reportable"] is None
    assert [found["low"], found["high"]] == document["interval_95"]["union"]
    assert {one["file"] for one in results} == {path.name for path in (run.path / "eval").glob("*.json")}


def test_they_are_data_frames_of_pandas(run):
    pandas = pytest.importorskip("pandas")
    frame = run.results()
    assert isinstance(frame, pandas.DataFrame) and frame.accuracy.between(0, 1).all()
    assert run.metrics()["loss/peer0"].notna().all()


def test_a_data_frame_without_pandas_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'mat_dist\[pandas\]'"):
        run.metrics()


# ------------------------------------------------------------------------------------------------ names


def test_every_public_name_is_there_and_none_imports_torch_by_itself():
    program = "\n".join((
        "import sys, mat_dist, mat_dist.train, mat_dist.evaluate", "from mat_dist import train, evaluate",
        "assert train is mat_dist.train and callable(train) and callable(train.main) and callable(evaluate.main)",
        "assert 'torch' not in sys.modules and 'pandas' not in sys.modules",
        "assert set(mat_dist.__all__) <= set(dir(mat_dist))",
        "print([name for name in mat_dist.__all__ if getattr(mat_dist, name, None) is None])"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        mat_dist.tarin  # noqa: B018
