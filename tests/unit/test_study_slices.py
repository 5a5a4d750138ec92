"""Slices of a study: the next one goes on where an earlier one stopped, on another machine, within the limits."""

from __future__ import annotations

import json
import subprocess
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import slices
from benchmarks.study.__main__ import main, read_options
from benchmarks.study.evidence import planned
from benchmarks.study.plan import Suite
from benchmarks.study.tables import Entry
from mat_dist.distributed.stopping import StopFlag
from mat_dist.errors import CheckpointError, ConfigError
from tests.study import run_here

# Epochs of 2 steps: at has 1, mat 4; its control, which costs as much, is not trained here.
PLAN = """
suites:
  tiny:
    config: digits
    settings: [train.epochs=4, train.batch_size=64, data.train_size=128, data.val_size=40, model.width=0.25,
               attack.steps=1, eval.every=4, eval.size=20, eval.steps=1, optim.ema_decay=null, eval.test_steps=0,
               checkpoint.every=1, run.device=cpu]
    seeds: [0]
    tables:
      main:
        title: Small
        primary: pgd2
        controls: [at]
        evaluations:
          pgd2: {settings: [attacks=pgd, steps=2, images=30, checks=0, transfer=false, eval.chunk=30]}
        rows:
          at: {says: alone, settings: [loss=at, train.epochs=1, eval.every=1]}
          mat: {says: mutual, peers: 2, control: at_long, settings: [loss=mat]}
          at_long: {says: alone and longer, settings: [loss=at, train.epochs=12]}
"""


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    return run_here(monkeypatch)


def command(folder: Path, machine: str, state: str, out: str, *more: str) -> list[str]:
    (folder / "plan.yaml").write_text(PLAN)
    return ["slices", "--file", str(folder / "plan.yaml"), "--root", str(folder / machine), "--out", str(folder / out),
            "--state", state if state == "-" else str(folder / state), "--only", "at,mat", *more]


def stop_at(monkeypatch: pytest.MonkeyPatch, run: Path, step: int) -> None:
    """Whoever asks is told to stop, from when the run has a checkpoint of that step."""
    there = run / "checkpoints" / f"step_{step:08}"
    monkeypatch.setattr(StopFlag, "requested", property(lambda self: there.is_dir()))
    monkeypatch.setattr(StopFlag, "reason", "stopped by a test", raising=False)


def weights(root: Path) -> list[str]:
    return sorted(str(file.relative_to(root)) for file in root.rglob("*.safetensors"))


