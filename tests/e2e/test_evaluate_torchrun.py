"""Real torchrun: an evaluation with AutoAttack that is killed and started again on other ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mat_dist
from mat_dist.evaluation.__main__ import main as evaluate
from tests.small_runs import run_small

pytestmark = pytest.mark.alone
pytest.importorskip("pyautoattack", exc_type=ImportError)

WORDS = ("attacks=pgd,autoattack", "version=custom", "custom=apgd-ce", "steps=2", "checks=1", "eval.chunk=8",
         "targets=peer0", "threats=linf:0.1")


def start(run: Path, ranks: int) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_"))}
    env["PYTHONPATH"] = str(Path(mat_dist.__file__).parents[1])
    command = [sys.executable, *launcher, "-m", "mat_dist.evaluate", str(run), *WORDS]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
                            start_new_session=True)


def result(run: Path) -> tuple[str, dict[str, object]]:
    (file,) = run.glob("eval/evaluate_*.json")
    return file.with_suffix(".csv").read_text(), json.loads(file.read_text())


def test_two_ranks_that_were_killed_and_one_process_give_the_same_file(tmp_path: Path) -> None:
    done = run_small(tmp_path, "small", "data.train_size=300", "train.epochs=2")
    assert done.code == 0
    one, two = [Path(shutil.copytree(done.folder.path, tmp_path / name / "small")) for name in ("one", "two")]
    assert evaluate([str(one), *WORDS]) == 0
    rows, document = result(one)
    process = start(two, 2)
    try:
        end = time.monotonic() + 120
        while not list(two.glob("eval/*.chunks/chunk_*.json")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pid in children_left(two):  # torchrun's ranks have sessions of their own
        os.kill(pid, signal.SIGKILL)
    there = {p.name: p.stat().st_mtime_ns for p in two.glob("eval/*.chunks/chunk_*.json")}
    assert 1 <= len(there) < 5
    process = start(two, 2)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    again, after = result(two)
    assert again == rows and after["targets"] == document["targets"]
    kept = {p.name: p.stat().st_mtime_ns for p in two.glob("eval/*.chunks/chunk_*.json")}
    assert there.items() <= kept.items() and len(kept) == 5


def children_left(run: Path) -> list[int]:
    """Processes whose command line names the run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(run).encode() in command:
                found.append(int(entry.name))
    return found
