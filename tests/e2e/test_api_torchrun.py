"""`mat_dist.train` as a rank of torchrun."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.e2e.test_train_torchrun import torchrun
from tests.small_runs import SMALL, Finished, RunFolder, run_small

pytestmark = [pytest.mark.thorough, pytest.mark.alone]
PROGRAM = '''
import json, os, sys, mat_dist
rank, heard = os.environ["RANK"], []

def hear(record):
    heard.append(record["step"])
    if sys.argv[2] == "fail":
        raise ZeroDivisionError("mine")

settings = json.loads(sys.argv[1])
try:
    run = mat_dist.train(**settings, on_step=hear)
    if sys.argv[2] == "again":
        run = mat_dist.train(**{**settings, "run.name": "again"})
    told = str(mat_dist.load(run, 1).training)
except mat_dist.MatError as error:
    told = str(error)
open(f"told_{rank}.json", "w").write(json.dumps([heard, told]))
'''


def launch(root: Path, name: str, ending: str) -> list[list[object]]:
    """What each of two ranks heard, and what it had from `train`."""
    (root / "program.py").write_text(PROGRAM)
    settings = {**dict(word.split("=", 1) for word in SMALL), "log.every": 2, "run.root": str(root), "run.name": name}
    done = subprocess.run([*torchrun(2), "program.py", json.dumps(settings), ending], cwd=root, capture_output=True,
                          text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((root / f"told_{rank}.json").read_text()) for rank in (0, 1)]


def test_a_program_on_two_ranks_trains_the_weights_of_one_and_hears_on_the_first(tmp_path):
    assert launch(tmp_path, "two", "end") == [[[2, 4], "False"], [[], "False"]]
    found = Finished(0, RunFolder(tmp_path / "two"))
    assert found.hashes() == run_small(tmp_path, "one", "log.every=2").hashes()


def test_a_program_on_two_ranks_trains_several_times_each_as_if_alone(tmp_path):
    assert launch(tmp_path, "first", "again") == [[[2, 4], "False"], [[], "False"]]
    first, again = (Finished(0, RunFolder(tmp_path / name)) for name in ("first", "again"))
    assert first.hashes() == again.hashes()


def test_what_a_callback_raises_ends_all_ranks_with_one_text(tmp_path):
    (heard, one), (silent, other) = launch(tmp_path, "two", "fail")
    assert (heard, silent) == ([2], []) and one == other and "ZeroDivisionError: mine" in str(one)
