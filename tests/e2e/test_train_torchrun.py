"""Real torchrun: the weights of one process and four ranks, signals, killed ranks."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

import mat_dist
from mat_dist.runs.folder import RunFolder
from tests.small_runs import SMALL, Finished

STEPS = 20
PATIENCE = 120  # seconds; a launch takes 10 on a quiet machine
SETTINGS = (*SMALL, "peers=4", "train.epochs=5", "attack.steps=30", "optim.ema_decay=0.9", "log.every=1",
            "checkpoint.every_steps=3")

pytestmark = pytest.mark.alone


def torchrun(ranks: int, *options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *options]


@contextmanager
def launched(launcher: Sequence[str], root: Path, name: str, *overrides: str,
             **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A train command under a launcher, its output in a file that a failing test shows."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_"))}
    env.update(variables, PYTHONPATH=str(Path(mat_dist.__file__).parents[1]))
    command = [*launcher, "-m", "mat_dist.train", *SETTINGS, *overrides, f"run.root={root}", f"run.name={name}"]
    with (root / f"{name}.out").open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print((root / f"{name}.out").read_text())


def run_to_end(launcher: Sequence[str], root: Path, name: str, *overrides: str, **variables: str) -> Finished:
    with launched(launcher, root, name, *overrides, **variables) as process:
        return Finished(process.wait(PATIENCE), RunFolder(root / name))


def wait_until(true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert process.poll() is None, f"the launcher ended with {process.returncode}"
        assert time.monotonic() < end
        time.sleep(0.01)


def steps_done(folder: RunFolder) -> int:
    """The last step on record."""
    if not folder.metrics.exists():
        return 0
    lines = folder.metrics.read_text().splitlines()
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def pid_of_rank(launcher: int, rank: int) -> int:
    """A process below `launcher` whose environment names the rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for pid in children:
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return int(pid)
    raise AssertionError(f"no rank {rank} among {children}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """20 steps in one process, uninterrupted."""
    run = run_to_end([sys.executable], tmp_path_factory.mktemp("alone"), "alone")
    assert run.code == 0 and run.steps()[-1] == STEPS
    return run


@pytest.mark.thorough  # launch/placement.sh shows it too
def test_four_ranks_give_the_weights_of_one_process(alone: Finished, tmp_path: Path) -> None:
    run = run_to_end(torchrun(4), tmp_path, "four")
    assert run.code == 0 and run.codes() == [0] and run.steps() == alone.steps()
    assert run.hashes() == alone.hashes()
    assert [r["loss"] for r in run.records("step")] == [r["loss"] for r in alone.records("step")]


def test_peers_with_other_losses_have_replicas_and_a_run_ends(tmp_path: Path) -> None:
    run = run_to_end(torchrun(4), tmp_path, "unlike", "peers=2", "peers.0.loss=at", "peers.1.loss=trades",
                     "train.max_steps=2")
    assert run.code == 0 and run.codes() == [0] and run.steps() == [2]


def test_a_run_that_torchrun_is_told_to_stop_goes_on_with_other_ranks(alone: Finished, tmp_path: Path) -> None:
    at, folder = random.randrange(1, STEPS - 8), RunFolder(tmp_path / "stopped")
    print(f"SIGTERM after step {at}")
    with launched(torchrun(2), tmp_path, "stopped") as process:
        wait_until(lambda: steps_done(folder) >= at, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 75
    last = (tmp_path / "stopped.out").read_text().splitlines()[-1]
    assert last.startswith("mat_dist: stopped by SIGTERM, saved after step")
    stopped = Finished(0, folder)
    assert stopped.codes() == [75] and at <= stopped.steps()[-1] < STEPS
    assert json.loads(folder.exit.read_text())["state"] == "stopped"
    again = run_to_end([sys.executable], tmp_path, "stopped")
    assert again.code == 0 and again.codes() == [75, 0]
    assert again.hashes() == alone.hashes()


@pytest.mark.parametrize("restart", [pytest.param("by hand", marks=pytest.mark.thorough), "by torchrun"])
def test_a_run_whose_rank_was_killed_goes_on_from_its_newest_checkpoint(restart: str, alone: Finished,
                                                                        tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "killed")
    options = ("--max_restarts=1", "--rdzv_id=killed") if restart == "by torchrun" else ()
    with launched(torchrun(2, *options), tmp_path, "killed") as process:
        wait_until(lambda: steps_done(folder) >= 7, process)
        os.kill(pid_of_rank(process.pid, 1), signal.SIGKILL)
        code = process.wait(PATIENCE)
    assert code == (0 if restart == "by torchrun" else 14)
    if restart == "by hand":
        assert Finished(code, folder).codes() == [14]
        assert "rank 1" in json.loads(folder.exit.read_text())["attempts"][0]["what"]
        assert run_to_end([sys.executable], tmp_path, "killed").code == 0
    run = Finished(code, folder)
    assert run.codes() == [14, 0] and run.hashes() == alone.hashes()
    resumed = [r["step"] for r in run.records("step") if r["attempt"] == 2]
    assert resumed == list(range(resumed[0], STEPS + 1)) and resumed[0] > 1
    assert resumed[0] - 1 in (3, 4, 6, 8, 9, 12)  # a step that was saved