@pytest.mark.slow
def test_the_next_slice_goes_on_in_a_fresh_folder_where_the_first_one_stopped(
        tmp_path: Path, in_process: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """at is finished: it comes without weights and is not asked for again. mat, stopped after 4 of 8 steps, goes on
    from there."""
    with monkeypatch.context() as stopping:
        stop_at(stopping, tmp_path / "one/mat_0", 4)
        assert main(command(tmp_path, "one", "-", "out1")) == 75
    shown = capsys.readouterr()
    assert "1 runs are left: mat_0" in shown.err and "2 runs, 1 of them with weights" in shown.out + shown.err
    assert {file.suffix for file in (tmp_path / "out1").iterdir()} == {".md", ".json", ".part"}
    begun = len(in_process)
    assert main(command(tmp_path, "two", "out1", "out2")) == 0
    assert [run for _, run, *_ in in_process[begun:]] == ["mat_0", "mat_0"]
    attempts = json.loads((tmp_path / "two/mat_0/environment.json").read_text())["attempts"]
    steps = [json.loads(line)["step"] for line in (tmp_path / "two/mat_0/metrics.jsonl").read_text().splitlines()]
    assert len(attempts) == 2 and steps == sorted(steps)
    assert weights(tmp_path / "two/at_0") == [] and json.loads((tmp_path / "out2/tiny.json").read_text())["runs"] == {
        "done": 2, "all": 3}
    begun = len(in_process)
    assert main(command(tmp_path, "four", "out2", "out4")) == 0 and len(in_process) == begun  # all of it is known
    assert weights(tmp_path / "four") == []
    assert (tmp_path / "four/results/tiny_figures/main.svg").is_file()


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_told_and_its_row_starts_anew(
        tmp_path: Path, in_process: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """But not on the machine that has it; parts are cut and the limit holds for all files together."""
    with monkeypatch.context() as stopping:
        stop_at(stopping, tmp_path / "one/mat_0", 2)
        assert main(command(tmp_path, "one", "-", "out1", "--most", "0.3", "--part", "0.002")) == 75
    shown = capsys.readouterr()
    assert "mat_0 starts anew in the next slice" in shown.out + shown.err
    files = list((tmp_path / "out1").iterdir())
    assert sum(file.stat().st_size for file in files) <= 0.3 * 2**20
    parts = [file for file in files if file.suffix == ".part"]
    assert len(parts) > 1 and max(file.stat().st_size for file in parts) <= 0.002 * 2**20
    slices.take_up(tmp_path / "out1", tmp_path / "two", "tiny")
    assert {file.name for file in (tmp_path / "two").iterdir()} == {"at_0", "at_0.log", "results"}
    assert main(command(tmp_path, "one", "out1", "out1")) == 0
    assert len(json.loads((tmp_path / "one/mat_0/environment.json").read_text())["attempts"]) == 2
    assert slices.read_state(tmp_path / "out1", "tiny")[0] == 2  # beside the first state, and newer


def runs_of(folder: Path, states: dict[str, str], *changes: tuple[str, str]) -> tuple[Suite, list[Entry], Namespace]:
    """Runs as a study finds them, without training: `done`, `begun` or absent; each with weights of two checkpoints."""
    words = command(folder, "runs", "-", "out")
    text = (folder / "plan.yaml").read_text()
    for before, after in changes:
        text = text.replace(before, after)
    (folder / "plan.yaml").write_text(text)
    options = read_options(words)
    options.command = "evidence"
    suite, entries = planned(options)
    for name in states:
        run = folder / "runs" / f"{name}_0"
        for step in (1, 2, 3):
            (run / f"checkpoints/step_{step:08}").mkdir(parents=True)
            (run / f"checkpoints/step_{step:08}/peer_0.safetensors").write_bytes(bytes(1000))
            (run / f"checkpoints/step_{step:08}/manifest.json").write_text("{}")
        (run / "checkpoints/latest").write_text("step_00000003\n")
        (run / "checkpoints/best").write_text("step_00000001\n")
        for file in ("config.yaml", "lock", ".lock.guard"):
            (run / file).write_text("x")
    return suite, entries, options


def kept(suite: Suite, entries: Sequence[Entry], states: dict[str, str], monkeypatch: pytest.MonkeyPatch
         ) -> dict[str, slices.Kept]:
    monkeypatch.setattr(slices.Job, "done", property(lambda self: states.get(self.row) == "done"))
    monkeypatch.setattr(Entry, "missing", lambda self, plan, seed: [] if states.get(self.name) == "done" else ["x"])
    return {one.name: one for one in slices.kept(suite, entries)}


def test_a_finished_run_keeps_its_weights_only_while_another_row_starts_from_it(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that goes on: the newest and the best checkpoint, no lock."""
    taught = ("[loss=mat]", '[loss=at, peers.0.loss=mat_kd, peers.1.frozen=true, "peers.1.init_from=RUN(at):peer0"]')
    states = {"at": "done", "at_long": "done", "mat": "begun"}
    suite, entries, _ = runs_of(tmp_path, states, taught)
    found = kept(suite, entries, states, monkeypatch)
    assert {name: one.whole for name, one in found.items()} == {"at_0": True, "at_long_0": False, "mat_0": True}
    names = {str(file.relative_to(tmp_path / "runs/mat_0")) for file in found["mat_0"].files}
    assert names == {"config.yaml", "checkpoints/latest", "checkpoints/best", *(
        f"checkpoints/step_0000000{step}/{file}" for step in (1, 3)
        for file in ("manifest.json", "peer_0.safetensors"))}
    assert not [file for file in found["at_long_0"].files if file.suffix == ".safetensors"]
    states["mat"] = "done"
    assert not any(one.whole for one in kept(suite, entries, states, monkeypatch).values())


def test_what_is_here_already_is_not_overwritten_by_a_state(tmp_path: Path) -> None:
    (tmp_path / "from/a_0").mkdir(parents=True)
    (tmp_path / "from/b_0").mkdir()
    for run in ("a_0", "b_0"):
        (tmp_path / "from" / run / "config.yaml").write_text("old")
    runs = [slices.Kept(run, [tmp_path / "from" / run / "config.yaml"], whole=True) for run in ("a_0", "b_0")]
    leave(tmp_path / "state", 3, slices.packed(tmp_path / "from", runs))
    (tmp_path / "here/a_0").mkdir(parents=True)
    (tmp_path / "here/a_0/config.yaml").write_text("newer")
    assert slices.take_up(tmp_path / "state", tmp_path / "here", "tiny") == 3
    assert [(tmp_path / "here" / run / "config.yaml").read_text() for run in ("a_0", "b_0")] == ["newer", "old"]


def leave(folder: Path, number: int, data: bytes, most: int = 100) -> list[Path]:
    folder.mkdir(exist_ok=True)
    files = []
    for name, part in slices.parts_of("tiny", number, data, most):
        (folder / name).write_bytes(part)
        files.append(folder / name)
    return files


def test_the_newest_state_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    data = bytes(range(250))
    leave(tmp_path, 1, b"older")
    parts = leave(tmp_path, 2, data)
    leave(tmp_path, 2 + 1, b"")  # an empty one is a state too
    assert [len(file.read_bytes()) for file in parts] == [100, 100, 50]
    assert slices.read_state(tmp_path, "tiny") == (3, b"")
    next(tmp_path.glob("tiny.0003.*")).unlink()
    assert slices.read_state(tmp_path, "tiny") == (2, data)
    parts[2].write_bytes(bytes(50))
    with pytest.raises(CheckpointError, match="differs from what was left"):
        slices.read_state(tmp_path, "tiny")
    parts[1].unlink()
    with pytest.raises(CheckpointError, match="part 2 of 3 of slice 2 is missing"):
        slices.read_state(tmp_path, "tiny")
    leave(tmp_path, 2, b"another")
    with pytest.raises(CheckpointError, match="two states of slice 2"):
        slices.read_state(tmp_path, "tiny")
    for folder, suite in ((tmp_path, "other"), (tmp_path / "absent", "tiny")):
        with pytest.raises(ConfigError, match="there is no state of suite"):
            slices.read_state(folder, suite)


@pytest.mark.parametrize(("suite", "control"), [
    ("gpu", "0.99 of at_wa_long"), ("gpu_overfit", "0.99 of at_wa_long"), ("gpu_union", "1.01 of max_long")])
def test_every_suite_for_a_gpu_is_ready_without_a_gpu_and_without_its_data(
        suite: str, control: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row can be trained, its steps are known, and each mutual one has its control."""
    monkeypatch.setenv("COLUMNS", "200")
    words = ["slices", "--suite", suite, "--root", str(tmp_path), "--out", str(tmp_path), "--dry-run"]
    assert main([*words, "data.root=absent.npz"]) == 0
    shown = capsys.readouterr().out
    assert "cannot be trained" not in shown and "?" not in shown and control in shown
    assert list(tmp_path.iterdir()) == []


def test_the_script_passes_on_what_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options and settings as they are, the budget from the environment; a word too few is told in one line."""
    script = Path(__file__).parents[2] / "benchmarks/slice.sh"
    monkeypatch.setenv("PYTHON", "echo")
    monkeypatch.setenv("BUDGET", "40")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", str(script), *words], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run("gpu", "in", "out", "--most", "9", "data.root=a b.npz").stdout == (
        "-m benchmarks.study slices --suite gpu --state in --out out --budget 40 --most 9 data.root=a b.npz\n")
    refused = run("gpu", "-")
    assert refused.returncode == 2 and refused.stderr.startswith("mat_dist: error: SUITE, STATE and OUT are needed")
    assert refused.stderr.count("\n") == 1
